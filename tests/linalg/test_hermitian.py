"""Largest eigenvalues of many matrices: what is called proven is so, in float32 as in float64, whatever the rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_hooks.linalg import cholesky, lanczos
from spectral_hooks.linalg.gram import Gram

SIZES = [1, 2, 7, 64, 65, 150]
DTYPES = [torch.complex64, torch.complex128]


def spectra(size: int) -> dict[str, Tensor]:
    """Kinds of spectra, the largest value 1."""
    falling = torch.linspace(1, 0, size, dtype=torch.float64)
    return {
        "linear": falling,
        "flat": torch.ones(size, dtype=torch.float64),
        "one": (torch.arange(size) == 0).double(),
        "power": 1 / torch.arange(1, size + 1, dtype=torch.float64) ** 2,
        "plateau": (falling * 3).clamp(max=1),
    }


def hermitian_with(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(values), len(values), generator=generator, dtype=torch.complex128)
    basis = torch.linalg.qr(random).Q
    matrix = (basis * values) @ basis.mH
    return (matrix + matrix.mH) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_proven_is_true_and_what_has_room_is_proven(size: int, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for name, values in spectra(size).items():
        stored = hermitian_with(values).to(dtype)
        exact = float(torch.linalg.eigvalsh(stored.to(torch.complex128))[-1])
        for gap in (-1e-1, -1e-3, -1e-6, -4 * eps, 0.0, 4 * eps, 1e-6, 1e-3, 1e-1, 1.0):
            level = exact * (1 + gap)
            slack = 0.3 * max(gap, 0) * exact
            verdict = cholesky.below_(stored.clone()[None], level, error=0.0, slack=slack)
            if bool(verdict.proven):
                assert exact <= level, (name, gap)
            if gap >= max(1e-3, 50 * size**2 * eps):
                assert bool(verdict.proven), (name, gap)
            assert not bool(verdict.proven & verdict.doubtful)
            # or a branch and bound would split cells for ever
            assert not (dtype == torch.complex128 and gap >= 1e-3 and bool(verdict.doubtful)), (name, gap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_error_of_the_matrices_is_paid_for(dtype: torch.dtype) -> None:
    """A matrix whose true norm may be above the level is not proven below."""
    matrix = hermitian_with(spectra(50)["linear"]).to(dtype)[None]
    for error, proven in ((0.0, True), (0.04, True), (0.06, False), (1.0, False)):
        assert bool(cholesky.below_(matrix.clone(), 1.05, error=error, slack=0.05).proven) is proven


def factor_of(matrix: Tensor, level: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, float]:
    """The factor of `level I - G` as it was computed, put together from its blocks, and the bound of its growth."""
    diagonals: list[Tensor] = []
    others: list[Tensor] = []
    factorize, solve = torch.linalg.cholesky_ex, torch.linalg.solve_triangular

    def keep_diagonal(*args, **kwargs):
        result = factorize(*args, **kwargs)
        diagonals.append(result[0])
        return result

    def keep_rows(*args, **kwargs):
        others.append(solve(*args, **kwargs))
        return others[-1]

    size = len(matrix)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", keep_diagonal)
        patch.setattr(torch.linalg, "solve_triangular", keep_rows)
        positive, grown = cholesky._factorize(cholesky.Rows.of(matrix[None]), level, cholesky._rounding(size, matrix.dtype))
    assert bool(positive)
    factor, start = torch.zeros(size, size, dtype=torch.complex128), 0
    for i, diagonal in enumerate(diagonals):
        end = start + diagonal.shape[-1]
        factor[start:end, start:end] = diagonal[0].mH
        if end < size:
            factor[start:end, end:] = -others[i][0]
        start = end
    return factor, float(grown)


@pytest.mark.parametrize("size", [7, 64, 65, 150, 200])
def test_the_rounding_of_a_factor_is_at_most_what_is_allowed_for(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`|A - R* R| ≤ γ |R|* |R| + δ level I` entry by entry, in float32 against float64: what every proof rests on."""
    gamma, delta = cholesky._rounding(size, torch.complex64), cholesky._shifting(size, torch.complex64)
    for name, values in spectra(size).items():
        matrix = hermitian_with(values).to(torch.complex64)
        factor, grown = factor_of(matrix, 1.01, monkeypatch)
        off = (factor.mH @ factor - (1.01 * torch.eye(size) - matrix.to(torch.complex128))).abs()
        absolute = factor.abs().T @ factor.abs()
        assert bool((off <= gamma * absolute + 1.01 * delta * torch.eye(size)).all()), name
        assert float(torch.linalg.eigvalsh(absolute)[-1]) <= grown * (1 + 1e-5), name


@pytest.mark.parametrize("size", [5, 32, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_estimates_are_from_below_and_close(size: int, dtype: torch.dtype) -> None:
    kinds = spectra(size)
    matrices = torch.stack([hermitian_with(values) for values in kinds.values()]).to(dtype)
    values, vectors = lanczos.top(matrices, steps=16)
    torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=-1), torch.ones_like(values))
    assert (values <= 1 + 20 * size * torch.finfo(dtype).eps).all()
    assert (values >= 0.97).all()
    for matrix, vector in zip(matrices, vectors, strict=True):
        value, vector = lanczos.exact_top(matrix, vector)
        assert float(value) == pytest.approx(1, abs=20 * size * torch.finfo(dtype).eps)
        assert float((matrix @ vector - vector).abs().max()) < 1e-3


def test_estimates_of_a_rank_one_matrix_from_its_own_vector() -> None:
    """What is left of an exhausted Krylov space is noise, which must not make the estimate worse."""
    vector = torch.randn(3, 48, 1, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    matrices = vector @ vector.mH
    exact = matrices.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    for steps in (1, 4, 16):
        torch.testing.assert_close(lanczos.top(matrices, steps=steps)[0], exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(1, 5, 8, 3, 3), (3, 4, 4, 2, 3), (1, 40, 30, 4), (1, 3, 3, 2, 2, 2)], ids=str)
def test_gram_in_float32_is_as_close_as_it_says(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(shape, generator=generator, dtype=torch.float64)
    gram = Gram(kernel)
    theta = torch.rand(20, len(shape) - 3, generator=generator, dtype=torch.float64) * 6.3
    group = torch.arange(20) % shape[0]
    single = gram.single()
    off = torch.linalg.matrix_norm(single(group, theta) - gram(group, theta), 2)
    assert 0 < float(off.max()) <= single.error < 1e-4 * float(kernel.square().sum()) * kernel[0, 0, 0].numel()
    for start in range(0, gram.size, 16):
        end = min(start + 16, gram.size)
        part = gram.block(group, theta, start, end)
        torch.testing.assert_close(part, gram(group, theta)[:, start:end, start:], rtol=1e-12, atol=1e-12)
    vectors = torch.randn(20, gram.size, generator=generator, dtype=torch.complex128)
    expected = (vectors.conj() * (gram(group, theta) @ vectors.unsqueeze(2)).squeeze(2)).sum(1).real
    torch.testing.assert_close(gram.along(group, theta.unsqueeze(1), vectors).squeeze(1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64])
@pytest.mark.parametrize("size", [64, 100, 600])
def test_the_growth_of_a_factor_is_bounded_where_all_eigenvalues_are_near_the_level(size: int, dtype: torch.dtype) -> None:
    """`A = I - G` is a few roundings of `I`: of the difference of two traces no digit would be right."""
    for times in (0.5, 1, 1.5, 2, 2.5, 3.5):
        left = times * torch.finfo(dtype).eps / 2
        matrix = torch.eye(size, dtype=torch.float64) * (1 - left) - left
        stored = matrix.to(dtype)
        largest = float(torch.linalg.eigvalsh(torch.eye(size) - stored.to(torch.complex128))[-1])  # = ‖R‖² ≤ ‖|R|‖²
        verdict = cholesky.below_(stored[None], 1.0, error=0.0, slack=1e-30)
        assert not bool(verdict.proven), times  # no room for any rounding
        if bool(verdict.doubtful):
            assert verdict.growth >= largest, times
