"""parametrizations.tensor_train: orthonormal frames, so that the layer's singular values are those of its core."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from cases import apply_to_identity
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.parametrizations import remove_spectral, rescaled, spectral_report
from spectral_hooks.parametrizations.stiefel import cayley_transform, inverse_cayley
from spectral_hooks.parametrizations.tensor_train import TensorTrain, tensor_train

#: Every kind of layer, with the shape of an input.
LAYERS = {
    "linear": (lambda: nn.Linear(7, 9), (7,)),
    "1×1": (lambda: nn.Conv2d(8, 6, 1), (8, 4, 5)),
    "3×3": (lambda: nn.Conv2d(6, 8, 3, padding=1), (6, 5, 6)),
    "circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (6, 4, 6)),
    "reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (6, 5, 6)),
    "strided": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), (6, 7, 6)),
    "dilated": (lambda: nn.Conv2d(6, 5, (3, 2), dilation=2, padding="same"), (6, 7, 6)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), (8, 4, 5)),
    "sequence": (lambda: nn.Conv1d(5, 7, 4, stride=2), (5, 11)),
    "volume": (lambda: nn.Conv3d(5, 4, 2), (5, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (6, 3, 4)),
    "transposed groups": (lambda: nn.ConvTranspose1d(6, 8, 4, stride=2, groups=2), (6, 5)),
}


def made(name: str, rank: int | tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, TensorTrain, Tensor]:
    """A layer, its tensor train, and a batch."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    return layer, tensor_train(layer, rank), torch.randn(2, *shape, dtype=dtype)


def kernel(layer: nn.Module) -> Tensor:
    """`(groups, outputs, inputs, taps)`."""
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach().unflatten(0, (groups, -1))
    return (weight.transpose(1, 2) if getattr(layer, "transposed", False) else weight).flatten(3 if weight.ndim > 3 else 2)


def frame_error(layer: TensorTrain) -> float:
    frames = [frame.detach().double() for frame in (layer.in_frame, layer.out_frame)]
    return max(float((q.mT @ q - torch.eye(q.shape[-1])).abs().max()) for q in frames)


# -- the map ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_at_full_rank_it_is_the_layer(name: str) -> None:
    layer, _, x = made(name, 1)
    train = tensor_train(layer, max(kernel(layer).shape[1:3]))
    assert train.error < 1e-14
    torch.testing.assert_close(train(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_three_layers_and_the_module_are_one_map(name: str) -> None:
    layer, train, x = made(name, (2, 3))
    plain, three = train.to_plain(), train.to_sequential()
    assert type(plain) is type(layer)
    assert plain.extra_repr() == layer.extra_repr()
    assert [type(part).__module__.split(".")[0] for part in (plain, *three)] == ["torch"] * 4
    y = train(x)
    assert y.shape == layer(x).shape
    torch.testing.assert_close(plain(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(three(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_the_reported_error_is_that_of_the_kernel(name: str) -> None:
    layer, train, _ = made(name, (2, 3))
    before, after = kernel(layer), kernel(train.to_plain())
    error = float((after - before).norm() / before.norm())
    assert train.error == pytest.approx(error, rel=1e-10)
    assert f"error={error:.3g}" in repr(train)
    # what is lost by cutting one side alone, which nothing of this rank can do without; groups are apart
    tails = []
    for axis, rank in ((1, 3), (2, 2)):
        values = torch.linalg.svdvals(before.movedim(axis, 1).flatten(2))
        tails.append(float(values[:, rank:].norm() / before.norm()))
    assert max(tails) * (1 - 1e-10) <= error <= sqrt(sum(t**2 for t in tails)) * (1 + 1e-10)
    if name in ("linear", "1×1"):
        values = torch.linalg.svdvals(before.flatten(1)[..., : before[0].numel()].reshape(before.shape[1:3]))
        assert error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-10)


def test_rank_is_at_most_the_channels_of_a_side() -> None:
    train = tensor_train(nn.Conv2d(3, 16, 3), 8)
    assert train.ranks == (3, 8)
    assert train.weight.shape == (8, 3, 3, 3)
    # one tap: a matrix of rank 2 has no more
    assert tensor_train(nn.Conv2d(16, 2, 1), 8).ranks == (2, 2)


def test_a_zero_kernel_and_one_of_low_rank() -> None:
    layer = nn.Linear(6, 6).double()
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.arange(6.0), torch.arange(1.0, 7.0)))
    assert tensor_train(layer, 1).error < 1e-14
    with torch.no_grad():
        layer.weight.zero_()
    train = tensor_train(layer, 2)
    assert train.error == 0
    assert torch.equal(train(torch.ones(6, dtype=torch.float64)), layer.bias)


def enlarged(name: str, rank: int | tuple[int, int] = (2, 3)) -> tuple[TensorTrain, Tensor]:
    """A tensor train and a batch with at least 64 points after the core too: the frames are then matrix products."""
    _, train, x = made(name, rank)
    return train, torch.randn(*x.shape[:2], *{1: (150,), 2: (19, 20), 3: (6, 5, 8)}[train.dims], dtype=x.dtype)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "linear"])
def test_on_large_images_products_are_the_convolutions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs and every gradient, against the plain layer and against frames applied by convolutions."""
    train, x = enlarged(name)
    torch.testing.assert_close(train(x), train.to_plain()(x), rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    wanted = [x, *train.parameters()]
    upstream = torch.randn_like(train(x))
    products = torch.autograd.grad(train(x), wanted, upstream)
    assert train._is_stack(x.detach(), train.in_frame.mT)
    monkeypatch.setattr(sys.modules[TensorTrain.__module__], "_MANY_POINTS", 1 << 30)
    assert not train._is_stack(x.detach(), train.in_frame.mT)
    convolutions = torch.autograd.grad(train(x), wanted, upstream)
    torch.testing.assert_close(products, convolutions, rtol=1e-11, atol=1e-11)


def test_layouts_and_batches() -> None:
    train, x = enlarged("grouped")
    y = train(x)
    assert y.is_contiguous()
    last = train(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(train(x.mT.contiguous().mT), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(train(x[1]), y[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.vmap(train)(x[None])[0], y, rtol=1e-12, atol=1e-12)
    assert train(x[:0]).shape == (0, *y.shape[1:])
    with pytest.raises(RuntimeError, match="to have 8 channels, but got 4"):
        train(x[:, :4])


# -- singular values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_singular_values_are_those_of_the_core(name: str) -> None:
    """Against the dense matrix of the module itself, border and stride included."""
    _, train, x = made(name, (2, 3))
    shape = tuple(x.shape[1:])
    full = torch.linalg.svdvals(apply_to_identity(train, shape))
    core = sh.singular_values(sh.as_operator(train, shape[1:] or None)).detach()
    assert len(core) < len(full) or name == "volume"
    torch.testing.assert_close(core[: len(full)], full[: len(core)], rtol=1e-12, atol=1e-12)
    assert float(full[len(core) :].norm()) < 1e-12


def test_frames_stay_orthonormal_while_training() -> None:
    """200 steps of Adam in float32, no penalty; the core and the layer still agree."""
    torch.manual_seed(0)
    model = nn.Sequential(
        tensor_train(nn.Conv2d(6, 16, 3, padding=1), 4), nn.ReLU(), tensor_train(nn.Conv2d(16, 8, 3, stride=2), 5)
    )
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = torch.randn(8, 6, 7, 7), torch.randn(8, 8, 3, 3)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # weights of float32, measured in float64: a decomposition in float32 errs by more than the frames do
    eps = torch.finfo(torch.float32).eps
    for train, size in ((model[0], 7), (model[2], 7)):
        assert frame_error(train) < 4 * eps
        layers = copy.deepcopy(train), train.to_plain()
        core, full = (sh.singular_values(sh.as_operator(layer.double(), size)).detach() for layer in layers)
        # of both frames, of the core and of their product, one rounding each
        assert float((core - full[: len(core)]).abs().max() / full[0]) < 4 * eps


@pytest.mark.parametrize("name", ["linear", "3×3", "strided", "grouped", "transposed"])
def test_clipping_the_core_clips_the_layer(name: str) -> None:
    _, train, x = made(name, (2, 3), torch.float32)
    model = nn.Sequential(train)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    core = train.weight
    assert float(sh.spectral_norm(sh.as_operator(train)).detach()) > 0.3
    clip = sh.SpectralClip(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # frames are no free weights
        handle = clip.attach(model, optimizer)
    assert clip.skipped == {"0.in_free": "makes an isometry", "0.out_free": "makes an isometry"}
    with handle:
        assert handle.attached
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
    assert train.weight is core
    norm = float(sh.spectral_norm(sh.as_operator(train.to_plain()), rtol=1e-6).detach())
    assert norm <= 0.3 * (1 + 1e-6)


def test_other_parametrizations_work_on_the_core() -> None:
    _, train, x = made("3×3", 3, torch.float32)
    with torch.no_grad():
        train.weight.mul_(50)
    model = nn.Sequential(rescaled(train, 0.5))
    y = model(x)
    plain = remove_spectral(model)
    assert type(plain[0]) is nn.Conv2d
    torch.testing.assert_close(plain(x), y)
    assert 0.4 < float(sh.spectral_norm(sh.as_operator(plain[0])).detach()) <= 0.5 * (1 + 1e-3)


# -- in a model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "grouped", "reflect", "transposed"])
def test_gradients(name: str) -> None:
    _, train, x = made(name, 2)
    names = [key for key, _ in train.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(train, dict(zip(names, values, strict=True)), (x,))

    x = x[:1].requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *(p.detach().requires_grad_() for p in train.parameters())))


@pytest.mark.parametrize("name", ["linear", "3×3", "transposed groups"])
def test_checkpoints(name: str) -> None:
    layer, train, x = made(name, 2, torch.float32)
    with torch.no_grad():
        for p in train.parameters():
            p.add_(torch.randn_like(p) / 10)
    # its own, bit for bit
    buffer = io.BytesIO()
    torch.save(train.state_dict(), buffer)
    buffer.seek(0)
    _, other, _ = made(name, 2, torch.float32)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), train(x))
    assert set(train.state_dict()) == {"weight", "bias", "out_free", "in_free"}
    # a plain one, inside a model, is converted as a layer would be
    model = nn.Sequential(other)
    fresh = type(layer)(*(layer.in_features, layer.out_features) if name == "linear" else (), **geometry(layer))
    model.load_state_dict(nn.Sequential(fresh).state_dict())
    converted = tensor_train(fresh, 2)
    assert torch.equal(model(x), converted(x))
    assert other.error == converted.error
    # one of another shape is refused by torch
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"weight": torch.zeros(99, 99, 3), "bias": layer.bias})


def geometry(layer: nn.Module) -> dict[str, object]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


@pytest.mark.parametrize("full", [False, True])
def test_plain_checkpoints_at_full_rank(full: bool) -> None:
    """There the core has the shape of the plain weight: the lack of frames tells which it is."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4).double() for _ in range(2)]
    train = tensor_train(layers[0], 4)
    with torch.no_grad():
        train.in_free.normal_()
    x = torch.randn(3, 4, dtype=torch.float64)
    if full:
        train.load_state_dict(layers[1].state_dict())
        torch.testing.assert_close(train(x), layers[1](x))
    else:
        other = tensor_train(layers[1], 4)
        other.load_state_dict(train.state_dict())
        assert torch.equal(other(x), train(x))


def test_plain_checkpoints_elsewhere() -> None:
    """In another dtype, for a module without storage, under another parametrization; and one that holds no numbers."""
    layer, _, x = made("3×3", 3)
    expected = tensor_train(layer, 3)(x)
    _, other, _ = made("3×3", 3)
    other.to("meta").load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), expected)
    _, single, _ = made("3×3", 3, torch.float32)
    single.load_state_dict(layer.state_dict())
    torch.testing.assert_close(single(x.float()).double(), expected, rtol=1e-5, atol=1e-5)
    _, other, _ = made("3×3", 3)
    around = rescaled(other, 100.0)
    around.load_state_dict(layer.state_dict())
    torch.testing.assert_close(around(x), expected, rtol=1e-12, atol=1e-12)
    before = single.weight.detach().clone()
    with pytest.raises(ValueError, match="NaN"):
        single.load_state_dict({"weight": torch.full_like(layer.weight, torch.nan), "bias": layer.bias})
    assert torch.equal(single.weight, before)


@pytest.mark.parametrize("rank", [6, 16])
def test_in_a_transformer_encoder(rank: int) -> None:
    """Torch's own reads the weights of its children in eval mode, which at full rank has the right shape, and is the core."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True).double().eval()
    encoder.linear1, encoder.linear2 = (tensor_train(part, rank) for part in (encoder.linear1, encoder.linear2))
    with torch.no_grad():
        encoder.linear1.in_free.normal_()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(remove_spectral(copy.deepcopy(encoder))(x), expected, rtol=1e-12, atol=1e-12)


def test_a_layer_with_parametrizations() -> None:
    """Its weight and bias are taken as they are computed, and are parameters."""

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer = rescaled(nn.Linear(4, 5), 1.0)
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    with torch.no_grad():
        train = tensor_train(layer, 4)
        x = torch.randn(3, 4)
        torch.testing.assert_close(copy.deepcopy(train)(x), layer(x))
    assert {key for key, p in train.named_parameters() if p.requires_grad} == {"weight", "bias", "out_free", "in_free"}
    assert type(train.to_plain().bias) is nn.Parameter


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_large_images_under_autocast_and_compiled(name: str) -> None:
    train, x = made(name, 3)[1:] if name == "linear" else enlarged(name, 3)
    train, x = train.float(), x.float()
    y = train(x)
    torch.testing.assert_close(torch.compile(train, backend="aot_eager", fullgraph=True)(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        half = train(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)


def test_copies_and_compiled_models() -> None:
    _, train, x = made("3×3", 3, torch.float32)
    y = train(x)
    for other in (copy.deepcopy(train), pickle.loads(pickle.dumps(train))):
        assert torch.equal(other(x), y)
        assert other.weight is not train.weight
        layer, _, _ = made("3×3", 1, torch.float32)
        with torch.no_grad():
            layer.weight.mul_(2)
        other.load_state_dict(layer.state_dict())  # a plain one is converted by the copy
        assert torch.equal(other(x), tensor_train(layer, 3)(x))
        assert torch.equal(train(x), y)
    compiled = torch.compile(train, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    compiled(x).sum().backward()
    assert train.in_free.grad is not None


def test_forward_changes_no_state() -> None:
    _, train, x = made("3×3", 3)
    before = {key: value.clone() for key, value in train.state_dict().items()}
    attributes = set(vars(train))
    assert torch.equal(train(x), train.eval()(x))
    assert set(vars(train)) == attributes
    assert not list(train.buffers())
    assert all(torch.equal(value, before[key]) for key, value in train.state_dict().items())


def test_half_precision() -> None:
    layer, train, x = made("3×3", 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert train(x).dtype == torch.bfloat16
        assert frame_error(train) < 1e-6
    half = copy.deepcopy(train).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert frame_error(half) < 0.02
    torch.testing.assert_close(half(x.bfloat16()).float(), train(x), rtol=0.05, atol=0.05)
    # converted in half precision: the core is fitted to the frames as they are after rounding
    full = tensor_train(copy.deepcopy(layer).bfloat16(), 8)
    assert full.error < 0.01


def test_what_the_layer_shares_and_keeps() -> None:
    layer, _, _ = made("3×3", 3)
    layer.weight.requires_grad_(False)
    weight = layer.weight.detach().clone()
    train = tensor_train(layer.eval(), 3)
    assert train.bias is layer.bias
    assert train.to_plain().bias is layer.bias
    assert not train.training
    assert {key for key, p in train.named_parameters() if p.requires_grad} == {"bias"}
    assert torch.equal(layer.weight, weight)
    assert not train.to_plain().weight.requires_grad


def test_remove_spectral_gives_plain_layers() -> None:
    _, train, x = made("strided", 3)
    model = nn.Sequential(train, nn.ReLU())
    assert spectral_report(model) == {"0": "TensorTrain"}
    y = model(x)
    plain = remove_spectral(model)
    assert type(plain[0]) is nn.Conv2d
    assert list(plain.state_dict()) == ["0.weight"]
    torch.testing.assert_close(plain(x), y, rtol=1e-12, atol=1e-12)


# -- frames ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 4), (4, 4), (3, 1), (2, 1, 1)])
def test_the_identity_is_the_default_base_of_cayley(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = torch.eye(*shape[-2:], dtype=torch.float64).expand(shape)
    upstream = torch.randn(shape, dtype=torch.float64)
    default, given = cayley_transform(x), cayley_transform(x, base)
    torch.testing.assert_close(default, given, rtol=1e-13, atol=1e-13)
    gradients = [torch.autograd.grad(q, x, upstream)[0] for q in (default, given)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    large = cayley_transform(1e3 * x.detach())
    torch.testing.assert_close(large.mT @ large, torch.eye(shape[-1]).to(large).expand(*shape[:-2], -1, -1), rtol=0, atol=1e-12)
    back = cayley_transform(inverse_cayley(default.detach()))
    torch.testing.assert_close(back, default.detach(), rtol=1e-12, atol=1e-12)


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 9, 2.0, True, "3", (1,), (1, 2, 3), (0, 2), None])
def test_bad_ranks(rank: object) -> None:
    with pytest.raises(ValueError, match=r"`rank` must be an int from 1 to 8.*got"):
        tensor_train(nn.Conv2d(6, 8, 3), rank)


def test_layers_that_are_refused() -> None:
    with pytest.raises(TypeError, match=r"`layer` must be an nn\.Linear"):
        tensor_train(nn.BatchNorm2d(3), 1)
    with pytest.raises(TypeError, match="got TensorTrain"):
        tensor_train(tensor_train(nn.Linear(4, 4), 2), 1)
    with pytest.raises(NotImplementedError, match="reads its weight itself"):
        tensor_train(nn.MultiheadAttention(4, 2).out_proj, 2)

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(NotImplementedError, match="forward of its own"):
        tensor_train(Scaled(4, 4), 2)
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        tensor_train(layer, 2)
    with pytest.raises(ValueError, match="meta"):
        tensor_train(nn.Linear(4, 4, device="meta"), 2)
    with pytest.raises(ValueError, match="run one forward first"):
        tensor_train(nn.LazyLinear(4), 2)


def test_layers_of_timm_and_transformers() -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(NotImplementedError, match="fixed padding"):
        tensor_train(timm.layers.create_conv2d(4, 4, 3, stride=2, padding="same"), 2)
    with pytest.raises(TypeError, match="got Conv1D"):
        tensor_train(pytest.importorskip("transformers").pytorch_utils.Conv1D(4, 4), 2)
