"""Norms by sums of squares, against LAPACK in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from observers import array, matrix_norm, singular_values

from spectral_hooks.linalg.rounded import frobenius_bounds, norm_bounds


@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1.0, 1e8, 1e25])
def test_sums_of_squares_bound_the_norm(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 30, 70, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(noise[0], full_matrices=False)
    few = u * torch.where(torch.arange(30) < 3, 2.0, 1e-3 * s) @ vh
    batch = (torch.stack([noise[0], noise[1].round(), u @ vh, few, u[:, :1] @ vh[:1], 0 * few]) * scale).float()
    far = frobenius_bounds(batch)
    near = norm_bounds(batch, far, squarings=1)
    for matrix, f, n in zip(batch, far.tolist(), near.tolist(), strict=True):
        length = float(np.linalg.norm(array(matrix)))
        assert length <= f
        assert f <= 1.0001 * length + 1e-11 or length > 1e15  # squares overflow
        assert matrix_norm(matrix) <= n <= f
        if length > 1e-6 and f < 1e15:
            eighth = float((singular_values(matrix) ** 8).sum() ** 0.125)
            assert n <= 1.001 * eighth + 1e-11
