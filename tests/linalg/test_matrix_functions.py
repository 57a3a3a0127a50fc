"""Clipping by matrix products alone: as exact as it is measured to be, and taken only where that is enough."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import spectral_hooks as sh
from spectral_hooks import projections
from spectral_hooks.linalg import matrix_functions as polynomial
from spectral_hooks.projections import excess

RATIOS = (1.0, 1.01, 2.0, 10.0, 100.0, 1000.0)
SHAPES = ((48, 48), (96, 40), (40, 96))


def spectrum(kind: str, ratio: float, size: int) -> Tensor:
    """Singular values up to `ratio` times the level: spread over six decades, close to the level, few of them, all equal."""
    if kind == "wide":
        return torch.logspace(-6, 0, size, dtype=torch.float64) * ratio
    if kind == "close":
        return torch.cat([torch.linspace(0.9, 1.1, size - 1, dtype=torch.float64), torch.tensor([ratio], dtype=torch.float64)])
    if kind == "low rank":
        return torch.cat([torch.linspace(0.01, ratio, size // 4), torch.zeros(size - size // 4)]).double()
    return torch.full((size,), ratio, dtype=torch.float64)


def matrix(kind: str, ratio: float, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64)).Q for n in shape)
    return (u * spectrum(kind, ratio, size)) @ v.T


def clipped(x: Tensor, level: float = 1.0) -> Tensor:
    """The exact clip of the stored values."""
    u, s, vh = torch.linalg.svd(x.to(torch.complex128 if x.is_complex() else torch.float64), full_matrices=False)
    return (u * s.clamp(max=level).unsqueeze(-2)) @ vh


@pytest.fixture
def on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Products are preferred here too; a record of whether they were taken."""
    taken: list[bool] = []
    by_products = excess._by_products

    def recorded(blocks: Tensor, level: Tensor, out: Tensor):
        found = by_products(blocks, level, out)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(excess, "products_pay", lambda blocks: True)
    monkeypatch.setattr(excess, "_by_products", recorded)
    return taken


# -- the polynomials ----------------------------------------------------------------------------------------------------------


def nearest_to_one(low: float, high: float) -> tuple[np.ndarray, float]:
    """The odd quintic with the least largest distance from 1 on an interval, by Remez's algorithm: the distance is attained at
    the ends and at two points between, with alternating signs."""
    inner = np.array([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high])
    for _ in range(60):
        x = np.array([low, *inner, high])
        a, b, c, error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4))
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b**2 - 20 * a * c)) / (10 * c))
    return np.array([a, b, c]), abs(error)


def test_the_quintics_are_optimal() -> None:
    *steps, last = polynomial._QUINTICS
    for (least, *coefficients), (following, *_) in pairwise(polynomial._QUINTICS):
        optimal, error = nearest_to_one(least, 1.001)
        np.testing.assert_allclose(coefficients, optimal / (1 + error), rtol=0, atol=1e-7)
        assert (optimal @ [least, least**3, least**5]) / (1 + error) == pytest.approx(following, abs=1e-9)
    assert len(steps) == 3
    assert last[1:] == (15 / 8, -10 / 8, 3 / 8)  # what the optimum tends to: three derivatives as those of the sign


@pytest.mark.parametrize("least", [1.0, 0.1, 0.05, 1e-3, 1e-7])
def test_sign_of_scalars(least: float) -> None:
    x = torch.cat([torch.logspace(-9, 0, 4001, dtype=torch.float64), torch.tensor([1.0005], dtype=torch.float64)])
    found = polynomial.sign(x[:, None, None], torch.ones(()), least).flatten()
    torch.testing.assert_close(found[x >= least], torch.ones_like(found[x >= least]), rtol=0, atol=1e-9)
    assert bool((found > 0).all())
    assert bool((found <= 1 + 1e-9).all())
    torch.testing.assert_close(polynomial.sign(-x[:, None, None], torch.ones(()), least).flatten(), -found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["wide", "close", "low rank", "equal"])
def test_bracket_of_the_norm(kind: str, shape: tuple[int, int]) -> None:
    for ratio in (1e-3, 1.0, 1e3):
        x = matrix(kind, 1.0, shape).float() * ratio
        norm = torch.linalg.matrix_norm(x.double(), ord=2)
        lower, upper = polynomial.norm_bracket(x)
        assert 0.85 * norm <= lower <= norm <= upper <= 1.15 * norm
    zero = polynomial.norm_bracket(torch.zeros(3, 3))
    assert float(zero[0]) <= float(zero[1]) < 1e-15


# -- the excess: measured, never hoped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", ["wide", "close", "low rank", "equal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_measured(shape: tuple[int, int], kind: str, ratio: float, dtype: torch.dtype) -> None:
    x = matrix(kind, ratio, shape).to(dtype)
    found = polynomial.excess(x.float(), 1.0)
    reference = clipped(x)
    size = torch.linalg.matrix_norm(reference)
    error = torch.linalg.matrix_norm(x.double() - found.excess.double() - reference)
    assert error <= found.error + 1e-6 * size
    # rounding is of the size of the largest value, no more
    assert error <= 3e-6 * ratio * size
    total = (torch.linalg.svdvals(x.double()) - 1).clamp(min=0).sum()
    torch.testing.assert_close(found.total.double(), total, rtol=1e-5, atol=1e-5 * ratio)
    if ratio <= 2:
        assert found.error <= excess._ACCURATE * size


def test_excess_of_a_batch_of_complex_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 20, 33, generator=generator, dtype=torch.complex64)
    levels = torch.tensor([4.0, 8.0])
    found = polynomial.excess(x, levels)
    for group, level in enumerate(levels.tolist()):
        reference = x[:, group] - clipped(x[:, group], level)
        torch.testing.assert_close(found.excess[:, group].to(reference), reference, rtol=0, atol=1e-4)
        total = (torch.linalg.svdvals(x[:, group].to(torch.complex128)) - level).clamp(min=0).sum(-1)
        torch.testing.assert_close(found.total[:, group].double(), total, rtol=1e-5, atol=1e-4)
    exact, sums, largest = excess.excess_over(x.to(torch.complex128), levels)
    out = torch.empty_like(exact)
    by_products = excess._by_products(x.to(torch.complex128), levels.double(), out)
    assert by_products is not None
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(by_products[0], sums, rtol=1e-5, atol=1e-4)
    assert bool((by_products[1].amax(0) <= largest * (1 + 1e-6)).all())
    assert bool((by_products[1].amax(0) >= 0.8 * largest).all())


def test_small_blocks_need_not_be_more_accurate() -> None:
    """At high frequencies the symbols of trained kernels are small; that is no reason to give up."""
    x = torch.stack([matrix("wide", 2.0, (40, 40)), 1e-5 * matrix("wide", 2.0, (40, 40))])[:, None]
    out = torch.empty_like(x)
    assert excess._by_products(x, torch.ones(1, dtype=torch.float64), out) is not None
    torch.testing.assert_close(out, x - clipped(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_to_others(bad: float) -> None:
    x = torch.eye(40) * 2
    x[3, 4] = bad
    assert excess._by_products(x[None], torch.ones(1), torch.empty(1, 40, 40)) is None


# -- inside the projection ----------------------------------------------------------------------------------------------------


def test_only_accelerators_take_products() -> None:
    assert not excess.products_pay(torch.zeros(1, 64, 64))


@pytest.mark.parametrize("ratio", RATIOS[1:])
@pytest.mark.parametrize("kind", ["wide", "close", "low rank"])
def test_clip_is_accurate_whichever_way_it_takes(kind: str, ratio: float, on_an_accelerator: list[bool]) -> None:
    x = matrix(kind, ratio, (64, 48)).float()
    found = projections.clip(sh.DenseOperator(x)).double()
    reference = clipped(x)
    assert torch.linalg.matrix_norm(found, ord=2) <= 1 + 1e-6
    assert torch.linalg.matrix_norm(found - reference) <= 1e-4 * torch.linalg.matrix_norm(reference)
    assert len(on_an_accelerator) == 1
    if ratio <= 2:
        assert all(on_an_accelerator)
    if ratio == 1000 and kind != "close":  # rounding is too large there, and that is seen
        assert not any(on_an_accelerator)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_convolutions_are_clipped_as_by_decompositions(
    share: float, groups: int, on_an_accelerator: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    op = sh.ConvOperator(torch.randn(40, 20 * 2 // groups, 3, 3), padding=1, groups=groups)
    bound = share * float(sh.spectral_norm(op))
    by_products = projections.clip(op, bound)
    assert on_an_accelerator
    assert all(on_an_accelerator)
    assert float(sh.spectral_norm(op.with_weight(by_products))) <= bound * (1 + 1.1e-3)
    monkeypatch.undo()
    exact = projections.clip(op, bound)
    distances = [float((weight - op.weight).norm()) for weight in (by_products, exact)]
    assert distances[0] == pytest.approx(distances[1], rel=3e-3)
