"""The coupled soft cap: the polynomial on dense grids, products against LAPACK's singular values, and bounds that hold."""

from __future__ import annotations

from functools import partial

import numpy as np
import observers
import pytest
import torch
from observers import Counter
from torch import Tensor

import spectral_hooks as sh
from spectral_hooks import projections
from spectral_hooks.linalg import rounded
from spectral_hooks.projections import carried, coupled

ALLOWED = 1 + 1e-6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (24, 24), (40, 70), (130, 50)]
RATIOS = [1 + 1e-6, 1.001, 1.02, 1.1, 1.3, 81 / 62, 1.5, 3.0, 100.0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(shape: tuple[int, int], values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    u, _, vh = torch.linalg.svd(random(*shape, seed=seed), full_matrices=False)
    return (u * values) @ vh


def plateau(shape: tuple[int, int], norm: float) -> Tensor:
    """Half of its singular values at the norm, the others below."""
    values = torch.linspace(2, 0.1, min(shape), dtype=torch.float64).clamp(max=1) * norm
    values[0] = norm
    return with_values(shape, values)


def p2_p1(sigma: np.ndarray, alpha: float) -> np.ndarray:
    """In units of the bound."""
    once = sigma - alpha * sigma**3
    return once + alpha * once**3


# -- the polynomial ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1 + 1e-12, 1 + 1e-6, 1.001, 1.01, 1.1, 1.2, 1.3, 81 / 62])
def test_the_least_strength_that_sends_all_up_to_k_below_one(k: float) -> None:
    x = float(coupled.coefficient(torch.tensor([(k - 1) / k], dtype=torch.float64)))
    alpha = x / k**2
    sigma = np.linspace(0, k, 200_001)
    mapped = p2_p1(sigma, alpha)
    assert mapped.max() <= 1 + 4e-16
    assert (np.diff(mapped) > 0).all(), "the order of singular values stays"
    assert (mapped >= 0).all()
    assert mapped[-1] >= 1 - 1e-11, "no deeper than it must be"
    assert (sigma - mapped <= 3 * alpha**2 * sigma**5 + 1e-15).all(), "small values stay"
    assert p2_p1(np.array([k]), alpha * (1 - 1e-3))[0] > 1, "the least"
    # what is computed is that
    left = coupled.share_left(torch.from_numpy(sigma / k), x).numpy()
    np.testing.assert_allclose(sigma * left, mapped, rtol=0, atol=1e-14)


def test_coefficients_by_bisection() -> None:
    def solved(k: float) -> float:
        low, high = 0.0, 1 / (3 * k * k)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if p2_p1(np.array([k]), middle)[0] > 1 else (low, middle)
        return high

    ks = 1 + np.logspace(-6, np.log10(81 / 62 - 1 - 1e-9), 60)
    found = coupled.coefficient(torch.from_numpy(1 - 1 / ks)).numpy() / ks**2
    np.testing.assert_allclose(found, [solved(k) for k in ks], rtol=1e-8)
    for k, alpha in ((1.001, 0.0184), (1.01, 0.058), (1.1, 0.159), (1.3, 0.195)):
        assert abs(float(coupled.coefficient(torch.tensor([1 - 1 / k], dtype=torch.float64))) / k**2 - alpha) < 1e-3


# -- products ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bound", [1.0, 0.3, 1e-3, 300.0])
def test_stored_values_obey(shape: tuple[int, int], bound: float, dtype: torch.dtype) -> None:
    """Several in one batch, some of which are inside: these stay bit for bit."""
    batch = torch.stack([*(plateau(shape, bound * ratio) for ratio in RATIOS), plateau(shape, 0.7 * bound)]).to(dtype)
    norms = torch.tensor([observers.matrix_norm(weight) for weight in batch], dtype=torch.float64)
    before = batch.clone()
    capped = coupled.cap_matrices(batch, norms, bound)
    assert torch.equal(batch, before)
    assert capped.weights.dtype == dtype
    eps = torch.finfo(dtype).eps
    for was, now, norm, top, acted in zip(before, capped.weights, norms, capped.norms, capped.acted, strict=True):
        assert observers.matrix_norm(now) <= float(top) * (1 + 1e-12)
        assert float(top) <= bound * ALLOWED
        assert bool(acted) == bool(norm > bound * (1 + 5e-7))
        if acted:
            # no deeper than rounding asks for; a loose bound of it in half precision
            assert observers.matrix_norm(now) >= bound * (1 - 5 * eps * min(shape) ** 0.5 - 2e-2 * (eps > 1e-10) - 1e-9)
        else:
            assert torch.equal(was, now)


@pytest.mark.parametrize("shape", [(24, 24), (40, 70), (130, 50)], ids=str)
@pytest.mark.parametrize("k", [1.001, 1.05, 1.3])
def test_singular_values_and_vectors(shape: tuple[int, int], k: float) -> None:
    """In float64 it is `p₂ ∘ p₁` of the singular values, and the vectors stay."""
    weight = with_values(shape, torch.linspace(k, 0.05, min(shape), dtype=torch.float64))
    capped = coupled.cap_matrices(weight[None], torch.tensor([k], dtype=torch.float64), 1.0).weights[0]
    u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    alpha = float(coupled.coefficient(torch.tensor([1 - 1 / k], dtype=torch.float64))) / k**2
    np.testing.assert_allclose(capped.numpy(), (u * p2_p1(s, alpha)) @ vh, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("looseness", [1.1, 2.0, 1000.0])
def test_a_bound_that_is_too_large_is_sound(looseness: float, dtype: torch.dtype) -> None:
    """What the second power of the Gram matrix says is used where it says more: a replaced weight is not divided for nothing."""
    weight = plateau((40, 70), 0.9).to(dtype)
    capped = coupled.cap_matrices(weight[None], torch.tensor([looseness], dtype=torch.float64), 1.0)
    norm = observers.matrix_norm(capped.weights[0])
    assert 0.35 <= norm <= min(float(capped.norms), 1.0) * ALLOWED


@pytest.mark.parametrize("power", [-120, -70, -10, 0, 70, 120])
def test_units(power: int) -> None:
    """A power of two, times weight and bound, changes nothing else."""
    weight, norm = plateau((40, 70), 1.2).float()[None], torch.tensor([1.2], dtype=torch.float64)
    plain, scaled = (
        coupled.cap_matrices(torch.ldexp(weight, torch.tensor(p)), norm * 2.0**p, 2.0**p).weights for p in (0, power)
    )
    torch.testing.assert_close(torch.ldexp(scaled.double(), torch.tensor(-power)), plain.double(), rtol=0, atol=3e-7)
    assert observers.matrix_norm(scaled[0]) <= 2.0**power * ALLOWED


def test_in_float64_where_float32_products_are_not_that() -> None:
    weight, norm = plateau((40, 70), 1.1).float()[None], torch.tensor([1.1], dtype=torch.float64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        capped = coupled.cap_matrices(weight, norm, 1.0)
    finally:
        torch.set_float32_matmul_precision(before)
    assert 1 - 1e-5 <= observers.matrix_norm(capped.weights[0]) <= 1


def test_rounding_as_large_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are off by all of their bound, in the worst direction, do not take a weight outside."""
    weight, norm = plateau((24, 60), 1.03).float()[None], torch.tensor([1.03], dtype=torch.float64)

    signs = [1.0]

    def worst(exactly: Tensor, gamma: float, left: Tensor, right: Tensor) -> Tensor:
        """Off along the largest singular vectors by `γ ‖A‖_F ‖B‖_F`."""
        u, _, vh = torch.linalg.svd(exactly)
        size = gamma / 1.01 * torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right)
        return exactly + signs[0] * size * u[:, :, :1] @ vh[:, :1]

    def gram(x: Tensor) -> tuple[Tensor, float]:
        exactly, gamma = rounded.gram(x)
        return worst(exactly, gamma, x, x), gamma

    def product(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
        exactly, gamma = rounded.product(a, b)
        return worst(exactly, gamma, a, b), gamma

    monkeypatch.setattr(coupled, "gram", gram)
    monkeypatch.setattr(coupled, "product", product)
    for signs[0] in (1.0, -1.0):
        capped = coupled.cap_matrices(weight, norm, 1.0)
        assert observers.matrix_norm(capped.weights[0]) <= ALLOWED


# -- bounds that are carried ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moves_are_bounded_sharply(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rank = min(shape)
    for seed, size in enumerate((1e-9, 1e-3, 1.0, 1e3)):
        then = random(*shape, seed=seed).to(dtype)
        now = (then.double() + size * random(*shape, seed=seed + 9)).to(dtype)
        moved = observers.matrix_norm(now.double() - then.double())
        bound = float(carried.moved_bounds(now[None], then[None], 1.0))
        assert moved <= bound
        assert bound <= moved * rank ** (1 / 16) * (1 + 2e-2) + 2e-12
    assert not float(carried.moved_bounds(now[None] * float("nan"), then[None], 1.0)) < float("inf")


def test_moves_beyond_the_range_of_squares() -> None:
    now = torch.tensor([[3e38, 0.0], [0.0, 1.0]])
    bound = float(carried.moved_bounds(now[None], torch.zeros(1, 2, 2), 1.0))
    assert 3e38 <= bound < 1e40


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_certified_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for weight in (
        plateau(shape, 1.0),
        random(*shape),
        with_values(shape, torch.ones(min(shape), dtype=torch.float64)),
        random(*shape) * 1e-9,
    ):
        weight = weight.to(dtype)
        norm = observers.matrix_norm(weight)
        proven = float(carried.certified_norms(weight[None], 1.0))
        assert norm <= proven <= norm * 1.06 + 1e-5
    assert float(carried.certified_norms(torch.full((1, 3, 4), float("nan")), 1.0)) == float("inf")


@pytest.mark.parametrize("squarings", [0, 1, 2, 3, 5])
def test_sharper_with_every_squaring(squarings: int) -> None:
    matrix = with_values((60, 90), torch.ones(60, dtype=torch.float64)).float()[None]
    found = float(rounded.norm_bounds(matrix, rounded.frobenius_bounds(matrix), squarings=squarings))
    assert 1 <= found <= 60 ** (0.5 ** (squarings + 2)) * 1.01


@pytest.mark.parametrize("function", ["move", "cap", "certify"])
def test_nothing_waits_for_a_device(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (coupled, carried):
        monkeypatch.setattr(module, "is_at_hand", lambda _: False)
    for dtype in (torch.float32, torch.bfloat16):
        batch = torch.stack([plateau((24, 60), norm) for norm in (0.5, 1.01, 9.0)]).to(dtype)
        counter = Counter([batch])
        with counter:
            moved = carried.moved_bounds(batch, batch * 0.9, 1.0, torch.ones(3, dtype=torch.float64))
            if function == "certify":
                carried.certified_norms(batch, 1.0)
            if function == "cap":
                coupled.cap_matrices(batch, 1 + moved, 1.0)
        assert counter.waits == 0


# -- the projection ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sh.DenseOperator, sh.ConvOperator, partial(sh.ConvOperator, stride=2, groups=2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", [1.01, 1.4, 8.0, 500.0])
def test_it_guarantees_the_bound(make, ratio: float, dtype: torch.dtype) -> None:
    weight = random(*((12, 9) if make is sh.DenseOperator else (8, 4, 3, 3))).to(dtype)
    op = make(weight)
    norm = float(sh.spectral_norm(make(weight.double()), rtol=1e-6))
    found = projections.soft_cap(op, norm / ratio)
    assert found.dtype == dtype
    assert float(sh.spectral_norm(make(found.double()), rtol=1e-6)) <= norm / ratio * (1 + 3e-6)
    assert projections.soft_cap(op, 1.1 * norm) is weight, "what is inside stays"
    # nearer than scaling: small values are hardly touched
    scaled = weight.double() / ratio
    assert torch.linalg.norm(found.double() - weight.double()) <= torch.linalg.norm(scaled - weight.double()) * 1.001


def test_an_excess_that_is_known() -> None:
    weight = plateau((24, 60), 1.05).float()
    known, measured = projections.soft_cap(sh.DenseOperator(weight), excess=0.05), projections.soft_cap(sh.DenseOperator(weight))
    torch.testing.assert_close(known, measured, rtol=0, atol=1e-4)
    assert observers.matrix_norm(known) <= ALLOWED
    assert projections.soft_cap(sh.DenseOperator(weight), excess=0.0) is weight
    assert observers.matrix_norm(projections.soft_cap(sh.DenseOperator(40 * weight), excess=41.0)) <= ALLOWED
    kernel = random(6, 4, 3, 3)
    norm = float(sh.spectral_norm(sh.ConvOperator(kernel), rtol=1e-6))
    found = sh.ConvOperator(projections.soft_cap(sh.ConvOperator(kernel), norm / 1.2, excess=0.2 * norm))
    assert float(sh.spectral_norm(found, rtol=1e-6)) <= norm / 1.2 * (1 + 3e-6)
    # each group by itself
    grouped = sh.ConvOperator(torch.cat([1.05 * torch.eye(3), 0.5 * torch.eye(3)])[:, :, None].double(), groups=2)
    assert grouped.canonical_shape[0] == 2
    halves = projections.soft_cap(grouped, excess=0.06)[:, :, 0].split(3)
    assert 0.97 <= observers.matrix_norm(halves[0]) <= 1
    assert abs(observers.matrix_norm(halves[1]) - 0.5) <= 0.01


def test_with_a_strength_it_is_what_it_was() -> None:
    weight = random(9, 6)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    s = s / 2
    expected = (u * (2 * ((s - 0.1 * s**3) + 0.1 * (s - 0.1 * s**3) ** 3))) @ vh
    torch.testing.assert_close(projections.soft_cap(sh.DenseOperator(weight), 2.0, strength=0.1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"excess": -0.1}, "`excess`"),
        ({"excess": float("nan")}, "`excess`"),
        ({"excess": "0.1"}, "`excess`"),
        ({"strength": 2}, "`strength`"),
        ({"strength": 0.1, "excess": 0.1}, "not both"),
    ],
)
def test_bad_arguments(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        projections.soft_cap(sh.DenseOperator(torch.eye(2)), **options)


def test_what_guarantees_the_bound() -> None:
    soft_cap = projections.soft_cap
    for projection in (
        soft_cap,
        projections.clip,
        partial(soft_cap),
        partial(projections.band, min_norm=0.5),
        partial(soft_cap, strength=None),
    ):
        assert projections.guarantees(projection)
    for projection in (
        projections.hammer,
        partial(soft_cap, strength=0.1),
        partial(partial(soft_cap, strength=0.1)),
        partial(soft_cap, excess=0.1),
        partial(projections.clip, max_norm=2.0),
        lambda op, c: op.weight,
    ):
        assert not projections.guarantees(projection)
