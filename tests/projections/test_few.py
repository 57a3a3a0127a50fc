"""Laws of the clip of few singular values, against LAPACK in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from observers import array, clipped_matrix, matrix_norm

from spectral_hooks.linalg.gramians import Gramians, gramians, largest_pairs
from spectral_hooks.projections import few as module
from spectral_hooks.projections.few import Few, block_for, clip_few

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEPTH = 0.02


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at_the_bound(rows: int, columns: int, above: list[float], seed: int = 0) -> Tensor:
    """A matrix with a plateau of singular values at `1 - DEPTH`, others below, and a few as given."""
    size = min(rows, columns)
    values = torch.linspace(0.1, 0.9, size, dtype=torch.float64)
    values[size // 2 :] = 1 - DEPTH
    values[size - len(above) :] = torch.tensor(above, dtype=torch.float64)
    left, right = (torch.linalg.qr(random(n, size, seed=seed + i)).Q for i, n in enumerate((rows, columns)))
    return (left * values) @ right.mT


def clipped(batch: Tensor, c: float = 1.0, number: int = 24, outside: bool = False, depth: float = DEPTH) -> Few:
    [found] = clip_few([batch], c, depth=depth, numbers=[[number] * len(batch)], outside=[[outside] * len(batch)])
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 96), (100, 260), (260, 100)], ids=str)
@pytest.mark.parametrize("c", [1.0, 0.37, 150.0])
@pytest.mark.parametrize("outside", [False, True])
def test_few_are_clipped_and_what_is_inside_stays(shape: tuple[int, int], dtype: torch.dtype, c: float, outside: bool) -> None:
    kinds = [[1.05, 1.01, 1.004], [0.99], [1.3, 1.02], [0.97]]
    before = torch.stack([c * at_the_bound(*shape, above, seed=i) for i, above in enumerate(kinds)]).to(dtype)
    found = clipped(before, c, outside=outside)
    eps = torch.finfo(dtype).eps
    assert found.proven == [True] * 4
    assert [weight is not None for weight in found.weights] == [True, False, True, False]
    assert found.above[0] in (2, 3)
    for was, now in zip(before, found.weights, strict=True):
        if now is None:
            assert matrix_norm(was) <= c
            continue
        assert now.dtype == dtype
        assert now.shape == was.shape
        assert c * (1 - DEPTH) * (1 - 1e-5 - 4 * eps) <= matrix_norm(now) <= c
        # no farther than where all that is above the depth would be clipped, and not nearer than what is necessary
        lengths = [np.linalg.norm(array(was) - clipped_matrix(was, 0.0, bound)) for bound in (c * (1 - DEPTH), c)]
        rounding = 2 * eps * np.linalg.norm(array(was))
        assert lengths[1] - rounding <= np.linalg.norm(array(was) - array(now)) <= 1.02 * lengths[0] + rounding


def test_singular_values_below_are_left_alone() -> None:
    before = at_the_bound(120, 200, [1.04, 1.01]).float()[None]
    [now] = clipped(before).weights
    assert now is not None
    u, s, vh = torch.linalg.svd(before[0].double(), full_matrices=False)
    below = s < 0.95
    change = u[:, below].T @ (now.double() - before[0].double()) @ vh[below].T
    assert float(torch.linalg.matrix_norm(change, 2)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [1e-3, 1e-4, 3e-6])
def test_close_to_the_bound_it_is_told_on_which_side(gap: float, dtype: torch.dtype) -> None:
    """By float64, where float32 does not tell."""
    sides = torch.stack([at_the_bound(80, 90, [1 - gap]), at_the_bound(80, 90, [1 + gap])]).to(dtype)
    found = clipped(sides)
    assert found.weights[0] is None
    assert found.proven == [True, True]
    assert found.weights[1] is not None
    assert matrix_norm(found.weights[1]) <= 1


def test_too_many_and_too_far_are_left_to_others() -> None:
    crowd = at_the_bound(100, 120, [1.02 + 0.001 * i for i in range(40)])
    sudden = at_the_bound(100, 120, [0.97]) + 100 * random(100, 120, seed=7)
    huge = torch.full((100, 120), 1e25, dtype=torch.float64)
    before = torch.stack([crowd, sudden, huge, at_the_bound(100, 120, [1.03]), torch.zeros(100, 120)]).float()
    found = clipped(before)
    assert found.proven == [False, False, False, True, True]
    assert [weight is not None for weight in found.weights] == [False, False, False, True, False]


def test_without_a_number_it_is_only_proven() -> None:
    found = clipped(torch.stack([at_the_bound(80, 80, [1.05]), at_the_bound(80, 80, [0.98])]).float(), number=0)
    assert found.proven == [False, True]
    assert found.weights == [None, None]


@pytest.mark.parametrize("c", [1e-200, 1e-25, 1e25, 1e200])
def test_bounds_of_every_size(c: float) -> None:
    before = (c * at_the_bound(80, 100, [1.05, 1.01]))[None]
    [now], [proven], _ = clipped(before, c)
    if proven:
        assert now is not None
        assert matrix_norm(now / c) <= 1
    assert proven or abs(np.log2(c)) > 300


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_is_carried_over_is_off_by_no_more_than_it_says(dtype: torch.dtype) -> None:
    """From the Gram matrix of what was to that of what is stored, whatever the vectors are."""
    for scale in (1.0, 1.3):
        values = at_the_bound(130, 400, [1.2, 1.1, 1.05, 1.01]).to(dtype)[None]
        part = module._Part(0, [0], values, values, gramians(values))
        pairs = largest_pairs(part.grams.gram, 0.985**2, 24, 4)
        pairs = pairs._replace(vectors=scale * pairs.vectors)
        stored, grams = module._cut(part, pairs, torch.tensor([True]), 1.0, 1 - DEPTH)
        exact = stored.double() @ stored.double().mT
        off = float(torch.linalg.matrix_norm(grams.gram.double() - exact, 2)[0])
        assert 0 < off <= float(grams.error[0])


def test_a_block_holds_more_than_what_was_above() -> None:
    sizes = [block_for(above) for above in (0, 3, 10, 40)]
    assert sizes == sorted(sizes)
    assert all(size > above + 8 for size, above in zip(sizes, (0, 3, 10, 40), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_steps_are_never_outside(dtype: torch.dtype) -> None:
    """Steps of all sizes; those that are left to others are taken back."""
    now = torch.stack([at_the_bound(96, 128, [0.98], seed=i) for i in range(2)]).to(dtype)
    clips = 0
    for seed in range(40):
        size = (1e-4, 1e-3, 3e-3)[seed % 3] * (100 if seed == 20 else 1)
        moved = (now.float() + size * random(2, 96, 128, seed=seed).float()).to(dtype)
        found = clipped(moved, outside=seed % 2 == 0)
        for i, (weight, proven) in enumerate(zip(found.weights, found.proven, strict=True)):
            if proven:
                now[i] = moved[i] if weight is None else weight
                clips += weight is not None
            assert matrix_norm(now[i]) <= 1
    assert clips >= 10


def test_the_rounding_of_a_carried_matrix_with_equal_entries_is_not_understated() -> None:
    """A plain sum of millions of equal squares lacks a share in float32, and the bound of the rounding with it."""
    errors = []
    for dtype in (torch.float32, torch.float64):
        gram, none = torch.full((1, 2000, 2000), 0.1).to(dtype), torch.zeros(1, 2000, 1, dtype=dtype)
        grams = Gramians(gram, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        errors.append(float(module._carried(grams, none, none[:, 0], none).error) / torch.finfo(dtype).eps)
    assert errors[0] >= errors[1] * (1 - 1e-9)
