"""Singular values and norms: certified on the lattice, exact where dense or circular, matrix-free for the rest."""

from __future__ import annotations

import importlib
from functools import cache
from itertools import product
from math import prod

import pytest
import torch
from cases import FEW_CONVS, KERNELS, MATRICES, OPERATORS, Case, flat, random, rank_one, single_tap, smooth
from torch import Tensor

import spectral_hooks as sh
from spectral_hooks.linalg import cholesky, krylov
from spectral_hooks.linalg.gram import Gram
from spectral_hooks.linalg.krylov import largest
from spectral_hooks.linalg.symbols import trim
from spectral_hooks.norms.grid import grid_norm
from spectral_hooks.norms.groups import grid_norms, lattice_norms
from spectral_hooks.norms.lattice import lattice_norm, surely_below

# -- the lattice norm -----------------------------------------------------------------------------------------------------

#: Points per axis of the sampling, of the strided output's frequencies.
SAMPLES = {1: 8192, 2: 512, 3: 64}


def samples(name: str) -> int:
    """Points per axis for this kernel; fewer for the wide ones."""
    return 64 if name.endswith("-wide") else SAMPLES[KERNELS[name][0].ndim - 2]


def symbol_grams(name: str, theta: Tensor | None = None) -> Tensor:
    """`F F*` on the sampling grid, or at output frequencies `theta`, by aliasing: no polyphase form.

    The rows of a convolution of stride `s` see the frequencies `(ω + 2π j) / s` as one: `Σ_j F F* / s` over the aliases.
    """
    kernel, settings = KERNELS[name]
    op = sh.ConvOperator(kernel, **settings)
    dims = kernel.ndim - 2
    largest_entry = kernel.abs().max().clamp(min=1e-300)
    blocks = (kernel / largest_entry).unflatten(0, (op.groups, -1))
    if theta is None:
        steps = torch.arange(samples(name), dtype=torch.float64) * (2 * torch.pi / samples(name))
        axes = [steps] * dims
    else:
        axes = None
    total: Tensor | float = 0.0
    for alias in product(*(range(s) for s in op.stride)):
        if axes is not None:
            # the transform of separable waves, one axis after the other
            values = blocks.to(torch.complex128)
            for axis in range(dims):
                angle = (axes[axis] + 2 * torch.pi * alias[axis]) / op.stride[axis]
                taps = torch.arange(kernel.shape[2 + axis], dtype=torch.float64) * op.dilation[axis]
                waves = torch.polar(torch.ones(1, dtype=torch.float64), -angle[:, None] * taps)
                if axis == 0:
                    # half of the frequencies of one axis: the others are conjugates
                    waves = waves[: len(angle) // 2 + 1]
                values = torch.tensordot(values, waves, dims=([3], [1]))
            values = values.movedim((0, 1, 2), (-3, -2, -1)).flatten(0, dims - 1)
        else:
            assert theta is not None
            angle = (theta + 2 * torch.pi * theta.new_tensor(alias)) / theta.new_tensor(op.stride)
            taps = torch.cartesian_prod(
                *(torch.arange(k, dtype=torch.float64) * d for k, d in zip(kernel.shape[2:], op.dilation, strict=True))
            ).reshape(-1, dims)
            waves = torch.polar(torch.ones(1, dtype=torch.float64), -angle @ taps.T)
            values = torch.einsum("nt,gijt->ngij", waves, blocks.flatten(3).to(torch.complex128))
        # the aliases add up on the side of the strided output: rows of a convolution, and of a transposed one alike,
        # because its kernel is stored as that of the convolution whose adjoint it is
        total = total + values @ values.mH / prod(op.stride)
    assert isinstance(total, Tensor)
    return total


@cache
def sampled(name: str) -> tuple[float, float]:
    """The largest norm on the sampling grid, and the same after looking closer around the best samples."""
    kernel, _ = KERNELS[name]
    scale = float(kernel.abs().max().clamp(min=1e-300))
    grams = symbol_grams(name)
    dims, groups = kernel.ndim - 2, grams.shape[1]
    rough = torch.linalg.matrix_norm(grams).flatten()
    flat_grams = grams.flatten(0, 1)
    # ‖G‖_F ≥ λ: points below the best of the few with the largest ‖G‖_F need no eigenvalue
    best = torch.linalg.eigvalsh(flat_grams[rough.topk(min(64, len(rough))).indices])[:, -1].max()
    asked = (rough >= best * (1 - 1e-12)).nonzero().squeeze(1)
    values = torch.linalg.eigvalsh(flat_grams[asked])[:, -1]
    on_grid = float(values.max())

    top = asked[values.topk(min(12, len(values))).indices]
    points = samples(name)
    sizes = [points // 2 + 1, *[points] * (dims - 1)]
    index = torch.stack(torch.unravel_index(top // groups, sizes), 1)
    centre = index * (2 * torch.pi / points)
    width, closer = 2 * torch.pi / points, on_grid
    offsets = torch.cartesian_prod(*[torch.linspace(-1, 1, 5, dtype=torch.float64)] * dims).reshape(-1, dims)
    for _ in range(14):
        around = (centre[:, None] + offsets * width).flatten(0, 1)
        found = torch.linalg.eigvalsh(symbol_grams(name, around))[..., -1].amax(1).unflatten(0, (-1, len(offsets)))
        value, place = found.max(1)
        centre = centre + offsets[place] * width
        closer, width = max(closer, float(value.max())), width / 2
    return scale * max(on_grid, 0) ** 0.5, scale * max(closer, 0) ** 0.5


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("name", KERNELS)
def test_lattice_norm_is_never_below_and_within_rtol_above(name: str, rtol: float) -> None:
    """`S ≤ value ≤ S (1 + rtol)`; `S` is seen from below, by a fine sampling and then by looking closer."""
    kernel, settings = KERNELS[name]
    value = float(sh.spectral_norm(sh.ConvOperator(kernel, **settings), rtol=rtol))
    on_grid, closer = sampled(name)
    # 1e-13: the rounding of the sampling itself
    assert value >= closer * (1 - 1e-13) >= on_grid * (1 - 1e-12)
    assert value <= closer * (1 + rtol) * (1 + 1e-13)


@pytest.mark.parametrize("name", KERNELS)
def test_lattice_norm_in_float32(name: str) -> None:
    """The result is cast so that it bounds the float64 norm of the stored float32 weight."""
    kernel, settings = KERNELS[name]
    stored = kernel.float()
    value = sh.spectral_norm(sh.ConvOperator(stored, **settings), rtol=1e-4)
    exact = sh.spectral_norm(sh.ConvOperator(stored.double(), **settings), rtol=1e-4)
    assert value.dtype == torch.float32
    assert float(exact) <= float(value) <= float(exact) * (1 + 1e-6)


def test_closed_forms() -> None:
    """A difference has norm 2, a box its number of taps, a delayed copy 1, whatever dimension."""
    for dims in (1, 2, 3):
        box = torch.ones(1, 1, *[3] * dims, dtype=torch.float64)
        copy = torch.eye(4, dtype=torch.float64).reshape(4, 4, *[1] * dims)
        difference = torch.tensor([1.0, -1.0]).double().reshape(1, 1, 2, *[1] * (dims - 1))
        for kernel, stride, exact in ((box, 1, 3**dims), (box, 3, 3 ** (dims / 2)), (copy, 1, 1), (difference, 1, 2)):
            value = float(sh.spectral_norm(sh.ConvOperator(kernel, stride=stride), rtol=1e-5))
            assert exact * (1 - 1e-14) <= value <= exact * (1 + 1.001e-5)
    assert float(sh.spectral_norm(sh.ConvOperator(torch.zeros(2, 2, 3)))) == 0
    assert float(sh.spectral_norm(sh.DenseOperator(torch.zeros(2, 3)))) == 0


@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_homogeneous(power: int) -> None:
    """`‖2^p A‖ = 2^p ‖A‖`, bit for bit."""
    kernel = random(3, 3, 3, 3)
    plain, scaled = (sh.spectral_norm(sh.ConvOperator(kernel * factor)) for factor in (1.0, 2.0**power))
    assert float(scaled) == float(plain) * 2.0**power


def test_subnormal_weights() -> None:
    """Weights at the very end of float32 still have a norm, not zero and not an error."""
    weight = torch.full((2, 2, 3, 3), 1e-40)
    expected = float(sh.spectral_norm(sh.ConvOperator(weight.double())))
    assert float(sh.spectral_norm(sh.ConvOperator(weight))) == pytest.approx(expected, rel=1e-4)


# -- finite operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW_CONVS, ids=str)
def test_finite_norm(case: Case) -> None:
    """To 1e-5 in both precisions, never above by more than rounding in float64; circular ones are exact to their dtype's."""
    # numbers that float32 has
    op = case.operator(case.layer().weight.detach().float().double())
    expected = float(torch.linalg.matrix_norm(op.to_dense(), ord=2))
    for dtype in (torch.float64, torch.float32):
        value = float(sh.spectral_norm(op.with_weight(op.weight.to(dtype))))
        above = 2 * torch.finfo(dtype).eps if case.mode == "circular" else 1e-12
        assert expected * (1 - 1e-5) <= value <= expected * (1 + above)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("settings", [{"padding": 3}, {"stride": 2, "padding": 1}, {"padding": 2, "transposed": True}], ids=str)
@pytest.mark.parametrize("channels", [(4, 4), (6, 3), (3, 6)])
def test_matrix_free_values_are_from_below(channels: tuple[int, int], settings: dict, dtype: torch.dtype) -> None:
    """However many roundings in float32 have found the vectors: along a line singular values lie close together."""
    for seed, scale in enumerate((1.0, 2.0**-40)):
        weight = (torch.randn(*channels, 6, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
        op = sh.ConvOperator(weight, input_size=200, **settings)
        expected = torch.linalg.svdvals(op.with_weight(weight.double()).to_dense())
        top = float(expected[0])
        values = sh.singular_values(op, 4).double()
        assert float((values - expected[:4]).amax()) <= 1e-12 * top
        assert float((values - expected[:4]).amin()) >= -2e-6 * top
        assert top * (1 - 1e-5) <= float(sh.spectral_norm(op)) <= top * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [random, smooth, flat, rank_one, single_tap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("k", [1, 5])
def test_matrix_free_singular_values(kind, k: int, dtype: torch.dtype) -> None:
    """The `k` largest without the dense matrix, repeated ones as often as they occur."""
    op = sh.ConvOperator(kind(8, 8, 3, 3).to(dtype), padding=1, input_size=(9, 8))
    found = largest(op, k)
    expected = torch.linalg.svdvals(op.with_weight(op.weight.double()).to_dense())[:k]
    torch.testing.assert_close(found.values.double(), expected, rtol=0, atol=1e-5 * float(expected[0]))
    # they are triples: A v = σ u, with orthonormal u and v
    image = torch.stack([op.matvec(v) for v in found.right])
    scale = float(expected[0])
    torch.testing.assert_close(image, found.values.reshape(-1, 1, 1, 1) * found.left, rtol=0, atol=1e-4 * scale)
    gram = found.right.flatten(1) @ found.right.flatten(1).T
    torch.testing.assert_close(gram, torch.eye(k, dtype=dtype), rtol=0, atol=1e-4)


def test_crowded_singular_values_fall_back_to_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the matrix-free method gives up they are all found none the less; of a large matrix the error says what to do.

    One channel in, two out, a stride of two: a band of 299 values, so dense at its end that float32 cannot part the first.
    """
    module = importlib.import_module("spectral_hooks.norms.singular_values")
    weight = torch.randn(2, 1, 3, dtype=torch.float32, generator=torch.Generator().manual_seed(18))
    op = sh.ConvOperator(weight, stride=2, input_size=600)
    with pytest.raises(krylov.NotConverged):
        largest(op, 2)
    expected = torch.linalg.svdvals(op.with_weight(op.weight.double()).to_dense())
    torch.testing.assert_close(sh.singular_values(op, 2).double(), expected[:2], rtol=1e-6, atol=0)
    monkeypatch.setattr(module, "_DENSE_ENTRIES", 1000)
    with pytest.raises(RuntimeError, match=r"`k` = 2 .* did not converge.*float64.*`torch.linalg.svdvals\(op.to_dense\(\)\)`"):
        sh.singular_values(op, 2)


@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"padding_mode": "reflect"}, {"padding_mode": "circular"}], ids=str)
def test_wide_layer_converges_in_float32(settings: dict) -> None:
    """Rounding in wide layers keeps the residuals from shrinking below some 1e-6: no error, and the right values."""
    op = sh.ConvOperator(random(64, 64, 3, 3).float(), padding=1, input_size=6, **settings)
    expected = torch.linalg.svdvals(op.to_dense())
    torch.testing.assert_close(largest(op, 5).values, expected[:5], rtol=1e-5, atol=0)
    assert float(sh.spectral_norm(op)) == pytest.approx(float(expected[0]), rel=1e-5)


REPEATED = {
    "depthwise": sh.ConvOperator(random(1, 1, 3, 3).expand(6, 1, 3, 3).contiguous(), groups=6, padding=1, input_size=12),
    "one-by-one": sh.ConvOperator(random(5, 5, 1, 1), input_size=14),
    "one-by-one-circular": sh.ConvOperator(random(5, 5, 1, 1), padding_mode="circular", input_size=14),
    "identity": sh.ConvOperator(torch.eye(6, dtype=torch.float64)[:, :, None, None], input_size=10),
    "large": sh.ConvOperator(random(4, 4, 3, 3), padding=1, input_size=12),
    "zero": sh.ConvOperator(torch.zeros(4, 4, 3, 3, dtype=torch.float64), padding=1, input_size=12),
}


@pytest.mark.parametrize("k", [1, 3, 8, None])
@pytest.mark.parametrize("name", REPEATED)
def test_singular_values_with_repetitions(name: str, k: int | None) -> None:
    op = REPEATED[name]
    expected = torch.linalg.svdvals(op.to_dense())[:k]
    values = sh.singular_values(op, k)
    assert values.shape == expected.shape
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6 * max(float(expected[0]), 1e-12))
    assert bool((values.diff() <= 0).all())


@pytest.mark.parametrize("case", FEW_CONVS, ids=str)
def test_singular_values_of_every_geometry(case: Case) -> None:
    op = case.operator(case.layer().weight.detach())
    expected = torch.linalg.svdvals(op.to_dense())
    torch.testing.assert_close(sh.singular_values(op), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(sh.singular_values(op, 1), expected[:1], rtol=0, atol=1e-6)


def test_singular_values_of_a_layer_too_large_for_a_matrix() -> None:
    """Patches that do not overlap: those of the flattened kernel, once for every patch."""
    op = sh.ConvOperator(random(3, 3, 2, 2), stride=2, input_size=160)
    with pytest.raises(ValueError, match="`k` largest"):
        sh.singular_values(op)
    top = torch.linalg.svdvals(op.weight.flatten(1))[0]
    torch.testing.assert_close(sh.singular_values(op, 2), top.expand(2), rtol=1e-6, atol=0)


def test_dtypes() -> None:
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        for op in (
            sh.DenseOperator(random(3, 4).to(dtype)),
            sh.ConvOperator(random(3, 4, 3).to(dtype), input_size=5),
            sh.ConvOperator(random(3, 4, 3).to(dtype)).circular(5),
        ):
            assert sh.singular_values(op).dtype == expected
            assert sh.spectral_norm(op).dtype == expected
            assert sh.spectral_norm(op).shape == ()


# -- gradients --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("make", [random, smooth], ids=lambda f: f.__name__)
def test_gradcheck(name: str, make) -> None:
    """The gradient of the norm, where the largest singular value is simple."""
    weight = make(3, 2, 3, 3).requires_grad_()

    # a lattice value is a bound that moves within its tolerance, so the tolerance must be below the step's effect
    def norm(w: Tensor) -> Tensor:
        return sh.spectral_norm(OPERATORS[name](w), rtol=1e-6)

    if name.startswith("lattice"):
        value = norm(weight)
        (gradient,) = torch.autograd.grad(value, weight)
        direction = random(3, 2, 3, 3, seed=5)
        with torch.no_grad():
            h = 1e-3
            difference = (norm(weight + h * direction) - norm(weight - h * direction)) / (2 * h)
        assert float((gradient * direction).sum()) == pytest.approx(float(difference), abs=2e-2, rel=2e-2)
        # ‖A‖ is homogeneous of degree one
        assert float((gradient * weight.detach()).sum()) == pytest.approx(float(value.detach()), rel=1e-6)
    else:
        assert torch.autograd.gradcheck(norm, weight, eps=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "circular", "zeros", "reflect"])
def test_gradcheck_of_singular_values(name: str) -> None:
    weight = random(3, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: sh.singular_values(OPERATORS[name](w)).square().sum(), weight)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_gradient_does_not_change_the_value(name: str) -> None:
    weight = random(3, 2, 3, 3)
    plain = sh.spectral_norm(OPERATORS[name](weight))
    assert not plain.requires_grad
    assert torch.equal(plain, sh.spectral_norm(OPERATORS[name](weight.clone().requires_grad_())).detach())


def test_gradient_in_bfloat16_reaches_the_weight() -> None:
    weight = torch.nn.Parameter(random(3, 2, 3, 3).bfloat16())
    sh.spectral_norm(sh.ConvOperator(weight)).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert float((weight.grad * weight.detach()).sum()) == pytest.approx(
        float(sh.spectral_norm(sh.ConvOperator(weight.detach()))), rel=2e-2
    )


# -- mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", OPERATORS)
def test_norms_of_non_finite_weights_are_refused(name: str, bad: float) -> None:
    weight = random(3, 2, 3, 3)
    weight[1, 1, 1, 1] = bad
    with pytest.raises(ValueError, match="`weight` contains NaN or infinity"):
        sh.spectral_norm(OPERATORS[name](weight))


@pytest.mark.parametrize("name", ["dense", "circular", "zeros", "reflect"])
@pytest.mark.parametrize("k", [None, 1])
def test_singular_values_of_non_finite_weights_are_refused(name: str, k: int | None) -> None:
    weight = random(3, 2, 3, 3)
    weight[1, 1, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="`weight` contains NaN or infinity"):
        sh.singular_values(OPERATORS[name](weight), k)


@pytest.mark.parametrize("rtol", [0, -1e-3, 1e-7, 1, 2.0, float("nan")])
def test_bad_rtol(rtol: float) -> None:
    with pytest.raises(ValueError, match=r"`rtol`.*got"):
        sh.spectral_norm(sh.DenseOperator(torch.eye(2)), rtol=rtol)


@pytest.mark.parametrize("k", [0, -1, 4, 1.5, "all"])
def test_bad_k(k) -> None:
    with pytest.raises(ValueError, match="`k` must be an int from 1 to 3"):
        sh.singular_values(sh.DenseOperator(torch.ones(3, 5)), k)


def test_singular_values_of_the_lattice_are_a_continuum() -> None:
    with pytest.raises(ValueError, match="input_size"):
        sh.singular_values(sh.ConvOperator(torch.ones(1, 1, 3)))


@pytest.mark.parametrize(
    "op",
    [
        sh.DenseOperator(torch.empty(3, 3, device="meta")),
        sh.ConvOperator(torch.empty(3, 3, 3, device="meta")),
        sh.ConvOperator(torch.empty(3, 3, 3, device="meta")).circular(5),
        sh.ConvOperator(torch.empty(3, 3, 3, device="meta"), input_size=5),
    ],
    ids=["dense", "lattice", "circular", "zeros"],
)
def test_meta_device(op: sh.LinearOperator) -> None:
    with pytest.raises(ValueError, match="meta device"):
        sh.spectral_norm(op)
    if op.is_finite:
        with pytest.raises(ValueError, match="meta device"):
            sh.singular_values(op)


# -- determinism ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_deterministic_and_leaves_the_random_state_alone(name: str) -> None:
    weight = random(3, 2, 3, 3)
    state = torch.get_rng_state()
    first = sh.spectral_norm(OPERATORS[name](weight))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(17)
    assert torch.equal(first, sh.spectral_norm(OPERATORS[name](weight)))


@pytest.mark.parametrize("shape", MATRICES)
def test_matrix_norm(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    assert float(sh.spectral_norm(sh.DenseOperator(weight))) == pytest.approx(
        float(torch.linalg.matrix_norm(weight, ord=2)), rel=1e-12
    )


def test_chunks_of_one_frequency_are_complex_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the grid is cut for memory, the union is the same."""
    torch.manual_seed(0)
    op = sh.ConvOperator(torch.randn(3, 2, 3, 3, dtype=torch.float64), padding=1).circular((4, 5))
    whole = sh.singular_values(op)
    monkeypatch.setattr("spectral_hooks.linalg.memory.STREAMED", 1)
    torch.testing.assert_close(sh.singular_values(op), whole, rtol=0, atol=1e-12)


def test_autocast_changes_nothing() -> None:
    """A precision plugin may measure and project inside autocast."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(40, 40, 3, padding=1, padding_mode="circular", bias=False)
    weight = conv.weight.detach()
    for op in (sh.ConvOperator(weight), sh.ConvOperator(weight).circular(6), sh.DenseOperator(weight.flatten(1))):
        plain = sh.spectral_norm(op)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sh.spectral_norm(op), plain)
            torch.testing.assert_close(sh.projections.clip(op, 0.9 * float(plain)).norm(), op.weight.norm(), rtol=0.1, atol=0)


# -- wide layers: above `lanczos.SMALL` channels norms are found by Krylov steps, not by eigenvalue solvers --------------


def by_full_svd(weight: Tensor, points: int) -> float:
    """The largest norm of the symbol on a grid, by a full SVD at every frequency."""
    symbols = torch.fft.fft2(weight.double(), (points, points)).permute(2, 3, 0, 1)
    return float(torch.linalg.matrix_norm(symbols[: points // 2 + 1], 2).max())


@pytest.mark.parametrize("kind", ["random", "flat", "one peak", "rank one"])
def test_wide_convolutions(kind: str) -> None:
    """Certified on the lattice, exact on circles of any size, at 40 channels."""
    torch.manual_seed(2)
    weight = torch.randn(40, 48, 3, 3) / 20
    if kind == "flat":
        weight = torch.zeros(40, 40, 3, 3)
        weight[:, :, 1, 1] = torch.linalg.qr(torch.randn(40, 40)).Q
        weight[:20, :, 0, 1] = weight[:20, :, 1, 1]
        weight[:20, :, 1, 1] = 0
    elif kind == "one peak":
        weight = weight + torch.ones(40, 48, 3, 3) / 20
    elif kind == "rank one":
        weight = torch.einsum("o,i,x,y->oixy", torch.randn(40), torch.randn(48), torch.randn(3), torch.randn(3))
    op = sh.ConvOperator(weight, padding=1)
    for rtol in (1e-2, 1e-3):
        assert by_full_svd(weight, 48) <= float(sh.spectral_norm(op, rtol=rtol)) <= by_full_svd(weight, 64) * (1 + rtol + 2.5e-3)
    for size in (5, 16, 40):
        norm = float(sh.spectral_norm(op.circular(size)))
        assert norm == pytest.approx(by_full_svd(weight, size), rel=3e-6)
        assert norm == pytest.approx(float(sh.spectral_norm(op.with_weight(weight.double()).circular(size))), rel=3e-6)


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (120, 120)])
def test_wide_matrices(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    exact = float(torch.linalg.matrix_norm(weight, 2))
    assert float(sh.spectral_norm(sh.DenseOperator(weight))) == pytest.approx(exact, rel=1e-10)
    clipped = sh.projections.clip(sh.DenseOperator(weight), exact / 2)
    values = torch.linalg.svdvals(weight).clamp(max=exact / 2)
    torch.testing.assert_close(torch.linalg.svdvals(clipped), values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-4])
def test_the_search_ends_on_clipped_kernels(rtol: float) -> None:
    """Their largest singular value is attained on a whole region."""
    for seed, shape in enumerate([(3, 8, 3, 3), (3, 3, 4, 4), (8, 4, 7), (2, 2, 2, 2, 2)]):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        op = sh.ConvOperator(weight, stride=1 + seed % 2)
        inside = op.with_weight(sh.projections.clip(op, 1.0))
        assert 0.99 <= float(sh.spectral_norm(inside, rtol=rtol)) <= 1 + rtol


def test_gradients_where_the_kernel_is_zero() -> None:
    """A zero kernel has a finite gradient; outer taps that are zero have the gradient that their neighbours have."""
    zero = torch.zeros(3, 2, 3, 3, requires_grad=True)
    sh.spectral_norm(sh.ConvOperator(zero)).backward()
    assert torch.isfinite(zero.grad).all()

    torch.manual_seed(0)
    weight = torch.zeros(2, 2, 3, dtype=torch.float64)
    weight[..., 1] = torch.randn(2, 2, dtype=torch.float64)
    weight[..., 0] = 0.1 * torch.randn(2, 2, dtype=torch.float64)
    weight.requires_grad_()
    norm = sh.spectral_norm(sh.ConvOperator(weight), rtol=1e-6)
    norm.backward()
    with torch.no_grad():
        moved = weight + 1e-5 * weight.grad
        risen = sh.spectral_norm(sh.ConvOperator(moved), rtol=1e-6) - norm
    assert weight.grad[..., 2].abs().max() > 0.01
    assert float(risen) == pytest.approx(1e-5 * float(weight.grad.square().sum()), rel=0.05)


def test_threads_are_left_as_they_were() -> None:
    """Small kernels are measured on one thread; the setting is back afterwards, also when the kernel is refused."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        kernel = random(1, 6, 5, 3, 3)
        for norm in (lattice_norm, lambda k: grid_norm(k, (5, 4)), lambda k: surely_below(k, 1.0)):
            norm(kernel)
            assert torch.get_num_threads() == 2
            with pytest.raises(ValueError, match="NaN"):
                norm(kernel * float("nan"))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [72, 130])
def test_circular_norm_of_few_frequencies_in_float32_is_that_of_the_blocks(size: int) -> None:
    """Frequencies whose norms nearly agree must not be taken for each other: the largest wins."""
    for name, kernel in {"random": random(size, size + 3, 3, 3), "smooth": smooth(size, size - 2, 3, 3)}.items():
        op = sh.ConvOperator(kernel.float(), padding=1).circular((5, 6))
        blocks = torch.fft.fft2(kernel.float().double(), (5, 6)).movedim((2, 3), (0, 1))
        exact = float(torch.linalg.svdvals(blocks).max())
        assert float(sh.spectral_norm(op)) == pytest.approx(exact, rel=2e-6), name


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_norms_where_float32_products_are_less(precision: str) -> None:
    """TF32 or bfloat16 inside would make certificates and winners wrong."""
    weight = torch.randn(96, 80, 3, 3, generator=torch.Generator().manual_seed(0))
    op = sh.ConvOperator(weight)
    norms = [float(sh.spectral_norm(op)), float(sh.spectral_norm(op.circular((6, 6))))]
    gram = Gram(weight.double()[None])
    assert gram.single().dtype == torch.complex64
    torch.set_float32_matmul_precision(precision)
    try:
        assert gram.single().dtype == torch.complex128  # also on processors that have no faster products
        assert norms == pytest.approx([float(sh.spectral_norm(op)), float(sh.spectral_norm(op.circular((6, 6))))], rel=1e-3)
        symbols = torch.fft.fft2(weight.double(), s=(6, 6)).movedim((0, 1), (-2, -1))
        assert norms[1] == pytest.approx(float(torch.linalg.matrix_norm(symbols, 2).amax()), rel=1e-6)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("patience", [0, 12], ids=["decomposition", "krylov"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(150, 130), (120, 200)], ids=str)
def test_the_norm_of_a_clipped_matrix_and_its_gradient(
    shape: tuple[int, int], dtype: torch.dtype, patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly equal singular values, whose vectors no Krylov method tells apart: any of them will do."""
    monkeypatch.setattr(krylov, "_PATIENCE", patience)
    random = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    u, s, vh = torch.linalg.svd(random, full_matrices=False)
    matrix = ((u * (1 - torch.linspace(0, 1e-4, len(s), dtype=torch.float64))) @ vh).requires_grad_()
    norm = krylov.matrix_norm(matrix)
    assert float(norm.detach()) == pytest.approx(1, abs=1e-10)
    norm.backward()
    values = torch.linalg.svdvals(matrix.grad)
    torch.testing.assert_close(values[:2], torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert float((matrix.grad.conj() * matrix.detach()).sum().real) == pytest.approx(1, abs=1e-10)


# -- what the search may leave out ------------------------------------------------------------------------------------------


def rotations(angle: float, pairs: int, dims: int, noise: float = 0.0) -> Tensor:
    """`I + R exp(-i Σ θ)` with rotations `R`: norms `2 |cos((Σ θ ± angle) / 2)|`, two for every pair of channels."""
    c, s = torch.cos(torch.tensor(angle)).item(), torch.sin(torch.tensor(angle)).item()
    kernel = torch.zeros(2 * pairs, 2 * pairs, *[2] * dims, dtype=torch.float64)
    kernel[(..., *[0] * dims)] = torch.eye(2 * pairs, dtype=torch.float64)
    rotation = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    kernel[(..., *[1] * dims)] = torch.block_diag(*[rotation] * pairs)
    return kernel + noise * random(*kernel.shape)


def band_pass(channels: int, taps: int, dims: int, seed: int) -> Tensor:
    """Channels with peaks of nearly one height at frequencies of their own, mixed."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.zeros(channels, channels, *[taps] * dims, dtype=torch.float64)
    times = torch.arange(taps, dtype=torch.float64)
    for i in range(channels):
        wave = torch.ones(1, dtype=torch.float64)
        for frequency, phase in (6.3 * torch.rand(dims, 2, generator=generator, dtype=torch.float64)).tolist():
            wave = (wave.unsqueeze(-1) * torch.cos(frequency * times + phase)).reshape(-1)
        wave = wave.reshape([taps] * dims)
        peak = torch.fft.fftn(wave, s=[256] * dims).abs().max()
        kernel[i, i] = wave / peak * (1 + 1e-4 * i / channels)
    mixing = torch.linalg.qr(random(channels, channels, seed=seed)).Q
    return torch.einsum("ij,j...->i...", mixing, kernel.flatten(1)).reshape(kernel.shape)


PEAKED = {
    **{f"rotations-{pairs}-{angle}": rotations(angle, pairs, 1) for pairs in (4, 13, 20) for angle in (0.13, 0.45, 2.0)},
    "rotations-2d": rotations(0.45, 13, 2),
    "rotations-disturbed": rotations(0.45, 13, 1, 1e-5),
    **{f"band-pass-{channels}-1d": band_pass(channels, 5, 1, channels) for channels in (8, 26, 40)},
    "band-pass-2d": band_pass(28, 3, 2, 0),
}


@pytest.mark.parametrize("name", PEAKED)
def test_the_largest_norm_on_a_grid_is_found_wherever_the_supremum_is(name: str) -> None:
    """Circular norms are exact, and what bounds them does not fall below: a grid that misses the supremum has another maximum."""
    kernel = PEAKED[name]
    dims = kernel.ndim - 2
    for size in (7, 16, 20, 33, 48, 97, 200) if dims == 1 else (16, 31, 40):
        symbols = torch.fft.fftn(kernel, s=(size,) * dims, dim=tuple(range(2, kernel.ndim))).flatten(2).movedim(-1, 0)
        true = float(torch.linalg.matrix_norm(symbols, 2).max())
        found = grid_norm(kernel[None], (size,) * dims)
        assert true * (1 - 1e-9) <= found.value <= true * (1 + 1e-12), size
        assert true * (1 - 1e-13) <= found.upper <= true * (1 + 1e-8), size
        op = sh.ConvOperator(kernel).circular(size)
        assert float(sh.spectral_norm(op)) >= true * (1 - 1e-9)
        assert float(sh.spectral_norm(sh.ConvOperator(kernel.float()).circular(size))) >= true * (1 - 2e-6)
        bound = float(sh.bounds.cosine_grid(op))
        assert bound >= true
    clipped = sh.projections.clip(sh.ConvOperator(kernel).circular(20), 1.0)
    symbols = torch.fft.fftn(clipped, s=(20,) * dims, dim=tuple(range(2, kernel.ndim))).flatten(2).movedim(-1, 0)
    assert float(torch.linalg.matrix_norm(symbols, 2).max()) <= 1 + 1e-9


def test_fine_grids_take_fewer_tests_than_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of the torus judge many frequencies at once."""
    factors = 0
    factorize = cholesky._factorize

    def counted(rows, level, rounding):
        nonlocal factors
        factors += rows.number
        return factorize(rows, level, rounding)

    monkeypatch.setattr(cholesky, "_factorize", counted)
    grid_norm(smooth(40, 40, 3, 3)[None], (96, 96))
    assert factors <= 96**2 / 2 / 4


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4, 4, 3, 3), (40, 40, 3), (8, 20, 2, 2, 2), (3, 1, 5, 5), (4, 3)], ids=str)
def test_groups_that_are_zero(shape: tuple[int, ...], groups: int) -> None:
    """All of them, or some: their norm is zero, every bound holds, and there is nothing to divide by."""
    for nonzero in range(groups + 1):
        kernel = random(groups, *shape)
        kernel[nonzero:] = 0
        sizes = (6,) * (len(shape) - 2)
        assert lattice_norm(kernel).upper == pytest.approx(max(lattice_norm(part[None]).upper for part in kernel), rel=2e-3)
        for each in (lattice_norms(kernel, 1e-2), grid_norms(kernel, sizes)):
            assert bool((each[nonzero:] == 0).all())
            assert bool((each[:nonzero] > 0).all())
        for goal in (1e-300, 1e-3, 1e3):
            for proven in (lattice_norms(kernel, 1e-2, goal) <= goal, surely_below(kernel, goal)):
                assert bool(proven[nonzero:].all())
                assert bool(proven[:nonzero].all()) == (goal == 1e3 or nonzero == 0)
            assert (lattice_norm(kernel, 1e-2, goal).upper <= goal) == (goal == 1e3 or nonzero == 0)


def test_projections_of_zero_groups_change_nothing() -> None:
    for groups, channels in ((1, 4), (2, 4), (4, 4), (2, 64)):
        weight = torch.zeros(channels, channels // groups, 3, 3)
        for op in (sh.ConvOperator(weight, groups=groups), sh.ConvOperator(weight, groups=groups).circular(6)):
            assert torch.equal(sh.projections.clip(op, 1.0), weight)
            assert torch.equal(sh.projections.rescale(op, 1e-3), weight)
            assert float(sh.spectral_norm(op)) == 0


def test_taps_of_every_group_are_brought_together() -> None:
    """One entry per group, each elsewhere: a matrix after all; its singular values are the same in any case."""
    weight = torch.zeros(9, 1, 3, 3, 2, dtype=torch.float64)
    weight[0, 0, 0, 0, 0] = weight[4, 0, 2, 2, 1] = weight[8, 0, 1, 0, 1] = 1.7
    kernel, axes = trim(sh.ConvOperator(weight, groups=3).canonical())
    assert axes == []
    assert kernel.shape == (3, 3, 1)
    assert float(sh.spectral_norm(sh.ConvOperator(weight, groups=3))) == pytest.approx(1.7, rel=1e-9)
    kernel = random(3, 2, 2, 2, 3)
    shifted = torch.zeros(3, 2, 2, 5, 5, dtype=torch.float64)
    for group, (row, column) in enumerate(((0, 0), (3, 2), (1, 1))):
        shifted[group, :, :, row : row + 2, column : column + 3] = kernel[group]
    assert torch.equal(trim(shifted)[0], kernel)
    torch.testing.assert_close(lattice_norms(shifted, 1e-3), lattice_norms(kernel, 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 4, 3, 3), (40, 40, 3, 3), (12, 7, 5), (3, 3, 3, 3, 2)], ids=str)
def test_flat_spectra_are_proven_by_lags(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orthogonal kernel with the bound as its norm, or a little above, is inside, and stays as it is bit for bit."""
    kernel = flat(*shape).to(dtype)
    evaluations = 0
    combine = Gram._combine

    def counted(self, even, odd, group, theta):
        nonlocal evaluations
        evaluations += len(group)
        return combine(self, even, odd, group, theta)

    monkeypatch.setattr(Gram, "_combine", counted)
    for bound in (1.0, 1.0005):
        for groups in (1, 2):
            op = sh.ConvOperator(torch.cat([kernel] * groups), groups=groups)
            assert sh.projections.clip(op, bound) is op.weight
            assert groups > 1 or evaluations == 0
        evaluations = 0
    outside = sh.ConvOperator(kernel * 1.00001)
    assert not torch.equal(sh.projections.clip(outside, 1.0), outside.weight)


@pytest.mark.parametrize("shape", [(4, 4, 3, 3), (10, 6, 3, 3), (30, 30, 3)], ids=str)
def test_extents_hold_all_eigenvalues(shape: tuple[int, ...]) -> None:
    """And nearly flat spectra need few cells, since no eigenvalue is small."""
    for noise in (0.0, 1e-8, 1e-4, 1e-2, 0.1, 1.0):
        kernel = torch.stack([flat(*shape), random(*shape, seed=3)]) + noise * random(2, *shape, seed=2)
        kernel = kernel / kernel.abs().flatten(1).amax(1).reshape(-1, *[1] * len(shape))
        low, high = Gram(kernel).extent()
        sizes = (48,) * (len(shape) - 2)
        symbols = torch.fft.fftn(kernel, s=sizes, dim=tuple(range(3, kernel.ndim))).flatten(3).movedim(-1, 0)
        values = torch.linalg.svdvals(symbols).square()
        assert bool((low <= values[..., -1].amin(0)).all())
        assert bool((high >= values[..., 0].amax(0)).all())
        if noise < 0.01:
            assert float(high[0]) <= float(values[:, 0, 0].max()) * (1 + 200 * noise + 1e-10)
        norm = float(values[:, 0, 0].max().sqrt())
        goal = norm * (1 + 1e-4)
        if noise <= 1e-4:
            assert lattice_norm(kernel[:1], 1e-3, goal).upper == goal
        found = lattice_norm(kernel[:1], 1e-6)
        assert norm * (1 - 1e-12) <= found.upper <= found.value * (1 + 1e-6) * (1 + 1e-9)
