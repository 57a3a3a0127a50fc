"""`cayley`; what it has in common with the other modules that take the place of a convolution is in `test_skew.py`."""

from __future__ import annotations

import pytest
import torch
from cases import GEOMETRIES, apply_to_identity, in_shape, train
from cases import all_singular_values as singular_values
from cases import conv_layer as made
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.parametrizations.cayley import cayley

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("gain", [0.1, 1, 30, 1e4])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_all_singular_values_are_one(name: str, gain: float, dtype: torch.dtype) -> None:
    for mode in (True, False):
        values = singular_values(cayley(made(name, dtype, gain)).train(mode), in_shape(name))
        assert float((values.square() - 1).abs().max()) <= ROUNDING[dtype]


@pytest.mark.parametrize("name", ["square", "stride", "1-D", "dilated", "more outputs", "3-D"])
def test_at_every_input_size(name: str) -> None:
    layer = cayley(made(name, gain=5)).eval()
    channels, *size = in_shape(name)
    for grown in ([0] * len(size), [2] * len(size), [4, *[0] * (len(size) - 1)]):
        values = singular_values(layer, (channels, *(n + more for n, more in zip(size, grown, strict=True))))
        assert float((values.square() - 1).abs().max()) <= 1e-12


@pytest.mark.parametrize("channels", [(64, 64), (96, 64), (64, 130)])
def test_wide_layers_in_single_precision(channels: tuple[int, int]) -> None:
    """At every frequency, since the dense matrix is too large."""
    for gain in (1, 20):
        torch.manual_seed(0)
        layer = cayley(nn.Conv2d(*channels, 3, padding=1))
        with torch.no_grad():
            q = layer._transform(layer.weight * gain, (6, 7)).to(torch.complex128)
        gram = q.mH @ q if q.shape[-2] > q.shape[-1] else q @ q.mH
        assert float(torch.linalg.matrix_norm(gram - torch.eye(len(gram[0])), 2).max()) <= 2e-6


def test_is_the_cayley_transform_of_the_circular_convolution() -> None:
    plain = made("circular")
    convolution = apply_to_identity(plain, in_shape("circular"))
    skew_part, identity = convolution - convolution.T, torch.eye(len(convolution), dtype=convolution.dtype)
    expected = torch.linalg.solve(identity + skew_part, identity - skew_part)
    assert torch.allclose(apply_to_identity(cayley(plain), in_shape("circular")), expected, atol=1e-12)


def test_commutes_with_shifts() -> None:
    """Around the edge: it is a circular convolution."""
    layer = cayley(made("more outputs"))
    x = torch.randn(2, *in_shape("more outputs"), dtype=torch.float64)
    assert torch.allclose(layer(x.roll((2, 1), (2, 3))), layer(x).roll((2, 1), (2, 3)), atol=1e-12)


def test_zero_padding_becomes_circular() -> None:
    zeros, circular = made("square"), made("square")
    circular.padding_mode = "circular"
    x = torch.randn(2, *in_shape("square"), dtype=torch.float64)
    assert torch.equal(cayley(zeros)(x), cayley(circular)(x))


def test_zero_weight_is_the_identity() -> None:
    x = torch.randn(2, *in_shape("square"), dtype=torch.float64)
    assert torch.allclose(cayley(made("square", gain=0))(x), x, atol=1e-14)


@pytest.mark.parametrize("name", ["stride", "more outputs", "fewer outputs", "grouped"])
def test_gradcheck(name: str) -> None:
    layer = cayley(made(name, bias=True))
    x = torch.randn(2, *in_shape(name), dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["square", "stride"])
def test_training_keeps_it(name: str) -> None:
    layer = cayley(made(name, torch.float32))
    before = layer.weight.detach().clone()
    train(layer, in_shape(name))
    assert float((layer.weight - before).detach().norm()) > float(before.norm())
    for mode in (True, False):
        values = singular_values(layer.train(mode), in_shape(name))
        assert float((values.square() - 1).abs().max()) <= 2e-6


def test_an_operator_of_patches_passes_gradients_on() -> None:
    layer = cayley(made("patches"))
    op = sh.as_operator(layer)
    (op.weight * torch.randn_like(op.weight)).sum().backward()
    assert bool(layer.weight.grad.any())
    assert float(sh.spectral_norm(op).detach()) == pytest.approx(1, abs=1e-9)
