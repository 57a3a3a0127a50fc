"""What the end of a clip makes of the corrections that its rounds have found."""

from __future__ import annotations

import pytest
import torch

import spectral_hooks as sh
from spectral_hooks.linalg.symbols import half_plane, symbol
from spectral_hooks.projections.dual import clip_kernel
from spectral_hooks.projections.frequencies import FrequencyGrid
from spectral_hooks.projections.rounds import proximal_rounds
from spectral_hooks.projections.stretch import combined


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / (shape[1] * 3) ** 0.5


def largest(kernel: torch.Tensor, theta: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(symbol(kernel, theta), 2).amax())


@pytest.mark.parametrize(("sizes", "taps"), [((10, 10), (3, 3)), ((6, 6), (2, 2)), ((6, 10), (2, 3)), ((6, 6, 3), (2, 2, 2))])
def test_the_symbol_on_a_checkerboard_is_an_isometry(sizes: tuple[int, ...], taps: tuple[int, ...]) -> None:
    kernel = random(2, 3, 4, *taps)
    grid = FrequencyGrid(sizes, kernel, checkerboard=True)
    assert float(grid.shares.sum()) == pytest.approx(1)
    assert len(grid.theta) < 0.7 * len(FrequencyGrid(sizes, kernel).theta)
    torch.testing.assert_close(grid.adjoint(grid.symbols(kernel)), kernel)


@pytest.mark.parametrize("wide", [40, 64])
def test_the_mixture_is_no_farther_than_the_scaled_last_round(wide: int) -> None:
    kernel = random(2, wide, wide, 3, 3)
    theta, _ = half_plane((16, 16), kernel)
    grid = FrequencyGrid((8, 8), kernel)
    level = largest(kernel, theta) / 2
    found = proximal_rounds(kernel, grid, grid.adjoint, level, 3)
    mixed = combined(kernel, kernel - found.kernel, kernel - found.before, level, theta)
    norm = largest(mixed, theta)
    assert norm == pytest.approx(level, rel=2e-2)
    scaled = found.kernel * min(1, level / largest(found.kernel, theta))
    assert torch.linalg.vector_norm(mixed * min(1, level / norm) - kernel) < torch.linalg.vector_norm(scaled - kernel)


def test_later_rounds_stay_in_the_spaces_of_the_first_and_lose_little(monkeypatch: pytest.MonkeyPatch) -> None:
    op = sh.ConvOperator(random(1, 48, 48, 3, 3)[0])
    bound = 0.6 * float(sh.spectral_norm(op))
    distances = []
    for least in (33, 1000):
        monkeypatch.setattr("spectral_hooks.projections.rounds._SPACES_FROM", least)
        clipped, _ = clip_kernel(op, op.canonical(), bound, 3)
        distances.append(float(torch.linalg.vector_norm(clipped - op.canonical())))
    assert distances[0] != distances[1]
    assert distances[0] == pytest.approx(distances[1], rel=2e-2)


def test_a_transposed_kernel_is_clipped_to_the_transpose() -> None:
    weight = random(64, 40, 3, 3)
    bound = 0.4 * float(sh.spectral_norm(sh.ConvOperator(weight)))
    clipped = sh.projections.clip(sh.ConvOperator(weight), bound)
    other = sh.projections.clip(sh.ConvOperator(weight.transpose(0, 1).contiguous()), bound).transpose(0, 1)
    torch.testing.assert_close(clipped, other, rtol=0, atol=1e-6)
