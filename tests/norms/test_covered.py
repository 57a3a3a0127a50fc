"""Many small kernels at once: what is proven of them holds in float64, whatever stands beside them and however stored."""

from __future__ import annotations

import pytest
import torch
from observers import lattice_norm
from torch import Tensor, nn

from spectral_hooks.norms.covered import Sample, proven, tall_to_wide

SHAPES = [(16, 16, 3, 3), (6, 20, 2, 2), (20, 6, 3), (1, 5, 3, 3), (4, 4, 2, 3, 2), (5, 7, 3, 1), (9, 3, 1, 4)]
LAYERS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def norm(kernel: Tensor) -> float:
    layer = LAYERS[kernel.ndim](kernel.shape[1], kernel.shape[0], tuple(kernel.shape[2:]), bias=False)
    layer.weight = nn.Parameter(kernel.double())
    return lattice_norm(layer)


def kernels(shape: tuple[int, ...], number: int, seed: int) -> Tensor:
    """Of norm 1, in float64; flat and peaked spectra."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(number, *shape, generator=generator, dtype=torch.float64)
    found[::2] += 2 * torch.randn(len(found[::2]), *shape[:2], *(1,) * (len(shape) - 2), generator=generator, dtype=torch.float64)
    return torch.stack([kernel / norm(kernel) for kernel in found])


@pytest.mark.parametrize("angle", [0.2, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_proven_is_so_and_what_has_room_is_proven(shape: tuple[int, ...], angle: float) -> None:
    found = kernels(shape, 4, seed=len(shape))
    for scale in (0.3, 0.9, 0.97, 0.999, 1.0, 1.0001, 1.02, 2.0):
        sample = Sample.of(tall_to_wide(scale * found), angle)
        estimates = sample.estimates(closely=True).cpu()
        assert bool((estimates <= scale * (1 + 1e-5)).all())
        assert bool((estimates >= 0.7 * scale).all())
        inside = proven(sample, torch.ones(4, dtype=torch.float64))
        assert not (scale > 1 and inside.any())
        assert inside.all() or scale > 0.9
        goals = torch.tensor([scale * x for x in (0.99, 1.3, 0.8, 1.3)], dtype=torch.float64)
        assert proven(sample, goals).tolist() == [False, True, False, True]


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_of_kernels_times_a_share_and_off_by_an_error(shape: tuple[int, ...]) -> None:
    sample = Sample.of(tall_to_wide(1.5 * kernels(shape, 3, seed=1)), 0.4)
    ones, errors = torch.ones(3, dtype=torch.float64), torch.tensor([0.0, 0.01, 0.2], dtype=torch.float64)
    assert proven(sample, ones, ones / 2, errors).tolist() == [True, True, False]
    assert not proven(sample, ones, 0.67 * ones, 0 * errors).any()
    # an error of one size at all taps, in phase
    taps = torch.tensor(shape[2:]).prod()
    assert not proven(sample, ones, 0.6 * ones, ones * 0.101 / taps.sqrt()).any()


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_groups_are_judged_apart(precision: str) -> None:
    """Whatever stands beside them: larger, far smaller, zero, NaN."""
    found = (
        tall_to_wide(kernels((8, 8, 3, 3), 7, seed=3))
        * torch.tensor([0.9, 1.2, 1e-30, 0, 1e25, 0.5, 1.001])[:, None, None, None, None]
    )
    found[4, 0, 0, 0, 0] = float("nan")
    torch.set_float32_matmul_precision(precision)
    try:
        together = proven(Sample.of(found, 0.4), torch.ones(7, dtype=torch.float64))
        apart = [bool(proven(Sample.of(each[None], 0.4), torch.ones(1, dtype=torch.float64))) for each in found]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert together.tolist() == apart == [True, False, True, True, False, True, False]


def test_rounding_is_counted() -> None:
    """Kernels just outside, whose products are long sums of equal terms: in no precision they are proven."""
    for rows, columns in ((1, 4096), (64, 64), (128, 16)):
        kernel = torch.full((1, rows, columns, 3, 3), 1 / (9 * (rows * columns) ** 0.5), dtype=torch.float64)
        for scale, inside in ((1 + 1e-9, False), (0.9, True)):
            sample = Sample.of(tall_to_wide(scale * kernel), 0.4)
            assert bool(proven(sample, torch.ones(1, dtype=torch.float64))) == inside
