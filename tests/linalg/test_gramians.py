"""Gram matrices and their proofs against float64: what is said of their rounding is true, and what is proven too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_hooks.linalg.cholesky import within_one
from spectral_hooks.linalg.gramians import gramians, largest_pairs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values: Tensor, columns: int, seed: int = 0) -> Tensor:
    """Matrices with these singular values, `(n, rows)`."""
    n, rows = values.shape
    left = torch.linalg.qr(random(n, rows, rows, seed=seed)).Q
    right = torch.linalg.qr(random(n, columns, rows, seed=seed + 1)).Q
    return (left * values[:, None]) @ right.mT


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 130), (150, 700), (300, 300)], ids=str)
@pytest.mark.parametrize("positive", [False, True])
def test_gram_matrices_are_off_by_no_more_than_they_say(shape: tuple[int, int], positive: bool) -> None:
    """Also where all sums are of one sign, which round the most."""
    matrices = random(3, *shape).abs() if positive else random(3, *shape)
    single = matrices.float()
    found = gramians(single)
    exact = single.double() @ single.double().mT
    assert torch.equal(found.gram, found.gram.mT)
    off = torch.linalg.matrix_norm(found.gram.double() - exact, 2)
    assert (off <= found.error).all()
    assert (exact.diagonal(dim1=1, dim2=2).sum(1) <= found.squares).all()
    assert (found.error <= 1e-4 * found.squares + 1e-11).all()


def test_what_is_not_finite_has_an_infinite_error_and_is_not_proven() -> None:
    matrices = 0.1 * random(3, 8, 12).float()
    matrices[0, 1, 2] = float("nan")
    matrices[1, 1, 2] = 1e30
    gram, _, error = gramians(matrices)
    assert error.isinf().tolist() == [True, True, False]
    assert within_one(gram, error).tolist() == [False, False, True]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 5e-3), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 64, 200])
def test_proofs_are_true_and_sharp(rows: int, dtype: torch.dtype, near: float) -> None:
    """With most singular values at the top, on both sides of the bound."""
    tops = torch.tensor([1 - near, 1 - 1e-12, 1 + 1e-12, 1 + near, 0.0, 2.0], dtype=torch.float64)
    values = tops[:, None] * torch.linspace(0.9, 1.0, rows, dtype=torch.float64).clamp(max=0.999)[None]
    values[:, -1] = tops
    matrices = with_values(values, 2 * rows + 3).to(dtype)
    gram, _, error = gramians(matrices)
    proven = within_one(gram, error)
    norms = torch.linalg.matrix_norm(matrices.double(), 2)
    assert (norms[proven] <= 1 + 1e-15).all()
    assert proven[0]
    assert proven[4]
    assert not proven[3]
    assert not proven[5]


def test_the_largest_pairs_are_those_of_the_matrix() -> None:
    """Of a spectrum with a plateau at the level: those above are found, from below, with unit vectors."""
    values = torch.cat([torch.rand(150, generator=torch.Generator().manual_seed(0)) * 0.9, torch.full((90,), 0.98)])
    values = torch.cat([values.double(), torch.tensor([0.99, 1.0, 1.01, 1.05, 1.2])]).expand(2, -1)
    gram = with_values(values, 300)
    gram = (gram @ gram.mT).float()
    pairs = largest_pairs(gram, 0.985**2, 16, 20)
    exact = torch.linalg.eigvalsh(gram.double())
    assert (pairs.values[:, -4:] <= exact[:, -4:] + 1e-5).all()
    assert (pairs.values[:, -4:] >= exact[:, -4:] - 2e-3).all()
    identity = pairs.vectors.mT @ pairs.vectors
    assert torch.allclose(identity, torch.eye(16).expand(2, -1, -1), atol=1e-5)


def test_matrices_far_above_the_level_do_not_overflow() -> None:
    gram = with_values(torch.linspace(1.0, 300.0, 80, dtype=torch.float64)[None], 90)
    gram = (gram @ gram.mT).float()
    pairs = largest_pairs(gram, 1.0, 8, 30)
    assert pairs.vectors.isfinite().all()
    assert abs(float(pairs.values[0, -1]) - 9e4) < 2e3
