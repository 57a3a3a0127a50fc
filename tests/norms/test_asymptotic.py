"""Many norms at once, and singular values without the matrix."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from cases import CONVS, OPERATORS, Case, random, smooth
from torch import Tensor

import spectral_hooks as sh
from spectral_hooks.operators import LinearOperator

# -- many norms -------------------------------------------------------------------------------------------------------------


def operators(dtype: torch.dtype = torch.float64) -> list[LinearOperator]:
    """Some that go together, some that do not, mixed."""
    out: list[LinearOperator] = []
    for seed in range(3):
        kernel = random(4, 2, 3, 3, seed=seed).to(dtype)
        scaled = kernel * 10.0 ** (10 * seed - 10)
        out += [
            sh.ConvOperator(scaled).circular((5, 4)),
            sh.ConvOperator(kernel, stride=2).circular((6, 4)),
            sh.ConvOperator(kernel, groups=2).circular((5, 4)),
            sh.ConvOperator(kernel, transposed=True).circular((5, 4)),
            sh.ConvOperator(kernel),
            sh.ConvOperator(kernel, padding=1, input_size=4),
            sh.DenseOperator(kernel.flatten(1)),
            sh.DenseOperator(random(30, 30, seed=seed).to(dtype)),
            sh.DenseOperator(kernel.flatten(1) * 0),
            sh.ConvOperator(kernel).circular((7, 7)),
        ]
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_spectral_norms_are_those_one_by_one(dtype: torch.dtype) -> None:
    ops = operators(dtype)
    norms = sh.spectral_norms(ops)
    assert len(norms) == len(ops)
    for norm, op in zip(norms, ops, strict=True):
        expected = sh.spectral_norm(op)
        assert norm.shape == ()
        assert norm.dtype == expected.dtype
        assert float(norm) == pytest.approx(float(expected), rel=1e-12 if dtype == torch.float64 else 3e-6)


def test_spectral_norms_of_mixed_precisions_and_none() -> None:
    ops = operators(torch.float64)[:10] + operators(torch.float32)[10:20]
    assert [norm.dtype for norm in sh.spectral_norms(ops)] == [torch.float64] * 10 + [torch.float32] * 10
    assert sh.spectral_norms([]) == []
    same = sh.DenseOperator(random(3, 3))
    first, second = sh.spectral_norms([same, same])
    assert torch.equal(first, second)


def test_rtol_reaches_the_lattice_operators() -> None:
    op = sh.ConvOperator(random(4, 3, 3, 3))
    for rtol in (1e-1, 1e-4):
        assert torch.equal(sh.spectral_norms([op, op], rtol=rtol)[1], sh.spectral_norm(op, rtol=rtol))
    with pytest.raises(ValueError, match=r"`rtol`.*got"):
        sh.spectral_norms([op], rtol=0)


@pytest.mark.parametrize("name", ["dense", "circular", "circular-strided"])
def test_gradcheck_of_spectral_norms(name: str) -> None:
    weights = [random(3, 2, 3, 3, seed=seed).requires_grad_() for seed in range(3)]

    def norms(*ws: Tensor) -> Tensor:
        return torch.stack(sh.spectral_norms([OPERATORS[name](w) for w in ws]))

    assert torch.autograd.gradcheck(norms, weights, eps=1e-6, atol=1e-5)
    frozen = [w.detach() for w in weights[:2]]
    values = sh.spectral_norms([OPERATORS[name](w) for w in [*frozen, weights[2]]])
    assert [value.requires_grad for value in values] == [False, False, True]
    zero = torch.zeros(3, 2, 3, 3, requires_grad=True)
    value, _ = sh.spectral_norms([OPERATORS[name](w) for w in (zero, zero)])
    value.backward()
    assert float(value.detach()) == 0
    assert bool(torch.isfinite(zero.grad).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_spectral_norms_of_non_finite_weights_are_refused(bad: float) -> None:
    for name in ("dense", "circular", "lattice"):
        ops = [OPERATORS[name](w) for w in (random(3, 2, 3, 3), torch.full((3, 2, 3, 3), bad).double())]
        with pytest.raises(ValueError, match="`weight` contains NaN or infinity"):
            sh.spectral_norms(ops)


# -- without the matrix -----------------------------------------------------------------------------------------------------


def errors(values: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root mean square, relative to the largest singular value."""
    apart = (values - exact) / exact[0]
    return float(apart.abs().max()), float(apart.square().mean().sqrt())


#: Operator, and the errors that the docstring tells, in percent.
TOLD = {
    "random-8": (sh.ConvOperator(random(4, 4, 3, 3), padding=1, input_size=8), 9.3, 5.0),
    "random-16": (sh.ConvOperator(random(4, 4, 3, 3), padding=1, input_size=16), 4.8, 2.5),
    "smooth-16": (sh.ConvOperator(smooth(4, 4, 3, 3), padding=1, input_size=16), 3.8, 0.6),
    "wide-12": (sh.ConvOperator(random(4, 3, 5, 5), padding=2, input_size=12), 9.3, 6.0),
    "valid-16": (sh.ConvOperator(random(3, 3, 3, 3), input_size=16), 4.6, 2.5),
    "strided-16": (sh.ConvOperator(random(3, 4, 3, 3), padding=1, stride=2, input_size=16), 18.7, 4.4),
}


@pytest.mark.parametrize("name", TOLD)
def test_errors_against_dense_cases(name: str) -> None:
    op, largest, mean = TOLD[name]
    found = errors(sh.asymptotic_singular_values(op), torch.linalg.svdvals(op.to_dense()))
    assert found[0] <= (largest + 0.06) / 100
    assert found[1] <= (mean + 0.06) / 100


def test_closer_than_the_circular_operator() -> None:
    """For a trained kernel's kind: from an interpolated quantile function rather than from the circular grid."""
    op = TOLD["smooth-16"][0]
    exact = torch.linalg.svdvals(op.to_dense())
    ours, circular = sh.asymptotic_singular_values(op), sh.singular_values(op.circular(16))
    assert all(a < 0.8 * b for a, b in zip(errors(ours, exact), errors(circular, exact), strict=True))


@pytest.mark.parametrize("make", [random, smooth], ids=lambda f: f.__name__)
def test_error_shrinks_with_the_input(make) -> None:
    kernel = make(2, 3, 3)
    found = []
    for n in (16, 32, 64, 128):
        op = sh.ConvOperator(kernel, padding=1, input_size=n)
        found.append(errors(sh.asymptotic_singular_values(op), torch.linalg.svdvals(op.to_dense()))[1])
    assert all(later < earlier for earlier, later in pairwise(found))
    assert found[-1] < 0.4 * found[0]


def test_nearly_exact_for_a_symmetric_band() -> None:
    """Toeplitz ranks: the eigenvalues `2 cos(π i / (n + 1))` of a second difference are the quantiles of its symbol."""
    op = sh.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]], dtype=torch.float64), padding=1, input_size=20)
    assert errors(sh.asymptotic_singular_values(op), torch.linalg.svdvals(op.to_dense()))[0] < 2e-3


@pytest.mark.parametrize("case", [case for case in CONVS if case.mode == "zeros"], ids=str)
def test_every_geometry(case: Case) -> None:
    """As many as there are, descending, not above the lattice norm; the same from the layer without an input size."""
    weight = case.layer().weight.detach()
    op = case.operator(weight)
    values = sh.asymptotic_singular_values(op)
    assert values.shape == (min(prod(op.in_shape), prod(op.out_shape)),)
    assert bool((values.diff() <= 0).all())
    assert bool((values >= 0).all())
    assert float(values[0]) <= float(sh.spectral_norm(case.operator(weight, finite=False)))
    if not isinstance(case.padding, str):
        assert torch.equal(values, sh.asymptotic_singular_values(case.operator(weight, finite=False), case.size))


def test_gradcheck_of_asymptotic_singular_values() -> None:
    weight = random(2, 2, 2).requires_grad_()

    def energy(w: Tensor) -> Tensor:
        return sh.asymptotic_singular_values(sh.ConvOperator(w, padding=1), 5).square().sum()

    assert torch.autograd.gradcheck(energy, weight, eps=1e-6, atol=1e-4)


def test_precisions() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        op = sh.ConvOperator(random(2, 2, 3).to(dtype), padding=1, input_size=9)
        values = sh.asymptotic_singular_values(op)
        assert values.dtype == torch.float32
        expected = sh.asymptotic_singular_values(op.with_weight(op.weight.double()))
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)


def test_mistakes() -> None:
    kernel = random(2, 2, 3)
    with pytest.raises(TypeError, match="`op` must be a ConvOperator"):
        sh.asymptotic_singular_values(sh.DenseOperator(torch.eye(2)))
    with pytest.raises(ValueError, match="input_size"):
        sh.asymptotic_singular_values(sh.ConvOperator(kernel))
    for mode in ("circular", "reflect", "replicate"):
        with pytest.raises(ValueError, match="`op` must be zero-padded"):
            sh.asymptotic_singular_values(sh.ConvOperator(kernel, padding=1, padding_mode=mode, input_size=5))
    with pytest.raises(ValueError, match="NaN or infinity"):
        sh.asymptotic_singular_values(sh.ConvOperator(kernel * float("nan"), input_size=5))
    with pytest.raises(ValueError, match="meta device"):
        sh.asymptotic_singular_values(sh.ConvOperator(kernel.to("meta"), input_size=5))
