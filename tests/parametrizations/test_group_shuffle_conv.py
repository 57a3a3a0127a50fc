"""parametrizations.group_shuffle on convolutions: orthogonal under zero padding, channels in groups, mixed by a matrix."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import apply_to_identity
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import spectral_hooks as sh
from spectral_hooks.parametrizations import remove_spectral, spectral_report
from spectral_hooks.parametrizations.group_shuffle import GroupShuffleConv, group_shuffle
from spectral_hooks.parametrizations.rescaled import rescaled
from spectral_hooks.parametrizations.skew_kernels import modulus_one
from spectral_hooks.weights.selection import select

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

#: Inputs, outputs, kernel, settings, blocks; and an input size that every stride divides.
GEOMETRIES = {
    "square": ((16, 16, 3), {"padding": 1}, 4, (3, 4)),
    "uneven blocks": ((6, 6, 3), {"padding": 1}, 2, (5, 4)),
    "a single block": ((4, 4, 3), {"padding": 1}, 1, (5, 4)),
    "smaller than the kernel": ((8, 8, 5), {"padding": 2}, 2, (3, 2)),
    "more outputs": ((3, 8, 3), {"padding": 1}, 2, (5, 4)),
    "fewer outputs": ((8, 4, 3), {"padding": 1}, 2, (5, 4)),
    "even": ((6, 6, (4, 2)), {"padding": "same"}, 2, (6, 5)),
    "1×1": ((4, 6, 1), {}, 2, (2, 3)),
    "stride": ((2, 6, 3), {"padding": 1, "stride": 2}, 2, (6, 8)),
    "stem": ((1, 4, 7), {"padding": 3, "stride": 2}, 2, (8, 6)),
    "patches": ((2, 4, 4), {"stride": 4}, 2, (8, 4)),
    "patches with gaps": ((2, 10, 1), {"stride": 2}, 2, (4, 6)),
    "grouped": ((8, 12, 3), {"padding": 1, "groups": 2}, 2, (4, 3)),
    "dilated": ((4, 4, 3), {"padding": 2, "dilation": 2}, 2, (6, 5)),
    "1-D": ((9, 12, 5), {"padding": 2}, 3, (9,)),
    "3-D": ((4, 4, 3), {"padding": 1}, 2, (3, 2, 4)),
    "circular": ((6, 6, 3), {"padding": 1, "padding_mode": "circular"}, 2, (5, 4)),
}


def plain(name: str, dtype: torch.dtype = torch.float64, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    arguments, settings, _, size = GEOMETRIES[name]
    return CONVS[len(size)](*arguments, bias=bias, **settings).to(dtype)


def made(name: str, dtype: torch.dtype = torch.float64, bias: bool = False) -> GroupShuffleConv:
    return group_shuffle(plain(name, dtype, bias), blocks=GEOMETRIES[name][2])


def randomize(layer: GroupShuffleConv, scale: float = 0.5) -> GroupShuffleConv:
    with torch.no_grad():
        for free in (layer.weight, layer.mixing):
            free.normal_().mul_(scale)
    return layer


def in_shape(name: str) -> tuple[int, ...]:
    (channels, *_), _, _, size = GEOMETRIES[name]
    return (channels, *size)


def singular_values(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """All `min(outputs, inputs)` of them."""
    return torch.linalg.svdvals(apply_to_identity(layer, shape).double())


# -- orthogonal -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("scale", [None, 0.1, 100])
def test_all_singular_values_are_one(name: str, scale: float | None) -> None:
    for dtype in (torch.float64, torch.float32):
        layer = made(name, dtype)
        assert isinstance(layer, GroupShuffleConv)
        if scale:
            randomize(layer, scale)
        values = singular_values(layer, in_shape(name))
        assert float((values.square() - 1).abs().max()) <= (6.1e-6 if dtype == torch.float64 else 1.2e-5)
        assert float(values[0]) <= 1 + (1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("name", ["square", "stride", "1-D", "dilated"])
def test_at_every_input_size(name: str) -> None:
    layer = randomize(made(name))
    channels, *size = in_shape(name)
    for grown in (0, 2, 4):
        values = singular_values(layer, (channels, *(n + grown for n in size)))
        assert float((values.square() - 1).abs().max()) <= 6.1e-6


def test_it_is_what_the_equation_says() -> None:
    """`p(J) Q` with dense matrices: `Q` by an orthogonal 1×1 layer, `J` from a grouped convolution and its transpose."""
    layer = randomize(made("square"), 0.03)
    mixer = group_shuffle(nn.Conv2d(16, 16, 1).double(), blocks=4)
    with torch.no_grad():
        mixer.parametrizations.weight.original.copy_(layer.mixing)
    grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False).double()
    with torch.no_grad():
        grouped.weight.copy_(layer.weight)
    q, m = (apply_to_identity(one, in_shape("square")) for one in (mixer, grouped))
    j = m - m.T
    assert float(torch.linalg.matrix_norm(j, 2)) < 0.7  # not scaled down
    p = sum(c * torch.linalg.matrix_power(j, t) for t, c in enumerate(modulus_one(4)))
    matrix = apply_to_identity(layer, in_shape("square"))
    torch.testing.assert_close(matrix, p @ q, rtol=0, atol=1e-12)
    # every output channel depends on every input channel
    assert bool((matrix.unflatten(0, (16, -1)).unflatten(2, (16, -1)).abs().amax((1, 3)) > 1e-8).all())


def test_parameters_are_few() -> None:
    layer = made("square")
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (16, 4, 3, 3),
        "mixing": (2, 1, 4, 4, 4),
    }
    assert not list(layer.buffers())


def test_the_start_is_near() -> None:
    """The identity stays; an orthogonal convolution of this kind, of a small angle, nearly so; others become nearer ones."""
    identity = plain("square")
    nn.init.dirac_(identity.weight)
    layer = group_shuffle(copy.deepcopy(identity), blocks=4)
    torch.testing.assert_close(apply_to_identity(layer, in_shape("square")), torch.eye(16 * 12, dtype=torch.float64))
    # the first two terms of A, as a kernel
    small = randomize(made("square"), 0.02)
    centre = small._generator(small.weight.detach()).unflatten(0, (4, 4))
    kernel = torch.stack([torch.block_diag(*centre[:, :, :, x, y]) for x in range(3) for y in range(3)], -1)
    kernel[..., 4] += torch.eye(16, dtype=torch.float64)
    frame = small._frame(small.mixing.detach())[0]
    again = plain("square")
    again.weight.data = torch.einsum("oct,ci->oit", kernel, frame).unflatten(-1, (3, 3))
    again = group_shuffle(again, blocks=4)
    x = torch.randn(4, *in_shape("square"), dtype=torch.float64)
    y = small(x)
    unmixed = F.conv2d(x, frame[..., None, None])
    assert float((again(x) - y).detach().norm()) < 0.1 * float((unmixed - y).detach().norm())


# -- training and gradients -------------------------------------------------------------------------------------------------


def test_orthogonal_after_training() -> None:
    torch.manual_seed(0)
    layer = group_shuffle(nn.Conv2d(8, 8, 3, padding=1), blocks=2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(8, 8, 6, 6)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), x.roll((1, 1), (1, 2)))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert float((singular_values(layer, (8, 5, 6)).square() - 1).abs().max()) < 1.2e-5


@pytest.mark.parametrize("name", ["uneven blocks", "stride"])
def test_gradients(name: str) -> None:
    layer = made(name, bias=True)
    x = torch.randn(1, *in_shape(name), dtype=torch.float64, requires_grad=True)
    parameters = {key: value.detach().clone().requires_grad_() for key, value in layer.named_parameters()}

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


def test_a_start_at_zero_can_be_left() -> None:
    layer = made("square")
    with torch.no_grad():
        layer.weight.zero_()
    layer(torch.randn(1, *in_shape("square"), dtype=torch.float64)).square().mul(torch.arange(4)).sum().backward()
    assert bool(layer.weight.grad.isfinite().all())
    assert bool(layer.weight.grad.any())
    assert bool(layer.mixing.grad.any())


# -- in a model ------------------------------------------------------------------------------------------------------------


def test_checkpoints_and_copies() -> None:
    layer, other = randomize(made("stride", bias=True)), made("stride", bias=True)
    x = torch.randn(2, *in_shape("stride"), dtype=torch.float64)
    y = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), y)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("name", ["square", "stride", "grouped", "even", "a single block"])
def test_plain_checkpoints_load_as_the_start(name: str) -> None:
    model, source = nn.Sequential(randomize(made(name, bias=True))), plain(name, bias=True)
    model.load_state_dict(nn.Sequential(source).state_dict())
    x = torch.randn(2, *in_shape(name), dtype=torch.float64)
    assert torch.equal(model(x), group_shuffle(source, blocks=GEOMETRIES[name][2])(x))
    state = model.state_dict()
    del state["0.mixing"]
    if name != "a single block":  # whose kernel is as large as the plain one
        with pytest.raises(RuntimeError, match="mixing"):
            model.load_state_dict(state)
    bad = plain(name, bias=True)
    bad.weight.data.flatten()[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.load_state_dict(nn.Sequential(bad).state_dict())


def test_half_precision_and_autocast_compute_in_single() -> None:
    layer = made("square", torch.float32, bias=True)
    x = torch.randn(2, *in_shape("square"))
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), exact, atol=0, rtol=5e-3)
    low = copy.deepcopy(layer).bfloat16()
    rounded = copy.deepcopy(low).float()
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), rounded(x.bfloat16().float()), rtol=5e-3)
    y.sum().backward()
    for free in (low.weight, low.mixing):
        assert free.grad.dtype == torch.bfloat16
        assert bool(free.grad.isfinite().all())
    assert group_shuffle(plain("square", torch.bfloat16), blocks=4).mixing.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["square", "stride", "circular"])
def test_compiles_to_one_graph(name: str) -> None:
    layer = made(name, torch.float32)
    x = torch.randn(2, *in_shape(name))
    torch._dynamo.reset()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert torch.allclose(y, layer(x), atol=1e-6)
    y.square().mul(x.mean()).sum().backward()
    assert bool(layer.weight.grad.any())


def test_evaluation_remembers_until_a_parameter_changes() -> None:
    layer = made("square").eval()
    x = torch.randn(1, *in_shape("square"), dtype=torch.float64)
    calls = []
    for name in ("_generator", "_frame"):
        make = getattr(layer, name)
        setattr(layer, name, lambda *args, make=make, name=name: calls.append(name) or make(*args))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(layer(x), y)
        assert sorted(calls) == ["_frame", "_generator"]
        layer.mixing.data.mul_(-0.5)
        assert not torch.allclose(layer(x), y)
        layer.mixing.copy_(before["mixing"])
        layer.weight.data.mul_(-0.5)
        assert not torch.allclose(layer(x), y)
        layer.load_state_dict(before)
        torch.testing.assert_close(layer(x), y)
    assert torch.equal(layer.train()(x).detach(), y)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_parametrized_and_frozen_layers() -> None:
    """What a parametrization of this package computes is the start; what is frozen stays so."""
    scaled = rescaled(plain("square"))
    equal = plain("square")
    with torch.no_grad():
        equal.weight.copy_(scaled.weight)
    expected = group_shuffle(equal, blocks=4)
    layer = group_shuffle(scaled, blocks=4)
    assert torch.equal(layer.weight, expected.weight)
    assert list(layer.state_dict()) == ["weight", "mixing"]
    frozen = group_shuffle(plain("square").requires_grad_(False).eval(), blocks=4)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training


@pytest.mark.parametrize("name", ["1×1", "patches", "patches with gaps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_without_overlap_have_a_plain_equal(name: str, dtype: torch.dtype) -> None:
    layer = made(name, dtype, bias=True)
    x = torch.randn(2, *in_shape(name)).to(dtype)
    y = layer(x)
    if dtype == torch.float64:
        matrix = apply_to_identity(layer, in_shape(name))
        torch.testing.assert_close(sh.as_operator(layer, in_shape(name)[1:]).to_dense(), matrix, rtol=0, atol=1e-12)
        assert float(sh.spectral_norm(sh.as_operator(layer), rtol=1e-6).detach()) == pytest.approx(1, abs=1e-5)
    model = remove_spectral(nn.Sequential(layer))
    assert type(model[0]) is nn.Conv2d
    assert model[0].bias is layer.bias
    torch.testing.assert_close(model[0](x), y, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.05)


def test_others_are_refused_by_name() -> None:
    layer = made("square")
    model = nn.Sequential(layer, nn.Linear(2, 2))
    for refused in (lambda: sh.as_operator(layer), layer.to_plain, lambda: remove_spectral(model)):
        with pytest.raises(NotImplementedError, match="no convolution of a small kernel"):
            refused()
    selection = select(model)
    assert [target.name for target in selection.targets] == ["1"]
    assert "no convolution of a small kernel" in selection.skipped["0"]
    assert spectral_report(model)["0"] == "GroupShuffleConv(max_norm=1.0)"
    assert "blocks=4" in repr(layer)


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_layers_that_are_refused() -> None:
    for blocks in (0, 5, 16, True, None):
        with pytest.raises(ValueError, match=r"`blocks` must be an int that divides the 16 output channels.*got"):
            group_shuffle(plain("square"), blocks=blocks)
    with pytest.raises(ValueError, match="square root of the 16 channels"):
        group_shuffle(plain("square"), blocks=8)
    with pytest.raises(ValueError, match="divides the 5 patch channels"):
        group_shuffle(nn.Conv2d(5, 4, 3, padding=1), blocks=2)
    with pytest.raises(ValueError, match="`two_sided` is for `fine_tune=True`"):
        group_shuffle(plain("square"), blocks=4, two_sided=True)
    with pytest.raises(ValueError, match="must keep the size"):
        group_shuffle(nn.Conv2d(16, 16, 3), blocks=4)
    with pytest.raises(NotImplementedError, match="reflect padding"):
        group_shuffle(nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), blocks=4)
    with pytest.raises(ValueError, match="divides the 6 input channels"):
        group_shuffle(nn.ConvTranspose2d(6, 16, 3, padding=1), blocks=4)
    bad = plain("square")
    bad.weight.data.flatten()[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        group_shuffle(bad, blocks=4)
    with pytest.raises(ValueError, match="parametrized"):
        group_shuffle(parametrizations.orthogonal(plain("square")), blocks=4)
    # and are as they were
    scaled = rescaled(plain("square"))
    with pytest.raises(ValueError, match="square root"):
        group_shuffle(scaled, blocks=8)
    assert "parametrizations.weight.original" in scaled.state_dict()


def test_inputs_that_are_refused() -> None:
    layer = made("stride")
    with pytest.raises(ValueError, match="`x` must have shape"):
        layer(torch.randn(1, 3, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="sizes that the stride"):
        layer(torch.randn(1, 2, 5, 4, dtype=torch.float64))
    x = torch.randn(1, *in_shape("stride"), dtype=torch.float64)
    assert torch.equal(layer(x[0]), layer(x)[0])
