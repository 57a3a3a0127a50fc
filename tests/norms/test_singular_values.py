"""All singular values of circular convolutions: the ways that depend on the shape of the symbol, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spectral_hooks as sh

#: Weights, the input size and what else: single taps, strides, groups, more rows or columns, few frequencies.
KERNELS = {
    "square": ((6, 6, 3, 3), (8, 9), {}),
    "wide": ((4, 8, 3, 3), (8, 9), {}),
    "tall": ((9, 4, 3, 2), (9, 8), {}),
    "few frequencies": ((3, 6, 3, 3), (3, 3), {}),
    "strided": ((4, 4, 3, 3), (16, 12), {"stride": 2}),
    "grouped": ((12, 3, 3, 3), (8, 9), {"groups": 2}),
    "depthwise": ((5, 1, 3, 3), (7, 6), {"groups": 5}),
    "multiplied": ((10, 1, 3, 3), (7, 6), {"groups": 5}),
    "one output": ((1, 5, 3, 3), (6, 5), {}),
    "1×1": ((5, 4, 1, 1), (4, 5), {}),
    "1×1 strided": ((5, 4, 1, 1), (4, 6), {"stride": 2}),
    "1×3": ((3, 6, 1, 3), (4, 40), {}),
    "3×1 strided": ((3, 4, 3, 1), (40, 4), {"stride": (2, 1)}),
    "sequence": ((3, 6, 5), (48,), {}),
    "one tap": ((3, 6, 1), (7,), {}),
    "volume": ((3, 5, 2, 1, 3), (3, 4, 5), {}),
    "transposed": ((4, 6, 3, 3), (6, 8), {"stride": 2, "transposed": True, "padding": 1, "output_padding": 1}),
}


def circular(name: str, dtype: torch.dtype = torch.float64) -> sh.ConvOperator:
    shape, size, geometry = KERNELS[name]
    generator = torch.Generator().manual_seed(0)
    return sh.ConvOperator(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), **geometry).circular(size)


def dense(op: sh.ConvOperator) -> Tensor:
    return torch.linalg.svdvals(op.with_weight(op.weight.detach().double()).to_dense())


@pytest.mark.parametrize("name", KERNELS)
def test_they_are_those_of_the_dense_matrix(name: str) -> None:
    op = circular(name)
    torch.testing.assert_close(sh.singular_values(op), dense(op), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_in_single_precision(name: str) -> None:
    """Also with a gradient, which takes another way."""
    op = circular(name, torch.float32)
    exact = dense(op)
    values = sh.singular_values(op)
    assert values.dtype == torch.float32
    assert float((values - exact).abs().max() / exact[0]) < 1e-6
    weight = op.weight.clone().requires_grad_()
    traced = sh.singular_values(op.with_weight(weight))
    assert float((traced - exact).abs().max().detach() / exact[0]) < 1e-6
    (gradient,) = torch.autograd.grad(traced.square().sum() / 2, weight)
    # ‖A‖_F² counts each entry of the kernel once for every place where it stands
    places = exact.square().sum() / weight.detach().double().square().sum()
    torch.testing.assert_close(gradient.double(), places * weight.detach().double(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(sh.singular_values(op.with_weight(weight)), values)


@pytest.mark.parametrize("name", ["square", "wide", "strided", "grouped", "1×3", "1×1"])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_of_low_rank_and_any_size(name: str, scale: float) -> None:
    """What is zero comes out as nearly zero, relative to the largest, and nothing overflows."""
    op = circular(name, torch.float32)
    weight = op.weight.clone()
    weight[1:] = weight[:1]
    op = op.with_weight(weight * scale)
    values, exact = sh.singular_values(op), dense(op)
    assert int((exact < 1e-9 * exact[0]).sum()) >= len(exact) // 4
    assert float((values - exact).abs().max() / exact[0]) < 1e-6
    assert float(values.min()) >= 0


def test_of_zero() -> None:
    for name in KERNELS:
        op = circular(name, torch.float32)
        values = sh.singular_values(op.with_weight(torch.zeros_like(op.weight)))
        assert torch.equal(values, torch.zeros(min(op.to_dense().shape)))


@pytest.mark.parametrize("name", ["depthwise", "one output", "1×1", "1×3"])
def test_derivatives(name: str) -> None:
    op = circular(name)
    weights = torch.linspace(1, 2, min(op.to_dense().shape), dtype=torch.float64)

    def function(weight: Tensor) -> Tensor:
        return (sh.singular_values(op.with_weight(weight)).square() * weights).sum()

    assert torch.autograd.gradcheck(function, op.weight.requires_grad_())


@pytest.mark.parametrize(("dtype", "powers"), [(torch.float32, (-110, -70, 65, 120)), (torch.float64, (-950, -500, 500, 1000))])
@pytest.mark.parametrize("size", [6, 30])
def test_matrix_free_values_at_every_scale(size: int, dtype: torch.dtype, powers: tuple[int, ...]) -> None:
    """`σ(t A) = t σ(A)` to rounding, although squares leave the range of the dtype."""
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    plain = sh.ConvOperator(weight, padding=1, input_size=size)
    for power in powers:
        scaled = plain.with_weight(torch.ldexp(weight.double(), torch.tensor(power)).to(dtype))
        for measure in (sh.spectral_norm, lambda op: sh.singular_values(op, 3)):
            found = measure(scaled).double() * 2.0**-power
            expected = measure(plain).double()
            assert torch.allclose(found, expected, rtol=20 * torch.finfo(dtype).eps, atol=0)
