"""`conv_norm`; what it has in common with the other modules that take the place of a convolution is in `test_skew.py`."""

from __future__ import annotations

import pytest
import torch
from cases import CONVS, GEOMETRIES, Case, apply_to_identity, in_shape
from cases import conv_layer as made
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.parametrizations.conv_norm import conv_norm


def divides(case: Case) -> bool:
    """Whether circular padding keeps the size, or divides it by the stride."""
    if case.mode != "circular" or case.transposed:
        return False
    op = case.operator(case.layer().weight)
    return all(n == rows * s for n, rows, s in zip(op.in_shape[1:], op.out_shape[1:], op.stride, strict=True))


def per_output(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix of each output channel."""
    return apply_to_identity(layer, shape).unflatten(0, (layer.weight.shape[0], -1))


@pytest.mark.parametrize("case", list(filter(divides, CONVS)), ids=str)
def test_every_output_channel_has_gain_one(case: Case) -> None:
    matrices = per_output(conv_norm(case.layer()), case.in_shape)
    grams = matrices @ matrices.mT
    assert torch.allclose(grams, torch.eye(grams.shape[-1], dtype=grams.dtype).expand_as(grams), atol=1e-9)


def test_there_are_such_cases() -> None:
    found = list(filter(divides, CONVS))
    assert len(found) > 30
    assert any(set(case.operator(case.layer().weight).stride) != {1} for case in found)


@pytest.mark.parametrize("size", [(3, 3), (5, 8), (9, 4)])
def test_at_every_input_size(size: tuple[int, int]) -> None:
    layer = conv_norm(made("circular", gain=7)).eval()
    matrices = per_output(layer, (3, *size))
    grams = matrices @ matrices.mT
    assert torch.allclose(grams, torch.eye(grams.shape[-1], dtype=grams.dtype).expand_as(grams), atol=1e-9)
    norm = float(torch.linalg.matrix_norm(matrices.flatten(0, 1), 2))
    assert 1 <= norm <= 3**0.5


@pytest.mark.parametrize("name", ["square", "stride", "grouped", "even", "dilated"])
def test_is_the_filter_after_the_convolution(name: str) -> None:
    """Against the definition: divided in the Fourier domain by the length of the kernel's transform."""
    plain = made(name, bias=True)
    x = torch.randn(2, *in_shape(name), dtype=torch.float64)
    y, (sh_, sw) = plain(x) - plain.bias.view(-1, 1, 1), plain.stride
    *_, height, width = y.shape
    kernel = torch.zeros(*plain.weight.shape[:2], height * sh_, width * sw, dtype=torch.float64)
    for (i, j), (d, e) in ((t, plain.dilation) for t in torch.cartesian_prod(*map(torch.arange, plain.kernel_size)).tolist()):
        kernel[:, :, i * d, j * e] += plain.weight.detach()[:, :, i, j]
    # what a stride folds onto one frequency
    energy = torch.fft.fft2(kernel).abs().square().sum(1).unflatten(1, (sh_, height)).unflatten(3, (sw, width)).mean((1, 3))
    expected = torch.fft.ifft2(torch.fft.fft2(y) / energy.sqrt()).real + plain.bias.view(-1, 1, 1)
    assert torch.allclose(conv_norm(plain)(x), expected, atol=1e-9)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_any_padding(mode: str) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode, dtype=torch.float64)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    expected = plain(x) - plain.bias.view(-1, 1, 1)
    layer = conv_norm(plain)
    gain = layer._gain(layer.weight, tuple(expected.shape[2:]))
    back = torch.fft.irfft2(torch.fft.rfft2(layer(x) - layer.bias.view(-1, 1, 1)) / gain, s=expected.shape[2:])
    assert torch.allclose(back, expected, atol=1e-12)


def test_the_length_of_a_filter_makes_no_difference() -> None:
    x = torch.randn(2, *in_shape("circular"), dtype=torch.float64)
    expected = conv_norm(made("circular"))(x)
    for gain in (1e-20, 1e20):
        assert torch.allclose(conv_norm(made("circular", gain=gain))(x), expected, atol=1e-9)


def test_where_a_filter_has_no_energy() -> None:
    """Differences have none at frequency zero, and a filter of zeros has none at all."""
    layer = nn.Conv1d(1, 2, 2, padding="same", padding_mode="circular", bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[-1.0, 1.0]], [[0.0, 0.0]]]))
    layer = conv_norm(layer)
    differences, zeros = per_output(layer, (1, 8))
    values = torch.linalg.svdvals(differences)
    assert torch.allclose(values[:-1], torch.ones(7, dtype=torch.float64), atol=1e-9)
    assert float(values[-1]) < 1e-9
    assert not bool(zeros.any())
    layer(torch.randn(1, 1, 8, dtype=torch.float64)).square().sum().backward()
    assert bool(layer.weight.grad.isfinite().all())


@pytest.mark.parametrize("name", ["stride", "grouped", "dilated"])
def test_gradcheck(name: str) -> None:
    layer = conv_norm(made(name, bias=True))
    x = torch.randn(2, *in_shape(name), dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_training_keeps_it() -> None:
    layer = conv_norm(made("circular", torch.float32))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x, y = torch.randn(8, 3, 5, 4), torch.randn(8, 3, 5, 4)
    for _ in range(200):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    for mode in (True, False):
        matrices = per_output(layer.train(mode), (3, 5, 4)).double()
        grams = matrices @ matrices.mT
        assert torch.allclose(grams, torch.eye(20, dtype=torch.float64).expand_as(grams), atol=1e-5)


def test_patches_have_rows_of_length_one() -> None:
    layer = conv_norm(made("patches"))
    rows = sh.as_operator(layer).weight.flatten(1).norm(dim=1)
    assert torch.allclose(rows, torch.ones_like(rows))
    assert layer.to_plain().kernel_size == (4, 4)


@pytest.mark.parametrize(
    ("layer", "error", "match"),
    [
        (nn.Linear(2, 2), TypeError, "got Linear"),
        (nn.ConvTranspose2d(2, 2, 3), NotImplementedError, "transposed"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), ValueError, "parametrized"),
    ],
)
def test_refuses(layer: nn.Module, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        conv_norm(layer)


def test_refuses_a_forward_of_its_own() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(NotImplementedError, match="forward of its own"):
        conv_norm(Scaled(2, 2, 3))


def test_geometries_are_all_taken() -> None:
    for name in GEOMETRIES:
        assert conv_norm(made(name)) is not None
