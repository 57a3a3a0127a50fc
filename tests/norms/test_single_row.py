"""Symbols with a single row: suprema and proofs against sampled symbols, at a cost that grows like the taps."""

from __future__ import annotations

from math import inf

import pytest
import torch
from torch import Tensor

import spectral_hooks as sh
from spectral_hooks.linalg import gram as gram_module
from spectral_hooks.linalg import symbols
from spectral_hooks.norms import single_row
from spectral_hooks.norms.grid import grid_norm
from spectral_hooks.norms.groups import grid_norms, lattice_norms
from spectral_hooks.norms.lattice import lattice_norm, surely_below
from spectral_hooks.norms.proofs import certificates
from spectral_hooks.norms.single_row import Row, suprema

#: `(groups, rows, columns, *taps)`
SHAPES = [
    (6, 1, 1, 3, 3),
    (3, 1, 1, 15, 15),
    (2, 1, 4, 7, 5),
    (4, 3, 1, 9),
    (1, 1, 1, 31),
    (2, 1, 3, 3, 4, 3),
    (3, 1, 1, 1, 6),
    (40, 1, 1, 2, 2),
]


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Gaussian, with groups of very different size and one that is zero."""
    kernel = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sizes = torch.tensor([1.0, 1e-3, 40.0, 0.0]).double().repeat(len(kernel))[: len(kernel)]
    return kernel * sizes.reshape(-1, *[1] * (kernel.ndim - 1))


def box(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """All of one sign: the supremum is at frequency zero, and nowhere else."""
    return random(shape, seed).abs()


def clipped(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """At the norm in whole regions."""
    kernel = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    groups, rows = shape[:2]
    op = sh.ConvOperator(kernel.flatten(0, 1), groups=groups)
    return sh.projections.clip(op, 0.5 * float(sh.spectral_norm(op))).unflatten(0, (groups, rows))


def one_entry(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A single entry per group, each at a place of its own: flat spectra."""
    kernel = torch.zeros(shape, dtype=torch.float64).flatten(1)
    places = torch.randint(kernel.shape[1], (len(kernel),), generator=torch.Generator().manual_seed(seed))
    kernel[torch.arange(len(kernel)), places] = 1.7
    return kernel.reshape(shape)


KINDS = [random, box, clipped, one_entry]


def sampled(kernel: Tensor, points: int) -> Tensor:
    """The largest norms of the groups on a grid, by FFT."""
    axes = tuple(range(3, kernel.ndim))
    values = torch.fft.fftn(kernel, s=(points,) * len(axes), dim=axes)
    return values.abs().square().sum((1, 2)).flatten(1).amax(1).sqrt()


POINTS = {1: 4096, 2: 256, 3: 40}


@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_brackets_hold_and_are_as_narrow_as_asked(shape: tuple[int, ...], kind) -> None:
    kernel = kind(shape)
    points = POINTS[len(shape) - 3]
    true = sampled(kernel, points)
    # between the points of the grid there is more, by the cosine factor at most
    factor = 1.0
    for k in shape[3:]:
        factor /= torch.cos(torch.tensor(torch.pi * (k - 1) / (2 * points), dtype=torch.float64))
    for rtol in (1e-3, 3e-2):
        found = lattice_norms(kernel, rtol)
        assert bool((found >= true * (1 - 1e-12)).all())
        assert bool((found <= true * float(factor) * (1 + rtol) * (1 + 1e-12)).all())
        of_all = lattice_norm(kernel, rtol)
        assert float(true.max()) * (1 - 1e-12) <= of_all.upper <= of_all.value * (1 + rtol) * (1 + 1e-9)
        # the value is attained at the frequency that is named
        block = symbols.symbol(kernel[of_all.group : of_all.group + 1], of_all.theta[None])
        assert float(torch.linalg.vector_norm(block)) == pytest.approx(of_all.value, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_proven_is_so_and_what_has_room_is_proven(shape: tuple[int, ...], kind) -> None:
    kernel = kind(shape)
    true, close = sampled(kernel, POINTS[len(shape) - 3]), lattice_norms(kernel, 1e-4)
    top = float(true.max())
    for share in (0.5, 0.999, 1.0, 1.002, 1.05, 2.0):
        goal = share * top
        for proven in (lattice_norms(kernel, 1e-3, goal) <= goal, surely_below(kernel, goal)):
            assert not bool((proven & (true > goal * (1 + 1e-12))).any())
        assert bool((lattice_norms(kernel, 1e-3, goal) <= goal)[close * 1.001 < goal].all())
        assert bool(surely_below(kernel, goal)[close * 1.5 < goal].all())
        pace, depth = torch.full_like(true, 0.01), torch.full_like(true, 0.05)
        estimate, most = certificates(kernel / goal, pace, depth)
        assert bool((most >= true / goal * (1 - 1e-12)).all())
        assert bool((most <= 1)[close < 0.9 * goal].all())
        assert bool((estimate <= close / goal * (1 + 1e-9))[most < inf].all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_largest_on_a_grid(shape: tuple[int, ...]) -> None:
    kernel = random(shape)
    for points in (1, 2, 7, 24):
        sizes = (points,) * (len(shape) - 3)
        theta, _ = symbols.half_plane(sizes, kernel)
        blocks = symbols.symbol(kernel, theta)
        expected = torch.linalg.matrix_norm(blocks, 2).amax(0)
        torch.testing.assert_close(grid_norms(kernel, sizes), expected, rtol=1e-9, atol=1e-12 * float(expected.max()))
        found = grid_norm(kernel, sizes)
        assert found.value == pytest.approx(float(expected.max()), rel=1e-9)
        assert float(expected.max()) <= found.upper * (1 + 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_single_frequencies_are_those_of_a_grid(shape: tuple[int, ...]) -> None:
    kernel = random(shape)
    row = Row(kernel)
    axes = [torch.rand(3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) * 6 for i in range(len(shape) - 3)]
    theta = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    together = row.on_grid(slice(None), axes).flatten(1)
    for repeats in (1, 20):  # few of a group, and many
        group = torch.arange(len(kernel)).repeat_interleave(repeats * len(theta))
        single = row.at(group, theta.repeat(len(kernel) * repeats, 1)).unflatten(0, (len(kernel), repeats, -1))
        expected = together.unsqueeze(1).expand_as(single)
        torch.testing.assert_close(single, expected, rtol=0, atol=2 * float(row.error.max()))


def evaluations(monkeypatch: pytest.MonkeyPatch, run) -> tuple[int, int]:
    """Frequencies of grids, and single ones, that a call evaluates; and no more bytes than allowed at once."""
    on_grid, at = 0, 0
    grid, single = Row.on_grid, Row.at

    def counted_grid(self, groups, axes):
        nonlocal on_grid
        values = grid(self, groups, axes)
        assert values.shape[1] == 1 or 16 * values.numel() * self.kernel.shape[1] <= single_row._CHUNK_BYTES
        on_grid += values.numel()
        return values

    def counted_single(self, group, theta):
        nonlocal at
        at += len(group)
        return single(self, group, theta)

    with monkeypatch.context() as patch:
        patch.setattr(Row, "on_grid", counted_grid)
        patch.setattr(Row, "at", counted_single)
        run()
    return on_grid, at


def test_large_depthwise_kernels_cost_less_than_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    """31×31 taps: no Gram polynomial of 1861 lags, and fewer frequencies than a grid of 1024²."""
    weight = torch.randn(8, 1, 31, 31, generator=torch.Generator().manual_seed(0)) / 31
    op = sh.ConvOperator(weight, padding=15, groups=8)
    monkeypatch.setattr(gram_module.Gram, "__init__", None)
    found: list[float] = []
    on_grid, at = evaluations(monkeypatch, lambda: found.append(float(sh.spectral_norm(op))))
    top = float(sampled(weight.double().unsqueeze(1), 1024).max())
    assert top <= found[0] <= top * 1.006
    assert on_grid <= 8 * 2**14
    assert at <= 8 * 2**12
    for bound in (sh.bounds.cosine_grid, sh.bounds.gram_iteration, sh.bounds.frobenius_grid):
        assert top <= float(bound(op)) <= 1.05 * top


def patches() -> Tensor:
    """The Haar transform of blocks of 2×2: an isometry, so that every frequency has norm one; the sum of its taps is 2."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2
    return torch.einsum("ia,jb->ijab", signs, signs).reshape(1, 1, 4, 2, 2)


def ridge() -> Tensor:
    """Of norm one all along two axes, at one frequency of the third: flat, and yet between far limits."""
    along = torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64) / (1.94 + 0.49 / 4.8) ** 0.5
    return patches().unsqueeze(-1) * along


def test_flat_regions_are_proven_on_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many cells are left the next tiling is evaluated as a whole, at a few operations for each of its frequencies."""
    found: list[Tensor] = []
    on_grid, at = evaluations(monkeypatch, lambda: found.append(suprema(ridge(), 3e-3).upper))
    assert 1 <= float(found[0]) <= 1.003 * (1 + 1e-12)
    assert on_grid > 3 * at


@pytest.mark.parametrize("ripple", [0.0, 1e-15, 1e-9, 1e-5, 1e-3])
def test_nearly_flat_everywhere_is_proven_by_the_coefficients(monkeypatch: pytest.MonkeyPatch, ripple: float) -> None:
    """To any width, and against any goal: cells small enough for that would be 1e9."""
    cube = torch.zeros(1, 1, 4, 2, 2, 2, dtype=torch.float64)
    cube[0, 0, torch.arange(4), [0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]] = torch.tensor([0.7, 0.45, 0.16, -0.17]).double()
    cube += ripple * torch.randn(cube.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kernel in (patches() * (1 + ripple), cube):
        theta = torch.rand(4096, kernel.ndim - 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 7
        values = symbols.symbol(kernel, theta).abs().square().sum((1, 2, 3))
        low, high = Row(kernel).extent
        assert float(low) <= float(values.min()) <= float(values.max()) <= float(high)
        assert float(high - low) <= 100 * ripple + 1e-10
        found: list[single_row.Suprema] = []
        on_grid, at = evaluations(monkeypatch, lambda kernel=kernel, found=found: found.append(suprema(kernel, 1e-6)))
        assert float(values.max().sqrt()) <= float(found[0].upper) <= float(found[0].value) * (1 + 1.001e-6)
        assert on_grid + at < 1 << 20


def test_goals_that_are_too_close_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_row, "_CLOSE_CALL_BUDGET", 1 << 12)
    found: list[Tensor] = []
    goal = torch.tensor([1 + 1e-7], dtype=torch.float64)
    on_grid, at = evaluations(monkeypatch, lambda: found.append(suprema(ridge(), 1e-3, goal).upper))
    assert bool(found[0] == inf)
    # some tilings until a whole one is too much, each eight times as large as the last
    assert on_grid / 8 + at <= 10 * single_row._CLOSE_CALL_BUDGET
