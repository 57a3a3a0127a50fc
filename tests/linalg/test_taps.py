"""Symbols applied without being formed."""

from __future__ import annotations

import pytest
import torch

from spectral_hooks.linalg.symbols import symbol
from spectral_hooks.linalg.taps import AppliedSymbol, seen_above

SHAPES = [(1, 5, 7, 3, 3), (3, 4, 4, 2), (2, 6, 3, 2, 3, 2)]


def of(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        6 * torch.rand(5, len(shape) - 3, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_symbol(shape: tuple[int, ...]) -> None:
    kernel, theta = of(shape)
    blocks, applied = symbol(kernel, theta), AppliedSymbol(kernel, theta)
    right = torch.randn(shape[0], shape[2], len(theta), dtype=torch.complex128)
    left = torch.randn(shape[0], shape[1], len(theta), dtype=torch.complex128)
    torch.testing.assert_close(applied(right), torch.einsum("fgrc,gcf->grf", blocks, right))
    torch.testing.assert_close(applied.adjoint(left), torch.einsum("fgrc,grf->gcf", blocks.conj(), left))


@pytest.mark.parametrize("shape", SHAPES)
def test_tops_are_attained_and_reach_the_norms(shape: tuple[int, ...]) -> None:
    kernel, theta = of(shape)
    norms = torch.linalg.matrix_norm(symbol(kernel, theta), 2).mT
    applied = AppliedSymbol(kernel, theta)
    found, vectors = applied.top(applied.start(), 12)
    torch.testing.assert_close(torch.linalg.vector_norm(applied(vectors), dim=1), found)
    torch.testing.assert_close(found, norms, rtol=1e-8, atol=0)
    assert bool((applied.top(applied.start(), 1)[0] <= norms * (1 + 1e-12)).all())


def test_vectors_show_only_what_is_above() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 40, 48, 3, 3, generator=generator)
    kernel[1] = 0
    blocks = symbol(kernel.double(), torch.zeros(1, 2, dtype=torch.float64))[0]
    at_zero = torch.linalg.matrix_norm(blocks, 2)
    assert seen_above(kernel, 0.5 * float(at_zero[2])).tolist() == [True, False, True]
    assert seen_above(kernel * 1e30, 0.5e30 * float(at_zero[2])).tolist() == [True, False, True]
    assert not seen_above(kernel, 3 * float(at_zero.amax())).any()
    assert not seen_above(kernel[:, :8], 1e-3).any(), "of few rows a proof is as cheap"


@pytest.mark.parametrize("entry", [1.0, 0.3, 1e-30])
@pytest.mark.parametrize("shape", [(1, 33, 40, 3, 3), (2, 34, 40, 3), (2, 33, 33, 3, 3)])
def test_equal_entries_leave_nothing_to_look_at_after_the_first_steps(shape: tuple[int, ...], entry: float) -> None:
    """Symbols of rank one, nearly zero at some frequencies: what rounding leaves of a direction is no direction."""
    kernel = torch.full(shape, entry, dtype=torch.float64)
    norm = float(kernel[0].norm()) * kernel[0, 0, 0].numel() ** 0.5  # at θ = 0
    assert seen_above(kernel, norm * (1 - 1e-3)).all()
    assert not seen_above(kernel, norm * (1 + 1e-6)).any()
