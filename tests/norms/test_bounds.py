"""Bounds: never below the norm, for every geometry, kernel, scale and precision; sharp where they should be; differentiable."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from math import cos, inf, pi, prod, sqrt

import pytest
import torch
from cases import BOUNDS, CONVS, FEW_CONVS, KERNELS, MATRICES, OPERATORS, Case, flat, random, smooth
from torch import Tensor

import spectral_hooks as sh
from spectral_hooks.norms import lattice
from spectral_hooks.operators import LinearOperator, padding

# functions have the names of their modules
kernel_gram = import_module("spectral_hooks.norms.bounds.kernel_gram")
gram_iteration = import_module("spectral_hooks.norms.bounds.gram_iteration")

PLAIN = [name for name in BOUNDS if "-" not in name]


def dense_norm(op: LinearOperator, ord: float = 2) -> float:
    return float(torch.linalg.matrix_norm(op.to_dense().double(), ord=ord))


def lattice_norm(op: LinearOperator) -> float:
    """From below, to 1e-4: a norm of the symbol."""
    return lattice.lattice_norm(op.canonical().double(), 1e-4).value


# -- never below ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_every_bound_of_every_geometry(case: Case) -> None:
    """`‖A‖ ≤ bound` for the finite operator and, with the lattice bound, for it too; in float32 as in float64."""
    names = BOUNDS if case in FEW_CONVS else PLAIN
    for dtype in (torch.float64, torch.float32):
        weight = case.layer().weight.detach().to(dtype)
        finite, infinite = case.operator(weight), case.operator(weight, finite=False)
        norm = dense_norm(finite.with_weight(weight.double()))
        for name in names:
            here, everywhere = BOUNDS[name](finite), BOUNDS[name](infinite)
            assert here.shape == everywhere.shape == ()
            assert here.dtype == everywhere.dtype == dtype
            assert float(here) >= norm * (1 - 1e-13), name
            assert float(everywhere) >= norm * (1 - 1e-13), name


@pytest.mark.parametrize("name", [name for name in KERNELS if not name.endswith("-wide")])
def test_every_bound_of_every_kernel_on_the_lattice(name: str) -> None:
    kernel, settings = KERNELS[name]
    for dtype in (torch.float64, torch.float32):
        op = sh.ConvOperator(kernel.to(dtype), **settings)
        norm = lattice_norm(op)
        for bound, function in BOUNDS.items():
            if kernel.ndim == 5 and "gram" in bound and bound not in PLAIN:
                continue
            value = float(function(op))
            assert value >= norm * (1 - 1e-13), bound
            assert torch.isfinite(torch.tensor(value)), bound


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("shape", MATRICES)
def test_matrices(name: str, shape: tuple[int, int]) -> None:
    for seed in range(3):
        weight = random(*shape, seed=seed)
        norm = float(torch.linalg.matrix_norm(weight, ord=2))
        for transposed in (False, True):
            assert float(BOUNDS[name](sh.DenseOperator(weight, transposed=transposed))) >= norm * (1 - 1e-14)


@pytest.mark.parametrize("name", BOUNDS)
def test_zero(name: str) -> None:
    for op in (
        sh.DenseOperator(torch.zeros(3, 4)),
        sh.ConvOperator(torch.zeros(3, 4, 3, 3), stride=2),
        sh.ConvOperator(torch.zeros(4, 1, 3), groups=4, padding=1, input_size=5),
    ):
        assert float(BOUNDS[name](op)) == 0
        weight = op.weight.clone().requires_grad_()
        value = BOUNDS[name](op.with_weight(weight))
        value.backward()
        assert float(value.detach()) == 0
        assert weight.grad is not None
        assert bool((weight.grad == 0).all())


@pytest.mark.parametrize("name", BOUNDS)
def test_one_group_or_tap_that_is_zero(name: str) -> None:
    weight = random(4, 2, 3, 3)
    weight[:2] = 0
    weight[:, :, 0, 0] = 0
    op = sh.ConvOperator(weight.requires_grad_(), groups=2)
    value = BOUNDS[name](op)
    assert float(value.detach()) >= lattice_norm(sh.ConvOperator(weight.detach(), groups=2))
    (gradient,) = torch.autograd.grad(value, weight)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[:2] == 0).all())


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_homogeneous(name: str, power: int) -> None:
    """`bound(2^p A) = 2^p bound(A)`, bit for bit."""
    kernel = random(3, 3, 3, 3)
    plain, scaled = (BOUNDS[name](sh.ConvOperator(kernel * factor)) for factor in (1.0, 2.0**power))
    assert float(scaled) == float(plain) * 2.0**power


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_never_takes_a_bound_below(name: str, scale: float, dtype: torch.dtype) -> None:
    """For stored weights of low precision, at the ends of the range too, against the float64 norm of what is stored."""
    for seed in range(4):
        weight = (random(3, 3, 2, 2, seed=seed) * scale).to(dtype)
        value = BOUNDS[name](sh.ConvOperator(weight))
        assert value.dtype == torch.float32
        assert float(value) >= lattice_norm(sh.ConvOperator(weight))
        matrix = weight.flatten(1)
        assert float(BOUNDS[name](sh.DenseOperator(matrix))) >= float(torch.linalg.matrix_norm(matrix.double(), ord=2))


@pytest.mark.parametrize("name", BOUNDS)
def test_cast_to_float32_is_above_the_bound_in_float64(name: str) -> None:
    for seed in range(10):
        stored = random(4, 3, 3, seed=seed).float()
        single, double = BOUNDS[name](sh.ConvOperator(stored)), BOUNDS[name](sh.ConvOperator(stored.double()))
        assert float(double) <= float(single) <= float(double) * (1 + 2**-22)


# -- how tight --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oversampling", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_cosine_bound_is_sharp_in_one_dimension(degree: int, oversampling: int) -> None:
    """`‖F(θ)‖ = |cos(degree (θ - θ*) / 2)|`, with its peak midway between two grid points, meets the bound with equality.

    A real kernel with that symbol: rotations by `degree · θ*` turn the peak of `1 + z^degree` away from zero.
    """
    points = oversampling * degree
    peak = pi / points
    turn = torch.tensor(
        [[cos(degree * peak), -sqrt(1 - cos(degree * peak) ** 2)], [sqrt(1 - cos(degree * peak) ** 2), cos(degree * peak)]]
    )
    kernel = torch.zeros(2, 2, degree + 1, dtype=torch.float64)
    kernel[:, :, 0] = torch.eye(2) / 2
    kernel[:, :, degree] = turn.double() / 2
    op = sh.ConvOperator(kernel)
    assert lattice_norm(op) == pytest.approx(1, abs=2e-4)
    factor = 1 / cos(pi * degree / (2 * points))
    # both signs of the peak count, so the grid must miss the mirrored one too: it does, it lies midway as well
    grid = torch.arange(points, dtype=torch.float64) * 2 * pi / points
    on_grid = torch.linalg.matrix_norm(
        kernel[:, :, 0] + kernel[:, :, degree] * torch.exp(-1j * degree * grid)[:, None, None], ord=2
    ).max()
    assert float(sh.bounds.cosine_grid(op, oversampling=oversampling)) == pytest.approx(float(on_grid) * factor, rel=1e-7)
    assert float(on_grid) * factor == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("oversampling", "factor"), [(4, 1.1716), (8, 1.0396), (16, 1.0098)])
def test_cosine_bound_is_within_its_factor(oversampling: float, factor: float) -> None:
    for kernel in (random(4, 4, 3, 3), smooth(4, 4, 3, 3), flat(4, 4, 3, 3)):
        op = sh.ConvOperator(kernel)
        assert 1 <= float(sh.bounds.cosine_grid(op, oversampling=oversampling)) / lattice_norm(op) <= factor * 1.0001
    box = sh.ConvOperator(torch.ones(1, 1, 3, 3, dtype=torch.float64))  # its peak is on every grid
    assert float(sh.bounds.cosine_grid(box, oversampling=oversampling)) == pytest.approx(9 * factor, rel=1e-4)


@pytest.mark.parametrize("size", [(3, 3), (5, 4), (6, 6), (15, 40)])
def test_on_the_grid_of_a_circular_operator(size: tuple[int, int]) -> None:
    """Gram iteration converges to the norm of the operator itself, and the cosine bound needs no factor on coarse axes."""
    op = sh.ConvOperator(random(4, 3, 3, 3)).circular(size)
    norm = float(sh.spectral_norm(op))
    values = [float(sh.bounds.gram_iteration(op, steps=steps)) / norm for steps in (0, 2, 4, 8, 16)]
    assert all(a >= b for a, b in pairwise(values))
    assert 1 <= values[-1] < 1 + 1e-4
    for value, steps in zip(values, (0, 2, 4, 8, 16), strict=True):
        assert 1 <= value <= 3 ** (1 / 2 ** (steps + 2)) * (1 + 1e-9)
    factor = prod(1 if n <= 16 else 1 / cos(pi / 16) for n in size)
    assert 1 <= float(sh.bounds.cosine_grid(op)) / norm <= factor * (1 + 1e-9)
    frobenius = float(sh.bounds.frobenius_grid(op)) / norm
    assert 1 <= frobenius <= sqrt(3) * factor * (1 + 1e-9)


def test_exact_for_matrices_and_single_taps() -> None:
    matrix = random(5, 4)
    norm = float(torch.linalg.matrix_norm(matrix, ord=2))
    tap = torch.zeros(5, 4, 3, 3, dtype=torch.float64)
    tap[:, :, 2, 0] = matrix
    operators = [sh.DenseOperator(matrix), sh.ConvOperator(matrix[:, :, None]), sh.ConvOperator(tap)]
    for op in operators:
        for name in ("cosine_grid", "gram_iteration-20", "tap_sum"):
            assert float(BOUNDS[name](op)) == pytest.approx(norm, rel=1e-5)
    for op in operators[:2]:
        assert float(sh.bounds.unfolding(op)) == pytest.approx(norm, rel=1e-9)
    assert float(sh.bounds.frobenius_grid(operators[2])) == pytest.approx(float(torch.linalg.matrix_norm(matrix)), rel=1e-9)
    patches = sh.ConvOperator(random(4, 3, 2, 2), stride=2)
    assert float(sh.bounds.cosine_grid(patches)) == pytest.approx(float(sh.estimates.reshaped_norm(patches)), rel=1e-9)


@pytest.mark.parametrize("kind", [random, smooth], ids=lambda f: f.__name__)
def test_kernel_gram_falls_towards_the_norm(kind: Callable[..., Tensor]) -> None:
    op = sh.ConvOperator(kind(6, 4, 3, 3))
    norm = lattice_norm(op)
    values = [float(sh.bounds.kernel_gram(op, steps=steps)) / norm for steps in (1, 2, 3, 4, 5)]
    assert all(a >= b * (1 - 1e-12) and b >= 1 for a, b in pairwise(values))
    assert values[-1] < 1.05


def test_kernel_gram_of_an_orthogonal_kernel() -> None:
    """Every power of `A Aᵀ` is the identity: what is left is the room for rounding, which grows with the length of the powers."""
    for kernel in (flat(4, 4, 3, 3), flat(6, 4, 5), flat(2, 2, 2, 2, 2)):
        for steps in (1, 2, 3, 4):
            assert 1 <= float(sh.bounds.kernel_gram(sh.ConvOperator(kernel), steps=steps)) <= 1 + 1e-11


def direct_kernel_gram(kernel: Tensor, steps: int) -> float:
    """By convolutions, `(n, m, k, k)`."""
    power = torch.nn.functional.conv2d(kernel, kernel, padding=kernel.shape[-1] - 1)
    for _ in range(steps - 1):
        power = torch.nn.functional.conv2d(power, power, padding=power.shape[-1] - 1)
    return float(power.abs().sum((1, 2, 3)).max()) ** (0.5**steps)


@pytest.mark.parametrize("kind", [random, smooth, flat], ids=lambda f: f.__name__)
@pytest.mark.parametrize("channels", [(32, 40), (40, 33), (70, 64)], ids=str)
@pytest.mark.parametrize("memory", [1 << 18, 1 << 21, None], ids=str)
def test_kernel_gram_of_wide_kernels(kind, channels, memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, and in blocks of every size: not below the formula in float64, and not far above."""
    if memory is not None:
        monkeypatch.setattr(kernel_gram, "_PANEL_BYTES", memory)
        monkeypatch.setattr(kernel_gram, "_BLOCK_BYTES", memory // 4)
    kernel = kind(*channels, 3, 3)
    panels = []

    def spectra(*args):
        panels.append(plain(*args))
        return panels[-1]

    plain = kernel_gram._spectra
    monkeypatch.setattr(kernel_gram, "_spectra", spectra)
    value = float(sh.bounds.kernel_gram(sh.ConvOperator(kernel), steps=3))
    if memory is not None:  # unless a single row takes more
        assert all(panel.nbytes <= memory or 1 in panel.shape[-2:] for panel in panels)
    expected = direct_kernel_gram(kernel if channels[0] < channels[1] else kernel.transpose(0, 1), 3)
    assert expected <= value <= expected * (1 + 1e-3)


def test_kernel_gram_does_not_use_float32_where_its_products_are_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, with 16 bits of precision or less, no bound of the rounding would hold."""
    seen = []
    plain = kernel_gram._row_sums
    monkeypatch.setattr(kernel_gram, "_row_sums", lambda *args: seen.append(args[2]) or plain(*args))
    op = sh.ConvOperator(random(40, 40, 3, 3))
    before = torch.get_float32_matmul_precision()
    values = []
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            values.append(float(sh.bounds.kernel_gram(op, steps=3)))
            values.append(float(sh.bounds.gram_iteration(op)))
    finally:
        torch.set_float32_matmul_precision(before)

    def mixed() -> str:
        raise RuntimeError("You have used mix of the legacy and new APIs to set the matmul precision.")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert float(sh.bounds.kernel_gram(op, steps=3)) == values[2]
    assert seen.pop() == torch.float64
    assert seen == [torch.float32, torch.float64, torch.float64]
    assert values[2:4] == values[4:6]
    assert values[2] <= values[0]
    assert values[1] == pytest.approx(values[3], rel=1e-14)


@pytest.mark.parametrize("name", PLAIN)
def test_autocast_changes_nothing(name: str) -> None:
    for op in (sh.ConvOperator(random(40, 36, 3, 3).float()), sh.DenseOperator(random(70, 90).float())):
        plain = BOUNDS[name](op)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(BOUNDS[name](op), plain)


@pytest.mark.parametrize("shape", [(40, 36, 3, 3), (33, 48, 4)], ids=str)
def test_gradient_of_wide_powers(shape: tuple[int, ...]) -> None:
    weight = random(*shape).requires_grad_()
    direction = random(*shape, seed=3)
    for name in ("kernel_gram", "gram_iteration"):
        value = BOUNDS[name](sh.ConvOperator(weight))
        (gradient,) = torch.autograd.grad(value, weight)
        assert float((gradient * weight.detach()).sum()) == pytest.approx(float(value.detach()), rel=1e-3)
        h = 1e-5
        with torch.no_grad():
            ends = [float(BOUNDS[name](sh.ConvOperator(weight + sign * h * direction))) for sign in (1, -1)]
        assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
@pytest.mark.parametrize("kind", [random, smooth, flat], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(36, 40, 3, 3), (5, 3, 4), (70, 70)], ids=str)
def test_gram_iteration_looks_at_all_that_matter(kind, shape: tuple[int, ...], steps: int, monkeypatch) -> None:
    """Against the formula at every frequency; with frequencies in one part and in many."""
    kernel = kind(*shape) if len(shape) > 2 else random(*shape)
    op = sh.ConvOperator(kernel).circular((9,) * (len(shape) - 2)) if len(shape) > 2 else sh.DenseOperator(kernel)
    blocks = torch.fft.fftn(kernel, s=(9,) * (len(shape) - 2), dim=tuple(range(2, len(shape)))) if len(shape) > 2 else kernel
    blocks = blocks.movedim((0, 1), (-2, -1)).reshape(-1, *shape[:2])
    scale = float(torch.linalg.matrix_norm(blocks).max())
    powers = blocks @ blocks.mH / scale**2
    for _ in range(steps):
        powers = powers @ powers
    expected = scale * float(torch.linalg.matrix_norm(powers).max()) ** (0.5 ** (steps + 1))
    for memory in (1 << 27, 1 << 19, 1):
        monkeypatch.setattr("spectral_hooks.linalg.memory.STREAMED", memory)
        assert float(sh.bounds.gram_iteration(op, steps=steps)) == pytest.approx(expected, rel=1e-9)


def test_gram_iteration_where_the_symbol_all_but_vanishes() -> None:
    """The frequencies of a circular operator can all be next to zeros of the symbol."""
    for tiny in (0.0, 1e-12, 1e-17, 1e-200):
        kernel = torch.tensor([1.0, -1.0 + 1e-13], dtype=torch.float64).expand(2, 2, 2) * 1.0
        kernel = torch.cat([kernel, torch.full((2, 2, 1), tiny, dtype=torch.float64)], -1)
        op = sh.ConvOperator(kernel).circular(1)
        assert 0 <= dense_norm(op) * (1 - 1e-2) <= float(sh.bounds.gram_iteration(op)) <= 1e-11


def test_kernel_gram_equals_the_convolutions() -> None:
    """The formula, with the convolutions carried out."""
    kernel = random(2, 3, 3)
    power = torch.nn.functional.conv1d(kernel, kernel, padding=2)  # (2, 2, 5), the kernel of A Aᵀ
    for steps in (1, 2, 3):
        size = power.shape[-1]
        expected = float(power.abs().sum((1, 2)).max()) ** (0.5**steps)
        assert float(sh.bounds.kernel_gram(sh.ConvOperator(kernel), steps=steps)) == pytest.approx(expected, rel=1e-9)
        power = torch.nn.functional.conv1d(power.transpose(0, 1), power.flip(-1), padding=size - 1).transpose(0, 1)


def test_closed_forms() -> None:
    """A box kernel of non-negative entries attains the absolute sums, the taps and the unfolding."""
    for dims in (1, 2, 3):
        op = sh.ConvOperator(torch.ones(1, 1, *[3] * dims, dtype=torch.float64))
        for bound in (sh.bounds.tap_sum, sh.bounds.unfolding, sh.bounds.absolute_sum):
            assert float(bound(op)) == pytest.approx(3**dims, rel=1e-10)
    eye = sh.ConvOperator(torch.eye(4, dtype=torch.float64)[:, :, None, None] * torch.tensor([3.0]))
    assert float(sh.bounds.frobenius_grid(eye)) == pytest.approx(6, rel=1e-10)


def test_unfolding_is_the_smallest_of_four() -> None:
    kernel = random(4, 3, 3, 2)
    four = [
        kernel.flatten(1),
        kernel.permute(0, 2, 1, 3).reshape(4 * 3, 3 * 2),
        kernel.permute(0, 3, 1, 2).reshape(4 * 2, 3 * 3),
        kernel.transpose(0, 1).flatten(1),
    ]
    expected = sqrt(6) * min(float(torch.linalg.matrix_norm(matrix, ord=2)) for matrix in four)
    assert float(sh.bounds.unfolding(sh.ConvOperator(kernel))) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_l1_and_l_infinity_norms(case: Case) -> None:
    """Bounds of the operator norms of every geometry; attained where the input is large and padded with zeros."""
    weight = case.layer().weight.detach()
    for op in (case.operator(weight), case.operator(weight, finite=False)):
        for ord in (1, inf):
            bound = float(sh.bounds.absolute_sum(op, order=ord))
            assert bound >= dense_norm(case.operator(weight), ord) * (1 - 1e-12), ord


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2}, {"groups": 2}, {"dilation": 2}, {"transposed": True, "stride": 2}], ids=str
)
def test_l1_and_l_infinity_norms_are_exact_on_the_lattice(settings: dict) -> None:
    channels = (4, 2) if "groups" in settings else (4, 3)
    weight = random(*channels, 3, 3)
    large = sh.ConvOperator(weight, padding=2, input_size=13, **settings)
    for ord in (1, inf):
        bound = float(sh.bounds.absolute_sum(sh.ConvOperator(weight, **settings), order=ord))
        assert bound == pytest.approx(dense_norm(large, ord), rel=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_l1_and_l_infinity_norms_of_matrices(transposed: bool) -> None:
    op = sh.DenseOperator(random(4, 7), transposed=transposed)
    for ord in (1, inf):
        assert float(sh.bounds.absolute_sum(op, order=ord)) == pytest.approx(dense_norm(op, ord), rel=1e-12)


def test_known_order() -> None:
    """On a random kernel the cosine bound beats the unfoldings, they the Frobenius norm, it the taps."""
    op = sh.ConvOperator(random(16, 16, 3, 3))
    names = ("cosine_grid", "kernel_gram", "unfolding", "frobenius_grid", "tap_sum", "absolute_sum")
    values = [float(BOUNDS[name](op)) for name in names]
    assert values == sorted(values)


# -- padding ----------------------------------------------------------------------------------------------------------------


def padding_map(mode: str, size: int, before: int, after: int) -> Tensor:
    return padding.pad(torch.eye(size, dtype=torch.float64), mode, ((before, after),)).T


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (0, 2), (1, 1), (1, 2), (2, 2), (3, 3), (1, 4), (5, 4)], ids=str)
def test_padding_is_the_norm_of_the_padding_map(mode: str, pair: tuple[int, int]) -> None:
    """At every size exactly; without one the supremum over those that torch allows, attained at one of them."""
    kernel = random(1, 1, 2)
    least = max(pair) + 1 if mode == "reflect" else 1
    norms = []
    for size in range(max(least, 2 - sum(pair)), 16):
        op = sh.ConvOperator(kernel, padding=(pair,), padding_mode=mode, input_size=size)
        norms.append(float(torch.linalg.matrix_norm(padding_map(mode, size, *pair), ord=2)))
        assert float(sh.padding_factor(op)) == pytest.approx(norms[-1], rel=1e-12)
    unsized = sh.ConvOperator(kernel, padding=(pair,), padding_mode=mode)
    assert float(sh.padding_factor(unsized)) == pytest.approx(max(norms), rel=1e-12)


def test_padding_in_closed_form() -> None:
    kernel = random(1, 1, 3, 3)
    square = {"zeros": 1, "circular": 1, "reflect": 9, "replicate": 9}
    for mode, expected in square.items():
        assert float(sh.padding_factor(sh.ConvOperator(kernel, padding=1, padding_mode=mode))) ** 2 == pytest.approx(expected)
    # the taps reach so far that the two sides never meet
    wide = sh.ConvOperator(random(1, 1, 7), padding=1, padding_mode="reflect")
    assert float(sh.padding_factor(wide)) ** 2 == pytest.approx(2)
    assert float(sh.padding_factor(sh.DenseOperator(random(2, 2)))) == 1


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("k", "stride", "dilation", "amount"), [(3, 1, 1, 1), (3, 1, 1, 2), (2, 1, 1, 2), (3, 2, 1, 1), (3, 2, 2, 2), (1, 1, 1, 1)]
)
def test_bounds_without_a_size_hold_at_every_size(mode: str, k: int, stride: int, dilation: int, amount: int) -> None:
    weight = random(3, 2, k)
    settings = {"stride": stride, "dilation": dilation, "padding": amount, "padding_mode": mode}
    unsized = sh.ConvOperator(weight, **settings)
    bounds = {name: float(BOUNDS[name](unsized)) for name in PLAIN}
    for size in range(1, 12):
        try:
            op = sh.ConvOperator(weight, input_size=size, **settings)
        except ValueError:
            continue
        norm = dense_norm(op)
        assert all(bound >= norm for bound in bounds.values()), size


def test_reflect_padding_exceeds_the_lattice_norm() -> None:
    """The factor is no decoration."""
    op = sh.ConvOperator(torch.ones(1, 1, 3, dtype=torch.float64), padding=1, padding_mode="reflect", input_size=3)
    assert dense_norm(op) > lattice_norm(sh.ConvOperator(op.weight)) * 1.05


# -- gradients --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("name", PLAIN)
def test_gradcheck(name: str, op: str) -> None:
    weight = random(3, 2, 3, 3)
    if name == "cosine_grid" and op == "dense":
        weight = weight + 0.1
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: BOUNDS[name](OPERATORS[op](w)), weight, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("ord", [1, inf])
def test_gradcheck_of_absolute_sums(ord: float) -> None:
    weight = random(3, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: sh.bounds.absolute_sum(sh.ConvOperator(w, stride=2), order=ord), weight)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_gradient_does_not_change_the_value(name: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight = random(3, 2, 3, 3).to(dtype)
        plain = BOUNDS[name](sh.ConvOperator(weight))
        assert not plain.requires_grad
        leaf = weight.clone().requires_grad_()
        value = BOUNDS[name](sh.ConvOperator(leaf))
        assert torch.equal(plain, value.detach())
        value.backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        # Euler: a bound is homogeneous of degree one
        assert float((leaf.grad.double() * weight.double()).sum()) == pytest.approx(float(plain), rel=2e-2)


@pytest.mark.parametrize("name", PLAIN)
def test_gradient_at_taps_that_are_zero(name: str) -> None:
    """Outer taps that are zero still have a gradient: the bound moves when they do."""
    if name in ("unfolding", "tap_sum", "absolute_sum"):
        pytest.skip("not differentiable there, or with another support")
    weight = random(3, 2, 3)
    weight[..., 0] = 0
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(BOUNDS[name](sh.ConvOperator(weight)), weight)
    assert bool((gradient[..., 0] != 0).any())


@pytest.mark.parametrize("name", ["cosine_grid", "unfolding", "tap_sum"])
def test_gradient_of_a_wide_layer(name: str) -> None:
    """Top vectors by the matrix-free method."""
    weight = random(130, 110, 2).requires_grad_()
    value = BOUNDS[name](sh.ConvOperator(weight))
    (gradient,) = torch.autograd.grad(value, weight)
    assert float((gradient * weight.detach()).sum()) == pytest.approx(float(value.detach()), rel=1e-6)
    direction = random(130, 110, 2, seed=3)
    h = 1e-4
    with torch.no_grad():
        ends = [float(BOUNDS[name](sh.ConvOperator(weight + sign * h * direction))) for sign in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-2, abs=1e-3)


# -- mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [1, 0.5, 0, -2, inf, float("nan"), "8", None, True])
@pytest.mark.parametrize("bound", [sh.bounds.cosine_grid, sh.bounds.frobenius_grid, sh.bounds.gram_iteration])
def test_bad_oversampling(bound, bad) -> None:
    with pytest.raises(ValueError, match=r"`oversampling`.*got"):
        bound(sh.DenseOperator(torch.eye(2)), oversampling=bad)


@pytest.mark.parametrize(
    ("bound", "bad"), [(sh.bounds.gram_iteration, -1), (sh.bounds.gram_iteration, 1.5), (sh.bounds.kernel_gram, 0)]
)
def test_bad_steps(bound, bad) -> None:
    with pytest.raises(ValueError, match=r"`steps`.*got"):
        bound(sh.DenseOperator(torch.eye(2)), steps=bad)


@pytest.mark.parametrize("bad", [0, 3, "fro", None])
def test_bad_ord(bad) -> None:
    with pytest.raises(ValueError, match=r"`order`.*got"):
        sh.bounds.absolute_sum(sh.DenseOperator(torch.eye(2)), order=bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", BOUNDS)
def test_non_finite_weights_are_refused(name: str, bad: float) -> None:
    weight = random(3, 2, 3, 3)
    weight[1, 1, 1, 1] = bad
    with pytest.raises(ValueError, match="`weight` contains NaN or infinity"):
        BOUNDS[name](sh.ConvOperator(weight))


@pytest.mark.parametrize("name", BOUNDS)
def test_meta_device(name: str) -> None:
    with pytest.raises(ValueError, match="meta device"):
        BOUNDS[name](sh.ConvOperator(torch.empty(3, 3, 3, device="meta")))


@pytest.mark.parametrize("name", BOUNDS)
def test_deterministic_and_leaves_the_random_state_alone(name: str) -> None:
    op = sh.ConvOperator(random(3, 2, 3, 3))
    state = torch.get_rng_state()
    first = BOUNDS[name](op)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(17)
    assert torch.equal(first, BOUNDS[name](op))
