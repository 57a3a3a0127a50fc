"""Projections: the promise `norm ≤ max_norm`, and how near the original the result stays."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from cases import FEW_CONVS, KEEPING, MATRICES, Case, apply_to_identity, resized
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_hooks as sh
from spectral_hooks import projections
from spectral_hooks.norms import groups as groups_of
from spectral_hooks.norms.grid import grid_norm
from spectral_hooks.norms.lattice import lattice_norm
from spectral_hooks.projections import dual, frequencies

projection = pytest.mark.parametrize("project", KEEPING.values(), ids=KEEPING)


def dense_norm(op: sh.LinearOperator, weight: Tensor) -> float:
    """The norm of the stored values, from the dense matrix, in float64."""
    return float(torch.linalg.matrix_norm(op.with_weight(weight.detach().double()).to_dense(), ord=2))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def loud(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight of the case's shape, far outside the unit ball."""
    weight = case.layer().weight.detach()
    return (weight * (4 / weight.norm())).to(dtype)


# -- the promise ------------------------------------------------------------------------------------------------------------


@projection
@pytest.mark.parametrize("case", [c for c in FEW_CONVS if c.mode in ("zeros", "circular")], ids=str)
def test_lattice_projection_holds_at_every_size(case: Case, project) -> None:
    weight = loud(case)
    op = case.operator(weight, finite=False)
    inside = project(op, 0.7)
    assert inside.shape == weight.shape
    layer = case.layer()
    layer.weight.data = inside.double()
    for more in (0, 1, 3) if len(case.size) < 3 else (0, 1):
        size = tuple(n + more for n in case.size)
        norm = float(torch.linalg.matrix_norm(apply_to_identity(layer, resized(case, size).in_shape), ord=2))
        assert norm <= 0.7 * (1 + 1e-6), size
    assert torch.equal(project(op.with_weight(inside), 0.7), inside)


@projection
@pytest.mark.parametrize("case", FEW_CONVS, ids=str)
def test_finite_projection_holds_at_its_size(case: Case, project) -> None:
    """Zero padding, the layer's own circular, reflect and replicate padding."""
    op = case.operator(loud(case))
    inside = project(op, 0.7)
    assert dense_norm(op, inside) <= 0.7 * (1 + 1e-6)
    assert torch.equal(project(op.with_weight(inside), 0.7), inside)


@projection
@pytest.mark.parametrize("case", FEW_CONVS, ids=str)
def test_circular_projection_holds_at_its_size(case: Case, project) -> None:
    op = case.operator(loud(case), finite=False).circular(case.size)
    inside = project(op, 0.7)
    assert dense_norm(op, inside) <= 0.7 * (1 + 1e-6)
    assert torch.equal(project(op.with_weight(inside), 0.7), inside)


@projection
@pytest.mark.parametrize("shape", MATRICES)
def test_matrix_projection(shape: tuple[int, int], project) -> None:
    torch.manual_seed(0)
    op = sh.DenseOperator(torch.randn(shape) * 3)
    inside = project(op, 0.7)
    assert dense_norm(op, inside) <= 0.7 * (1 + 1e-6)
    assert torch.equal(project(op.with_weight(inside), 0.7), inside)


def finite_and_lattice(case: Case, weight: Tensor) -> list[sh.ConvOperator]:
    lattice = case.operator(weight, finite=False)
    return [case.operator(weight), lattice.circular(case.size), *([lattice] if case.mode in ("zeros", "circular") else [])]


@projection
@pytest.mark.parametrize("case", FEW_CONVS[::3], ids=str)
def test_inside_comes_back_bit_for_bit(case: Case, project) -> None:
    weight = loud(case)
    for op in finite_and_lattice(case, weight):
        bound = 1.01 * float(sh.spectral_norm(op))
        assert torch.equal(project(op, bound), weight)


@pytest.mark.parametrize("rounds", [1, 3, 10])
@pytest.mark.parametrize("case", FEW_CONVS, ids=str)
def test_clip_is_never_farther_than_rescale(case: Case, rounds: int) -> None:
    weight = loud(case, torch.float64)
    for op in finite_and_lattice(case, weight):
        clipped, scaled = projections.clip(op, 0.7, rounds=rounds), projections.rescale(op, 0.7)
        assert distance(clipped, weight) <= distance(scaled, weight) * (1 + 1e-9)


#: Operators from a weight, of every kind that takes another way, and the shape of the weight.
KINDS = {
    "matrix": (sh.DenseOperator, (6, 9)),
    "lattice": (partial(sh.ConvOperator, padding=1), (4, 3, 3, 3)),
    "groups": (partial(sh.ConvOperator, stride=2, groups=2), (4, 2, 3)),
    "patches": (partial(sh.ConvOperator, stride=2), (4, 2, 2, 2)),
    "circular": (partial(sh.ConvOperator, padding=1, padding_mode="circular", input_size=6), (4, 3, 3, 3)),
    "seam": (partial(sh.ConvOperator, stride=2, padding=1, padding_mode="circular", input_size=5), (4, 3, 3)),
    "zero-padded": (partial(sh.ConvOperator, padding=1, input_size=5), (4, 3, 3, 3)),
    "zero-padded groups": (partial(sh.ConvOperator, padding=1, groups=2, input_size=5), (4, 2, 3, 3)),
}
kinds = pytest.mark.parametrize("kind", KINDS)

GUARANTEED = (projections.clip, projections.rescale, projections.band, projections.polar, projections.soft_cap)
OTHERS = (projections.hammer, partial(projections.soft_cap, strength=0.1), projections.parseval, projections.clipped_decay)


def norm_of(op: sh.LinearOperator, weight: Tensor, scale: float) -> float:
    """The norm of a weight over `scale`, from a dense matrix; a lattice operator's on a circle."""
    op = op.with_weight(weight.double() / scale)
    return float(torch.linalg.matrix_norm((op if op.is_finite else op.circular(12)).to_dense(), ord=2))


@kinds
@pytest.mark.parametrize(("dtype", "powers"), [(torch.float32, (-118, -76, 60, 122)), (torch.float64, (-990, -600, 520, 1010))])
def test_projections_scale_with_the_bound(kind: str, dtype: torch.dtype, powers: tuple[int, ...]) -> None:
    """`P(t W, t c) = t P(W, c)` for a power of two, to rounding, although squares of the entries leave the range."""
    make, shape = KINDS[kind]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    bound = 0.6 * norm_of(make(weight), weight, 1.0)
    for project in (*GUARANTEED, *OTHERS):
        plain = project(make(weight), bound)
        for power in powers:
            scaled = project(make(torch.ldexp(weight.double(), torch.tensor(power)).to(dtype)), bound * 2.0**power)
            # not bit for bit: the room that is left for rounding is larger near the smallest numbers
            off = float((scaled.double() * 2.0**-power - plain.double()).abs().max())
            assert off <= 4 * torch.finfo(dtype).eps * float(plain.abs().max()), (project, power)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [0.1, 0.9, 0.999])
def test_entries_at_the_largest_number_stay_finite(kind: str, dtype: torch.dtype, share: float) -> None:
    """Clipping lets entries grow, here beyond what the dtype can hold."""
    make, shape = KINDS[kind]
    largest = torch.finfo(dtype).max
    weight = torch.full(shape, largest, dtype=dtype)
    weight.view(-1)[1::5] *= -1
    op, scale = make(weight), float(largest)
    bound = share * norm_of(op, weight, scale)
    for project in (*GUARANTEED, *OTHERS):
        found = project(op, bound * scale)
        assert bool(torch.isfinite(found).all()), project
        assert project in OTHERS or norm_of(op, found, scale) <= bound * (1 + 1e-6), project
    moved, scaled = (distance(p(op, bound * scale) / 2, weight / 2) for p in (projections.clip, projections.rescale))
    assert moved <= scaled


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_values_obey_bounds_among_the_smallest_numbers(kind: str, dtype: torch.dtype) -> None:
    """Rounding is as large as the entries there; where nothing else fits, zeros do."""
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    spacing = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for size in (1.0, 40 * spacing):
        op = make((torch.randn(shape, dtype=torch.float64) * size).to(dtype))
        for multiple in (0.3, 1.5, 7.0, 100.0):
            for project in (projections.clip, projections.rescale):
                found = project(op, multiple * spacing)
                assert norm_of(op, found, spacing) <= multiple * (1 + 1e-6)
                assert multiple > 1 or not found.any()


@pytest.mark.parametrize("power", [-74, -60, 0, 60])
def test_a_large_matrix_that_is_inside_stays_at_every_scale(power: int) -> None:
    """Of rank one, whose squares underflow: no power step may see it outside."""
    weight = torch.full((384, 384), 1.1 * 2.0**power)
    bound = 1.05 * 384 * 1.1 * 2.0**power
    assert projections.clip(sh.DenseOperator(weight), bound) is weight
    assert not torch.equal(projections.clip(sh.DenseOperator(weight), 0.9 * bound), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["matrix", "patches", "lattice"])
def test_rounding_does_not_take_a_clip_farther_than_scaling(kind: str, dtype: torch.dtype) -> None:
    make, shape = KINDS[kind]
    for seed in range(6 if kind == "lattice" else 20):  # one of a lattice costs several of the others
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for share in (0.999, 0.99, 0.9):
            op = make(weight)
            bound = share * float(sh.spectral_norm(op))
            clipped, scaled = (distance(project(op, bound), weight) for project in (projections.clip, projections.rescale))
            assert clipped <= scaled, (seed, share)


FLAT = {
    "square": torch.nn.Conv2d(4, 4, 3, padding=1, bias=False),
    "more outputs": torch.nn.Conv2d(3, 6, 3, padding=1, bias=False),
    "strided": torch.nn.Conv2d(4, 8, 4, stride=2, padding=1, bias=False),
    "one axis": torch.nn.Conv1d(5, 5, 5, padding=2, bias=False),
    "wide": torch.nn.Conv2d(12, 12, 3, padding=1, bias=False),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_spectrum_that_is_inside_by_the_width_of_the_certificate_stays(name: str) -> None:
    """All singular values are one, so that no frequency is told from another; and the plateau that a clip leaves is as flat."""
    torch.manual_seed(0)
    layer = sh.remove_spectral(sh.parametrizations.orthogonal(copy.deepcopy(FLAT[name])))
    op = sh.as_operator(layer)
    width = 1e-3 if op.weight.shape[0] <= 8 else 2e-3
    peak = float(sh.spectral_norm(op.with_weight(op.weight.detach()), rtol=1e-4))
    for project in (projections.clip, projections.rescale):
        assert torch.equal(project(op, peak * (1 + width)), op.weight)
        once = project(op, 0.8)
        assert torch.equal(project(op.with_weight(once), 0.8 * (1 + width)), once)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 3, 3), (4, 0, 3, 3)], ids=str)
def test_weights_without_entries_are_left_alone(shape: tuple[int, ...]) -> None:
    weight = torch.empty(shape, requires_grad=True)
    make = sh.DenseOperator if len(shape) == 2 else sh.ConvOperator
    norm = sh.spectral_norm(make(weight))
    norm.backward()
    assert float(norm) == 0
    for project in (*GUARANTEED, *OTHERS):
        assert project(make(weight), 1.0).shape == shape


def test_hooks_skip_no_layer_because_another_is_empty() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of an initialization without entries
        model = torch.nn.Sequential(torch.nn.Linear(0, 5), torch.nn.Linear(5, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sh.SpectralClip(0.5).attach(model, optimizer)
    for _ in range(2):
        model(torch.zeros(2, 0)).square().sum().backward()
        optimizer.step()
        assert float(torch.linalg.matrix_norm(model[1].weight.detach().double(), 2)) <= 0.5 * (1 + 1e-6)


class _Largest(TorchDispatchMode):
    """The most entries that any tensor had that an operation made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            self.entries = max(self.entries, one.numel() if isinstance(one, Tensor) else 0)
        return made


@pytest.mark.parametrize(("channels", "groups"), [((1, 1), 1), ((2, 3), 1), ((4, 1), 4)])
def test_many_taps_cost_like_the_frequencies_and_not_times_the_taps(channels: tuple[int, int], groups: int) -> None:
    kernel = torch.randn(channels[0], channels[1], 21, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    op = sh.ConvOperator(kernel, groups=groups)
    symbols = torch.fft.fft2(kernel, s=(128, 128)).movedim((-2, -1), (0, 1)).flatten(0, 1)
    symbols = symbols.unflatten(1, (groups, -1))
    level = 0.5 * float(torch.linalg.matrix_norm(symbols, 2).max())
    with _Largest() as largest:
        clipped, _ = dual.clip_kernel(op, op.canonical(), level, 3)
    fine = (2 * 6 * 20) ** 2
    assert largest.entries <= 2 * fine * kernel[..., 0, 0].numel()
    found = torch.fft.fft2(clipped, s=(480, 480)).permute(3, 4, 0, 1, 2)
    assert float(torch.linalg.matrix_norm(found, 2).max()) <= 1.02 * level


@pytest.mark.parametrize("taps", [(11,), (6, 5), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (1, 1, 4)], ids=str)
def test_both_transforms_clip_alike(shape: tuple[int, ...], taps: tuple[int, ...], monkeypatch) -> None:
    """An FFT for many taps, a matrix product for few."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(*shape, *taps, generator=generator, dtype=torch.float64)
    op = sh.ConvOperator(kernel.flatten(0, 1), groups=shape[0])
    found = []
    for few in (0, 10**6):
        monkeypatch.setattr(frequencies, "_FEW_TAPS", few)
        found.append(projections.clip(op, 2.0, rounds=4))
        found.append(projections.band(op, 2.0, min_norm=1.0))
    # the norm between frequencies is found to a few parts in a million only
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], found[3], rtol=0, atol=1e-9)


def test_numbers_of_numpy_are_numbers() -> None:
    op = sh.DenseOperator(torch.diag(torch.tensor([3.0, 0.5])))
    for number in (np.float32(1), np.float64(1), np.int64(1)):
        assert torch.equal(projections.clip(op, number, rounds=np.int64(3)), projections.clip(op, 1.0))


def test_more_rounds_come_nearer() -> None:
    torch.manual_seed(0)
    op = sh.ConvOperator(torch.randn(6, 6, 3, 3, dtype=torch.float64))
    one, five, many = (distance(projections.clip(op, 2.0, rounds=r), op.weight) for r in (1, 5, 40))
    assert one > five > many


# -- matrices: exactly min(σ, c) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [*MATRICES, (40, 40), (64, 9)])
def test_matrix_clip_is_the_nearest(shape: tuple[int, int], transposed: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    bound = float(s.median()) * 0.9
    clipped = projections.clip(sh.DenseOperator(weight, transposed=transposed), bound)
    torch.testing.assert_close(torch.linalg.svdvals(clipped), s.clamp(max=bound), rtol=0, atol=2e-6 * float(s[0]))
    torch.testing.assert_close(clipped, u @ torch.diag(s.clamp(max=bound)) @ vh, rtol=0, atol=2e-6 * float(s[0]))


def test_matrix_clip_of_a_prescribed_spectrum() -> None:
    """Large condition numbers, values equal to the bound and repeated ones, small ones untouched."""
    torch.manual_seed(0)
    values = torch.tensor([1e4, 30.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.5, 1e-4, 0.0], dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(n, 10, dtype=torch.float64)).Q for n in (14, 12))
    weight = u @ torch.diag(values) @ v.T
    clipped = projections.clip(sh.DenseOperator(weight), 1.0)
    torch.testing.assert_close(torch.linalg.svdvals(clipped)[:10], values.clamp(max=1.0), rtol=0, atol=5e-6)
    torch.testing.assert_close(clipped, u @ torch.diag(values.clamp(max=1.0)) @ v.T, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.9, 0.4, 1e-2, 3e-4])
@pytest.mark.parametrize("rest", [1e-1, 1e-3, 3e-5, 1e-6, 1e-8])
@pytest.mark.parametrize("shape", [(2, 5), (13, 9), (40, 40), (390, 400)], ids=str)
def test_matrix_clip_keeps_its_digits(shape: tuple[int, int], rest: float, share: float, dtype: torch.dtype) -> None:
    """One value far above the others, which stay: scaling, which is as near to rounding, would take them along."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, min(shape), generator=generator, dtype=torch.float64)).Q for n in shape)
    values = torch.linspace(0.5, 1, min(shape), dtype=torch.float64) * rest
    values[0] = 1.0
    weight = ((u * values) @ v.T).to(dtype)
    clipped = projections.clip(sh.DenseOperator(weight), share).double()
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    off = float(torch.linalg.matrix_norm(clipped - (u * s.clamp(max=share)) @ vh, ord=2))
    precision = max(torch.finfo(dtype).eps, 1e-10)
    assert off <= 5 * precision * share + 1e-9 * (dtype == torch.float64) * share
    scaled = projections.rescale(sh.DenseOperator(weight), share)
    assert distance(clipped, weight) <= distance(scaled, weight) + 5 * precision * float(clipped.norm())


@pytest.mark.parametrize("kernel_size", [(1, 1), (2, 2), (3, 1)])
def test_a_convolution_that_is_a_matrix_is_clipped_exactly(kernel_size: tuple[int, int]) -> None:
    """One tap after the polyphase form: a 1×1 kernel, and every kernel whose stride is its size (a patch embedding)."""
    torch.manual_seed(0)
    weight = torch.randn(6, 4, *kernel_size, dtype=torch.float64)
    clipped = projections.clip(sh.ConvOperator(weight, stride=kernel_size), 0.8)
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    torch.testing.assert_close(clipped.flatten(1), u @ torch.diag(s.clamp(max=0.8)) @ vh, rtol=0, atol=5e-6)


# -- accuracy in float32 ------------------------------------------------------------------------------------------------------

RATIOS = [1.0001, 1.5, 10.0, 100.0, 1000.0]


def spectrum(kind: str, ratio: float, size: int) -> Tensor:
    """Singular values up to `ratio` times the bound 1: over six decades, close to the bound, few above it, of low rank."""
    values = torch.logspace(-6, 0, size, dtype=torch.float64) * ratio
    if kind == "close":
        values = torch.linspace(0.99, 1.01, size, dtype=torch.float64)
    elif kind == "few":
        values = torch.linspace(0.01, 0.9, size, dtype=torch.float64)
    elif kind == "low rank":
        values = values * (torch.arange(size) % 5 == 4)
    return torch.cat([values[:-1], values.new_tensor([ratio])])


def with_spectrum(shape: tuple[int, int], values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q for n in shape)
    return ((u * values) @ v.T).float()


def check_accuracy(found: Tensor, weight: Tensor, bound: float = 1.0) -> None:
    """Of a float32 clip against the exact one of the stored values."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    reference = (u * s.clamp(max=bound)) @ vh
    assert found.dtype == torch.float32
    assert float(torch.linalg.matrix_norm(found.double(), ord=2)) <= bound * (1 + 1e-6)
    assert distance(found, reference) <= 1e-4 * float(reference.norm())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", ["wide", "close", "few", "low rank"])
@pytest.mark.parametrize("shape", [(60, 25), (25, 60), (50, 50)])
def test_float32_matrices(shape: tuple[int, int], kind: str, ratio: float) -> None:
    weight = with_spectrum(shape, spectrum(kind, ratio, min(shape)))
    check_accuracy(projections.clip(sh.DenseOperator(weight)), weight)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", ["wide", "few"])
@pytest.mark.parametrize("shape", [(400, 450), (450, 400)])
def test_float32_large_matrices(shape: tuple[int, int], kind: str, ratio: float) -> None:
    """From some size on few values above the bound are found by a Krylov method."""
    weight = with_spectrum(shape, spectrum(kind, ratio, min(shape)))
    check_accuracy(projections.clip(sh.DenseOperator(weight)), weight)


@projection
@pytest.mark.parametrize("power", [-90, 0, 70])
@pytest.mark.parametrize("shape", [(400, 390), (390, 400)])
def test_large_matrices_inside_stay(shape: tuple[int, int], power: int, project) -> None:
    """Squares of these entries are not all representable in float32."""
    weight = with_spectrum(shape, spectrum("few", 0.999, 390)) * 2.0**power
    assert torch.equal(project(sh.DenseOperator(weight), 2.0**power), weight)
    assert not torch.equal(project(sh.DenseOperator(weight), 0.99 * 2.0**power), weight)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 2])
def test_float32_convolutions_of_one_tap(kernel_size: int, circular: bool, ratio: float) -> None:
    """1×1 kernels and patch embeddings, on the lattice and on a circular grid."""
    weight = with_spectrum((24, 10 * kernel_size**2), spectrum("wide", ratio, min(24, 10 * kernel_size**2)))
    kernel = weight.unflatten(1, (10, kernel_size, kernel_size)).contiguous()
    op = sh.ConvOperator(kernel, stride=kernel_size)
    found = projections.clip(op.circular(4) if circular else op)
    check_accuracy(found.flatten(1), weight)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_float32_circular_convolutions_obey(stride: int, groups: int, ratio: float) -> None:
    torch.manual_seed(0)
    op = sh.ConvOperator(torch.randn(8, 6 // groups, 3, 3), stride=stride, padding=1, groups=groups).circular(8)
    bound = float(sh.spectral_norm(op)) / ratio
    for project in (projections.clip, projections.rescale):
        assert dense_norm(op, project(op, bound)) <= bound * (1 + 1e-6)


# -- groups: each an operator of its own --------------------------------------------------------------------------------------


def group_of(op: sh.ConvOperator, weight: Tensor, group: int) -> sh.ConvOperator:
    """One group of a convolution."""
    part = weight.unflatten(0, (op.groups, -1))[group]
    return sh.ConvOperator(part, op.stride, op.padding, dilation=op.dilation, transposed=op.transposed, input_size=op.input_size)


def grouped(groups: int, rows: int, columns: int, **settings) -> sh.ConvOperator:
    """Groups of norms from far inside to far outside of the unit ball."""
    generator = torch.Generator().manual_seed(groups)
    weight = torch.randn(groups, rows, columns, 3, 3, generator=generator)
    weight *= torch.logspace(-2, 0.5, groups)[torch.randperm(groups, generator=generator)].reshape(-1, 1, 1, 1, 1)
    return sh.ConvOperator(weight.flatten(0, 1), padding=1, groups=groups, **settings)


GROUPED = [
    grouped(24, 1, 1),
    grouped(5, 3, 4, stride=2),
    grouped(4, 4, 2, transposed=True, stride=2),
    grouped(3, 20, 18),
    grouped(4, 2, 2, input_size=6),
    grouped(6, 2, 1, dilation=2),
]


@projection
@pytest.mark.parametrize("op", GROUPED, ids=str)
def test_groups_are_projected_one_by_one(op: sh.ConvOperator, project) -> None:
    found = project(op, 0.5)
    inside = 0
    for group in range(op.groups):
        alone, part = group_of(op, op.weight, group), group_of(op, found, group).weight
        if torch.equal(project(alone, 0.5), alone.weight):
            inside += 1
            assert torch.equal(part, alone.weight)
        norm = float(sh.spectral_norm(alone.with_weight(part)))
        assert norm <= 0.5 * (1 + 3e-3)
        # as near as the group would have come by itself
        assert distance(part, alone.weight) <= distance(project(alone, 0.5), alone.weight) * (1 + 2e-2) + 1e-7
    assert 0 < inside < op.groups
    assert torch.equal(project(op.with_weight(found), 0.5), found)


@projection
def test_groups_on_a_circular_grid(project) -> None:
    op = grouped(6, 2, 3).circular((6, 5))
    found = project(op, 0.5)
    assert dense_norm(op, found) <= 0.5 * (1 + 1e-6)
    unchanged = [torch.equal(*pair) for pair in zip(found.chunk(6), op.weight.chunk(6), strict=True)]
    assert 0 < sum(unchanged) < 6
    assert torch.equal(project(op.with_weight(found), 0.5), found)


@pytest.mark.parametrize("taps", [(3, 3), (5,), (1, 4), (2, 2, 2), (1, 1)])
@pytest.mark.parametrize("channels", [(1, 1), (3, 2)])
def test_norms_of_many_groups_together(channels: tuple[int, int], taps: tuple[int, ...]) -> None:
    """As the norm of each group by itself, and no group is taken to be inside that is not."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(9, *channels, *taps, generator=generator, dtype=torch.float64)
    kernel *= torch.logspace(-8, 2, 9, dtype=torch.float64).reshape(-1, *(1,) * (kernel.ndim - 1))
    kernel[3] = 0
    singly = torch.tensor([lattice_norm(group, 1e-6).upper for group in kernel.split(1)], dtype=torch.float64)
    together = groups_of.lattice_norms(kernel, 1e-3)
    assert bool((together >= singly * (1 - 1.1e-6)).all())
    assert bool((together <= singly * (1 + 1.1e-3)).all())
    for goal in (0.5 * float(singly[5]), 1.01 * float(singly[5]), 1e-4 * float(singly[0]), 2 * float(singly.max())):
        proven = groups_of.lattice_norms(kernel, 1e-3, goal) == goal
        assert torch.equal(proven, singly <= goal)
    sizes = tuple(2 * k for k in taps)
    exact = torch.tensor([grid_norm(group, sizes).upper for group in kernel.split(1)], dtype=torch.float64)
    torch.testing.assert_close(groups_of.grid_norms(kernel, sizes), exact, rtol=1e-9, atol=1e-9 * float(exact.max()))


# -- convolutions: near the true projection ---------------------------------------------------------------------------------


def long_solve(weight: Tensor, bound: float, steps: int = 400, points: int = 24) -> Tensor:
    """The nearest kernel with `‖F(θ)‖ ≤ bound` on a fine grid, by Dykstra's alternating projections, then scaled inside."""
    taps = weight.shape[2:]
    full = torch.zeros(*weight.shape[:2], points, points, dtype=torch.float64)
    full[..., : taps[0], : taps[1]] = weight
    correction = torch.zeros_like(full)
    for _ in range(steps):
        symbols = torch.fft.rfft2(full + correction).permute(2, 3, 0, 1)
        u, s, vh = torch.linalg.svd(symbols, full_matrices=False)
        clipped = (u * s.clamp(max=bound).unsqueeze(-2)) @ vh
        ball = torch.fft.irfft2(clipped.permute(2, 3, 0, 1), s=(points, points))
        correction = full + correction - ball
        full = torch.zeros_like(ball)
        full[..., : taps[0], : taps[1]] = ball[..., : taps[0], : taps[1]]
    found = full[..., : taps[0], : taps[1]]
    norm = float(sh.spectral_norm(sh.ConvOperator(found), rtol=1e-5))
    return found * min(1.0, bound / norm)


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("channels", [(1, 1), (4, 4), (6, 3)])
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_five_rounds_are_near_the_true_projection(kind: str, channels: tuple[int, int], share: float) -> None:
    torch.manual_seed(1)
    weight = torch.randn(*channels, 3, 3, dtype=torch.float64)
    if kind == "smooth":
        bump = torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)
        weight = weight.abs() * bump[:, None] * bump + 0.1 * weight
    op = sh.ConvOperator(weight)
    bound = share * float(sh.spectral_norm(op))
    reference = distance(long_solve(weight, bound), weight)
    clipped = projections.clip(op, bound, rounds=5)
    assert float(sh.spectral_norm(op.with_weight(clipped), rtol=1e-5)) <= bound * (1 + 2e-5)
    assert distance(clipped, weight) <= 1.10 * reference


# -- dtypes and awkward weights ---------------------------------------------------------------------------------------------


@projection
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_stored_weight_obeys(dtype: torch.dtype, project) -> None:
    torch.manual_seed(0)
    wide = torch.randn(16, 16, 3, 3).to(dtype)
    ops = [
        sh.DenseOperator(torch.randn(24, 16).to(dtype)),
        sh.ConvOperator(wide[:8, :8].contiguous(), padding=1),
        sh.ConvOperator(wide[:, :1].contiguous(), padding=1, groups=16),
        sh.ConvOperator(wide[:4, :4].contiguous(), padding=1).circular(5),
        sh.ConvOperator(wide[:4, :4].contiguous(), padding=1, input_size=5),
    ]
    for op in ops:
        before = op.weight.clone()
        inside = project(op, 1.0)
        assert inside.dtype == dtype
        assert inside.device == op.weight.device
        assert inside.shape == op.weight.shape
        assert torch.equal(op.weight, before)
        finite = op if op.is_finite else sh.ConvOperator(op.weight, padding=1, groups=op.groups, input_size=9)
        assert dense_norm(finite, inside) <= 1 + 1e-6
        # not scaled away: low precision costs a little, not more
        assert float(sh.spectral_norm(op.with_weight(inside.double()))) >= 0.95
        assert torch.equal(project(op.with_weight(inside), 1.0), inside)


@projection
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 3, 3, 3),
        torch.ones(4, 3, 3, 3),
        torch.ones(1, 1, 3, 3),
        torch.ones(1, 5, 2, 4),
        torch.eye(4)[:, :, None, None].repeat(1, 1, 3, 3),
        torch.eye(4)[:, :, None, None] * 5,
        torch.full((2, 2, 3, 3), 1e-30),
        torch.full((2, 2, 3, 3), 1e30),
        torch.nn.functional.pad(torch.eye(3)[:, :, None, None] * 2, (0, 2, 2, 0)),
    ],
    ids=["zero", "rank-one", "one-channel", "even", "repeated", "one-tap", "tiny", "huge", "single-corner-tap"],
)
def test_awkward_kernels(weight: Tensor, project) -> None:
    op = sh.ConvOperator(weight, padding=1)
    inside = project(op, 1.0)
    norm = dense_norm(sh.ConvOperator(weight, padding=1, input_size=7), inside)
    assert norm <= 1 + 1e-6
    assert float(sh.spectral_norm(op.with_weight(inside))) >= min(0.99, 0.99 * float(sh.spectral_norm(op)))
    assert torch.equal(project(op.with_weight(inside), 1.0), inside)


def test_identity_of_all_shifts_is_scaled() -> None:
    """A flat spectrum of equal singular values has one nearest point: the scaled kernel."""
    weight = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    weight[range(3), range(3), [0, 1, 2], [2, 0, 1]] = 4.0
    torch.testing.assert_close(projections.clip(sh.ConvOperator(weight), 1.0), weight / 4, rtol=0, atol=2e-3)


def test_the_support_stays() -> None:
    """Shape of the kernel and the phases it lacks: a strided kernel comes back with its taps, nothing else."""
    torch.manual_seed(0)
    weight = torch.randn(3, 3, 3, 2)
    for settings in ({"stride": 2}, {"stride": 3, "dilation": 2}, {"stride": (1, 4), "transposed": True}):
        op = sh.ConvOperator(weight, **settings)
        clipped = projections.clip(op, 0.5)
        assert clipped.shape == weight.shape
        assert torch.equal(op.with_weight(clipped).from_canonical(op.with_weight(clipped).canonical()), clipped)


@projection
def test_no_gradient_and_no_alias_written(project) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4) * 9)
    before = weight.detach().clone()
    inside = project(sh.DenseOperator(weight), 1.0)
    assert not inside.requires_grad
    assert inside.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)
    assert weight.grad is None


@projection
def test_deterministic(project) -> None:
    torch.manual_seed(0)
    op = sh.ConvOperator(torch.randn(4, 4, 3, 3), padding=1, input_size=24)
    first = project(op, 0.5)
    torch.manual_seed(1)
    assert torch.equal(project(op, 0.5), first)


# -- mistakes ---------------------------------------------------------------------------------------------------------------


@projection
@pytest.mark.parametrize("bad", [0, 0.0, -1.0, float("nan"), float("inf"), True, "1", None])
def test_bad_max_norm(bad, project) -> None:
    with pytest.raises(ValueError, match="`max_norm` must be a positive, finite number; got"):
        project(sh.DenseOperator(torch.eye(2)), bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "3", None, True])
def test_bad_rounds(bad) -> None:
    with pytest.raises(ValueError, match="`rounds` must be a positive int; got"):
        projections.clip(sh.DenseOperator(torch.eye(2)), 1.0, rounds=bad)


@projection
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights(bad: float, project) -> None:
    weight = torch.randn(2, 2, 3, 3)
    weight[0, 1, 2, 2] = bad
    for op in (
        sh.DenseOperator(weight.flatten(1)),
        sh.ConvOperator(weight),
        sh.ConvOperator(weight).circular(5),
        sh.ConvOperator(weight, input_size=5),
    ):
        with pytest.raises(ValueError, match="NaN or infinity"):
            project(op, 1.0)


@projection
@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_reflect_padding_needs_an_input_size(mode: str, project) -> None:
    with pytest.raises(ValueError, match=rf"{mode} padding.*`input_size`"):
        project(sh.ConvOperator(torch.ones(2, 2, 3, 3), padding=1, padding_mode=mode), 1.0)


@projection
def test_meta_weights_are_refused(project) -> None:
    for op in (sh.DenseOperator(torch.empty(3, 3, device="meta")), sh.ConvOperator(torch.empty(3, 3, 3, device="meta"))):
        with pytest.raises(ValueError, match="meta device"):
            project(op, 1.0)
