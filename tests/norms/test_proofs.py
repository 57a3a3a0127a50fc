"""Certificates of many kernels at once: what is proven is so, and kernels with room are proven."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spectral_hooks.norms import proofs
from spectral_hooks.norms.proofs import certificates

SHAPES = [
    (3, 8, 6, 3, 3),
    (2, 5, 9, 3),
    (2, 4, 4, 2, 3, 2),
    (2, 34, 34, 3, 3),
    (6, 1, 1, 3, 3),
    (2, 3, 20, 7, 5),
    (2, 12, 9, 1, 3),
]
MATRICES = [(3, 8, 6), (2, 40, 50), (4, 1, 1), (2, 7, 7, 1, 1)]


def norms(kernels: Tensor) -> Tensor:
    """The norms of the groups, from below, by full SVDs on a grid."""
    axes = tuple(range(3, kernels.ndim))
    # estimates of symbols with a single row are nearly exact
    points = 160 if min(kernels.shape[1:3]) == 1 else 40 if len(axes) < 3 else 16
    sizes = tuple(points if kernels.shape[a] > 1 else 1 for a in axes)
    symbols = torch.fft.fftn(kernels.double(), s=sizes, dim=axes) if axes else kernels.double().unsqueeze(-1)
    return torch.linalg.matrix_norm(symbols.flatten(3).movedim(-1, 1), 2).amax(1)


def normalized(shape: tuple[int, ...], seed: int, smooth: bool = False) -> Tensor:
    """Random kernels whose groups have norm 1 on the grid; smooth ones have a peak."""
    kernels = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if smooth:
        kernels = kernels + 3 * torch.randn(shape[:3], generator=torch.Generator().manual_seed(seed + 1)).reshape(
            shape[:3] + (1,) * (len(shape) - 3)
        )
    return kernels / norms(kernels).reshape(-1, *[1] * (len(shape) - 1))


def constant(value: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), value, dtype=torch.float64)


@pytest.mark.parametrize("smooth", [False, True], ids=["random", "smooth"])
@pytest.mark.parametrize("shape", SHAPES + MATRICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_proven_is_so(shape: tuple[int, ...], smooth: bool, dtype: torch.dtype) -> None:
    for seed, scale in enumerate((0.3, 0.9, 0.94, 0.97, 0.99, 0.999, 1.0, 1.001, 1.02, 1.5)):
        kernels = (scale * normalized(shape, seed, smooth)).to(dtype)
        true = norms(kernels)
        for pace, depth in ((1e-9, 0.08), (1e-3, 0.02), (0.02, 0.08), (1.0, 0.3)):
            estimate, proven = certificates(kernels, constant(pace, kernels), constant(depth, kernels))
            assert bool((proven >= true).all())
            assert bool(((proven <= 1) | (proven == float("inf"))).all())
            assert bool((estimate <= true * (1 + 1e-3)).all())
            if scale > 1:
                assert bool((proven == float("inf")).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_with_room_are_proven_and_keep_some_of_it(shape: tuple[int, ...]) -> None:
    for seed, (scale, depth) in enumerate(((0.3, 0.08), (0.9, 0.08), (0.95, 0.04), (0.85, 0.08))):
        kernels = scale * normalized(shape, seed)
        _, proven = certificates(kernels, constant(1e-3, kernels), constant(depth, kernels))
        assert bool((proven < 1).all()), scale
        _, still = certificates(kernels, constant(10.0, kernels), constant(depth, kernels))
        assert bool((still == 1).all()), "without steps to wait for, all of the room goes to the proof"
    assert bool((certificates(0.3 * kernels, constant(1e-3, kernels), constant(0.08, kernels))[1] < 0.8).all())


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_matrices_are_proven_up_to_the_bound(shape: tuple[int, ...]) -> None:
    kernels = (1 - 1e-8) * normalized(shape, 0)
    estimate, proven = certificates(kernels, constant(0.01, kernels), constant(0.08, kernels))
    assert bool((proven == 1).all())
    torch.testing.assert_close(estimate, norms(kernels), rtol=0.05, atol=0)
    _, proven = certificates(0.5 * kernels, constant(0.01, kernels), constant(0.08, kernels))
    assert bool((proven <= 0.55).all())


def test_groups_are_judged_apart() -> None:
    """Whatever stands beside them: larger, far smaller, zero, NaN."""
    kernels = torch.cat([scale * normalized((1, 8, 8, 3, 3), 7) for scale in (0.9, 1.2, 1e-30, 0.0, 1e25, 0.5, 0.98)])
    kernels[4, 0, 0, 0, 0] = float("nan")
    kernels = torch.cat([kernels, 1e30 * normalized((1, 8, 8, 3, 3), 8), kernels[:1] * float("inf")])
    pace, depth = constant(0.003, kernels), constant(0.08, kernels)
    together = certificates(kernels, pace, depth)
    apart = [certificates(kernels[i : i + 1], pace[:1], depth[:1]) for i in range(len(kernels))]
    for both, each in zip(together, zip(*apart, strict=True), strict=True):
        several, one = both[kernels.flatten(1).any(1)], torch.cat(each)[kernels.flatten(1).any(1)]
        torch.testing.assert_close(several, one, equal_nan=True, rtol=1e-5, atol=1e-12)
    assert (together[1] <= 1).tolist() == [True, False, True, True, False, True, False, False, False]


@pytest.fixture
def medium() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("medium")
def test_proofs_hold_where_float32_products_are_less() -> None:
    kernels = 0.9 * normalized((1, 34, 34, 3, 3), 0)
    _, proven = certificates(kernels, constant(1e-3, kernels), constant(0.08, kernels))
    assert 0.9 <= float(proven) < 1


def test_the_rounding_of_wide_symbols_with_equal_entries_is_not_understated() -> None:
    """A plain sum of a million equal squares lacks a share in float32, and the bound of the rounding with it."""
    kernels, theta = torch.full((1, 1100, 1100), 0.1), torch.zeros(1, 0, dtype=torch.float64)
    single, double = (proofs._squared_symbols(kernels.to(dtype), theta)[1] for dtype in (torch.float32, torch.float64))
    assert single / torch.finfo(torch.float32).eps >= double / torch.finfo(torch.float64).eps


@pytest.mark.parametrize("norm", [0.9, 0.99, 0.9951, 0.997, 0.9987, 0.9999])
def test_wide_kernels_nearly_at_the_bound(norm: float) -> None:
    """With little depth an estimate may leave less room than most cells of a clipped kernel are expected to take."""
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    kernel = norm / 2 * torch.stack([turn, turn], -1)[None]  # |cos(θ / 2)| of the norm, all singular values alike
    estimate, proven = certificates(kernel, torch.tensor([1e-4], dtype=torch.float64), torch.tensor([0.005], dtype=torch.float64))
    assert 0.98 * norm <= estimate <= norm * (1 + 1e-6)
    assert norm <= proven * (1 + 1e-6)
    assert proven <= 1 or norm > 0.9
