"""`skew`, `cayley` and `group_shuffle` of transposed convolutions: the adjoint of what the mirrored convolution becomes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import GEOMETRIES, apply_to_identity, train
from torch import Tensor, nn

import spectral_hooks as sh

P = sh.parametrizations

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
#: Those that torch has transposed: no padding but zeros, and the same amount on both sides.
NAMES = [
    name
    for name, (_, settings, _) in GEOMETRIES.items()
    if settings.get("padding") != "same" and settings.get("padding_mode", "zeros") == "zeros"
]
FUNCTIONS = {"skew": P.skew, "skew 5": lambda layer, gain=1.0: P.skew(layer, gain, degree=5), "cayley": P.cayley}
each = pytest.mark.parametrize("function", FUNCTIONS)
#: What the polynomial of skew convolutions is off by, in squares.
NEAR = {"skew": 6.1e-6, "skew 5": 6.1e-6, "cayley": 1e-12}


def output_padding(settings: dict[str, object], taps: object, dims: int) -> tuple[int, ...]:
    """What makes torch's output the stride times as large as the input, found by trying."""
    found = []
    for axis in range(dims):
        per_axis = {key: value if isinstance(value, int) else value[axis] for key, value in settings.items() if key != "groups"}
        k, stride = taps if isinstance(taps, int) else taps[axis], per_axis.get("stride", 1)
        for extra in range(stride):
            if nn.ConvTranspose1d(1, 1, k, output_padding=extra, **per_axis)(torch.zeros(1, 1, 8)).shape[-1] == 8 * stride:
                found.append(extra)
    assert len(found) == dims
    return tuple(found)


def pair(name: str, dtype: torch.dtype = torch.float64, gain: float = 1.0, bias: bool = False) -> tuple[nn.Module, nn.Module]:
    """A transposed convolution, and the convolution that it is the adjoint of, with the same kernel."""
    torch.manual_seed(0)
    (inputs, outputs, taps), settings, size = GEOMETRIES[name]
    extra = output_padding(settings, taps, len(size))
    layer = TRANSPOSED[len(size)](outputs, inputs, taps, output_padding=extra, bias=bias, **settings).to(dtype)
    mirrored = PLAIN[len(size)](inputs, outputs, taps, bias=False, **settings).to(dtype)
    with torch.no_grad():
        layer.weight.mul_(gain)
        mirrored.weight.copy_(layer.weight)
    return layer, mirrored


def shapes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of an input of the transposed layer, and of its output."""
    (inputs, outputs, _), settings, size = GEOMETRIES[name]
    stride = settings.get("stride", 1)
    stride = (stride,) * len(size) if isinstance(stride, int) else stride
    return (outputs, *(n // s for n, s in zip(size, stride, strict=True))), (inputs, *size)


def test_there_are_many_geometries() -> None:
    assert len(NAMES) >= 18
    assert {len(GEOMETRIES[name][2]) for name in NAMES} == {1, 2, 3}
    assert any(any(pair(name)[0].output_padding) for name in NAMES)


@each
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gain", [0.1, 1, 1e3])
def test_is_the_adjoint_of_what_the_mirrored_convolution_becomes(function: str, name: str, gain: float) -> None:
    """Dense matrices in float64, of modules that were made apart, and at more than one size."""
    layer, mirrored = (FUNCTIONS[function](one, 0.7) for one in pair(name, gain=gain))
    (channels, *small), (others, *large) = shapes(name)
    for grown in (0, 1):
        stride = [n // m for n, m in zip(large, small, strict=True)]
        sizes = tuple(n + grown for n in small), tuple(n + grown * s for n, s in zip(large, stride, strict=True))
        matrix = apply_to_identity(layer, (channels, *sizes[0]))
        torch.testing.assert_close(matrix, apply_to_identity(mirrored, (others, *sizes[1])).T, rtol=0, atol=1e-12)
        values = torch.linalg.svdvals(matrix) / 0.7
        assert float((values.square() - 1).abs().max()) <= NEAR[function]
    x, y = torch.randn(2, channels, *small, dtype=torch.float64), torch.randn(2, others, *large, dtype=torch.float64)
    assert float((layer(x) * y).sum().detach()) == pytest.approx(float((x * mirrored(y)).sum().detach()), rel=1e-10, abs=1e-12)


@each
@pytest.mark.parametrize("name", NAMES)
def test_shapes_types_and_bias_are_the_plain_ones(function: str, name: str) -> None:
    plain, _ = pair(name, torch.float32, bias=True)
    x = torch.randn(2, *shapes(name)[0])
    expected, keys = plain(x), {key: value.shape for key, value in plain.state_dict().items()}
    weight, bias = plain.weight, plain.bias
    layer = FUNCTIONS[function](plain.eval())
    y = layer(x)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    assert not layer.training
    assert layer.weight is weight
    assert layer.bias is bias
    assert {key: value.shape for key, value in layer.state_dict().items()} == keys
    torch.testing.assert_close(layer(x[0]), y[0], rtol=0, atol=1e-6)
    offset = layer(torch.zeros_like(x))
    torch.testing.assert_close(offset, bias.view(-1, *[1] * (x.ndim - 2)).expand_as(offset))


@each
def test_in_single_precision(function: str) -> None:
    for name in ("square", "stride", "stem", "grouped stride, overlap", "3-D"):
        layer = FUNCTIONS[function](pair(name, torch.float32, 3)[0], 2.0)
        values = torch.linalg.svdvals(apply_to_identity(layer, shapes(name)[0]).double()) / 2
        assert float((values.square() - 1).abs().max()) <= 1.2e-5


@each
@pytest.mark.parametrize("name", ["square", "stride", "more outputs"])
def test_training_keeps_it(function: str, name: str) -> None:
    layer = FUNCTIONS[function](pair(name, torch.float32)[0])
    before = layer.weight.detach().clone()
    train(layer, shapes(name)[0], steps=60)
    assert float((layer.weight - before).detach().norm()) > 0.5 * float(before.norm())
    for mode in (True, False):
        values = torch.linalg.svdvals(apply_to_identity(layer.train(mode), shapes(name)[0]).double())
        assert float((values.square() - 1).abs().max()) <= 1.2e-5


@each
@pytest.mark.parametrize("name", ["square", "stride", "fewer outputs", "grouped stride, overlap"])
def test_gradcheck(function: str, name: str) -> None:
    layer = FUNCTIONS[function](pair(name, bias=True)[0], 1.5)
    x = torch.randn(2, *shapes(name)[0], dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@each
def test_checkpoints_copies_and_memory(function: str) -> None:
    layer, twin = (FUNCTIONS[function](pair("stride", bias=True)[0], 0.5).eval() for _ in range(2))
    x = torch.randn(2, *shapes("stride")[0], dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
        plain = pair("stride", gain=-0.3, bias=True)[0].state_dict()
        for one in (layer, twin):
            one.load_state_dict(plain)
        assert not torch.allclose(layer(x), before)
        expected = FUNCTIONS[function](pair("stride", gain=-0.3, bias=True)[0], 0.5)(x)
        torch.testing.assert_close(layer(x), expected)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for copied in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            torch.testing.assert_close(copied(x), expected)
            assert copied.max_norm == 0.5


@each
@pytest.mark.parametrize("name", ["1×1", "patches", "patches with gaps", "grouped stride"])
def test_layers_without_overlap_have_a_plain_equal(function: str, name: str) -> None:
    layer = FUNCTIONS[function](pair(name, bias=True)[0], 3.0)
    shape, _ = shapes(name)
    x = torch.randn(2, *shape, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(sh.as_operator(layer, shape[1:]).to_dense(), apply_to_identity(layer, shape), rtol=0, atol=1e-12)
    assert float(sh.spectral_norm(layer, rtol=1e-6).detach()) == pytest.approx(3, rel=1e-5)
    model = sh.remove_spectral(nn.Sequential(layer))
    assert type(model[0]) is nn.ConvTranspose2d
    assert model[0].bias is layer.bias
    torch.testing.assert_close(model[0](x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{"padding": 1}, {"padding": 1, "stride": 2, "output_padding": 1}, {"groups": 2, "padding": 1}],
    ids=["square", "stride", "groups"],
)
def test_of_group_shuffles(settings: dict[str, int]) -> None:
    """The same for `A = p(J) Q`, whose parameters are others: the mirrored module is given them."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(16, 4, 3, bias=False, **settings).double()
    mirrored = nn.Conv2d(4, 16, 3, bias=False, **{key: v for key, v in settings.items() if key != "output_padding"}).double()
    mirrored.weight.data = layer.weight.data.clone()
    plain, other = copy.deepcopy(layer), copy.deepcopy(layer)
    layer, mirrored = (P.group_shuffle(one, 0.7, blocks=2) for one in (layer, mirrored))
    for first, second in zip(layer.parameters(), mirrored.parameters(), strict=True):
        torch.testing.assert_close(first, second)
        with torch.no_grad():
            first.normal_().mul_(0.4)
            second.copy_(first)
    s = layer.geometry.stride[0]
    matrix = apply_to_identity(layer, (16, 4, 3))
    torch.testing.assert_close(matrix, apply_to_identity(mirrored, (4, 4 * s, 3 * s)).T, rtol=0, atol=1e-12)
    values = torch.linalg.svdvals(matrix)[: min(matrix.shape)] / 0.7
    assert float((values.square() - 1).abs().max()) <= 6.1e-6
    x = torch.randn(2, 16, 4, 3, dtype=torch.float64)
    assert layer(x).shape == plain(x).shape
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(x), P.group_shuffle(other, 0.7, blocks=2)(x))


@each
def test_half_precision_and_autocast_compute_in_single(function: str) -> None:
    layer = FUNCTIONS[function](pair("stride", torch.float32, bias=True)[0], 1.5)
    x = torch.randn(2, *shapes("stride")[0])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-3, atol=1e-6)
    low = copy.deepcopy(layer).bfloat16()
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), copy.deepcopy(low).float()(x.bfloat16().float()), rtol=5e-3, atol=1e-6)
    y.sum().backward()
    assert low.weight.grad.dtype == torch.bfloat16
    assert bool(low.weight.grad.isfinite().all())


def test_output_size() -> None:
    """As torch's transposed layers take it; but only one is the adjoint's."""
    layer = P.skew(nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1))
    x = torch.randn(1, 3, 4, 5)
    assert torch.equal(layer(x, output_size=[8, 10]), layer(x))
    assert torch.equal(layer(x, output_size=torch.zeros(1, 2, 8, 10).size()), layer(x))
    with pytest.raises(ValueError, match=r"`output_size` must be \(8, 10\).*got \(7, 9\)"):
        layer(x, output_size=[7, 9])
    with pytest.raises(ValueError, match="`output_size` must be None"):
        P.skew(nn.Conv2d(3, 3, 3, padding=1))(x, output_size=[4, 5])
    with pytest.raises(ValueError, match=r"`x` must have shape \(batch, 3, size, size\)"):
        layer(torch.randn(1, 2, 4, 5))


def test_repr_tells_every_setting() -> None:
    layer = P.skew(nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False), 2, degree=5)
    assert repr(layer) == (
        "SkewConv(6, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), output_padding=(1, 1), groups=2, transposed=True, "
        "bias=False, max_norm=2.0, degree=5)"
    )
    layer = P.cayley(nn.Conv2d(2, 4, 3, padding="same", dilation=2, padding_mode="circular"))
    assert repr(layer) == (
        "CayleyConv(2, 4, kernel_size=(3, 3), stride=(1, 1), padding=(2, 2), dilation=2, padding_mode='circular', max_norm=1.0)"
    )
    assert "padding='same'" in repr(P.cayley(nn.Conv1d(2, 4, 4, padding="same")))
