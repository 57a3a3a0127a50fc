"""Keras on torch: the constraint and the callback in real runs; every norm is measured on the layer itself, as a dense matrix."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import observers
import pytest
import torch
from counting import OPTIONS, WRONG, Counting

os.environ.setdefault("KERAS_BACKEND", "torch")
if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip(f"KERAS_BACKEND is {os.environ['KERAS_BACKEND']!r}, and not torch", allow_module_level=True)
keras = pytest.importorskip("keras")
if keras.config.backend() != "torch":
    pytest.skip(f"Keras was imported before with the backend {keras.config.backend()!r}", allow_module_level=True)

import spectral_hooks as sh  # noqa: E402
from spectral_hooks.hooks import pace  # noqa: E402
from spectral_hooks.integrations.keras import (  # noqa: E402
    HookCallback,
    Kernel,
    SpectralClip,
    SpectralClipCallback,
    mirror,
)

ROOT = Path(__file__).parents[2]
L = keras.layers

#: What a projected norm may exceed the bound by in float32, measured in float64.
ROUNDING = 1e-6


# -- what is measured ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def matrix(layer: Any, in_shape: tuple[int, ...]) -> torch.Tensor:
    """The dense matrix of a layer, by applying it to every unit vector, without its bias; in float64."""
    device = layer.weights[0].value.device
    columns = math.prod(in_shape)
    identity = torch.eye(columns, device=device).reshape(columns, *in_shape)
    image = layer(identity) - layer(torch.zeros(1, *in_shape, device=device))
    return image.reshape(columns, -1).T.double().cpu()


def norm(layer: Any, in_shape: tuple[int, ...] | None = None) -> float:
    """The largest singular value of the layer, as the map that it is at this input size: by default that of its model."""
    return float(torch.linalg.matrix_norm(matrix(layer, in_shape or layer.input.shape[1:]), ord=2))


def operators(model: Any) -> dict[str, sh.LinearOperator]:
    kernels = {name: kernel for name, kernel in mirror(model).requires_grad_(False).named_modules() if isinstance(kernel, Kernel)}
    return {name: sh.as_operator(kernel) for name, kernel in kernels.items() if not isinstance(kernel.operator, str)}


def random_(model: Any, scale: float = 1.0, seed: int = 0) -> Any:
    """Fill every kernel with normal numbers: norms far above one."""
    numbers = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        if len(weight.shape) > 1:
            weight.assign(scale * numbers.normal(size=weight.shape).astype("float32"))
    return model


# -- every layer, every geometry -----------------------------------------------------------------------------------------

#: name: the layer for a padding and a data format, its input as (channels, *sizes), and the paddings that it knows
CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[str, ...]]] = {
    "conv1d": (lambda **k: L.Conv1D(3, 4, **k), (2, 9), ("valid", "same", "causal")),
    "conv1d-stride": (lambda **k: L.Conv1D(3, 3, strides=2, **k), (2, 9), ("valid", "same", "causal")),
    "conv1d-dilation": (lambda **k: L.Conv1D(3, 3, dilation_rate=2, **k), (2, 9), ("valid", "same", "causal")),
    "conv2d": (lambda **k: L.Conv2D(3, 3, **k), (2, 6, 5), ("valid", "same")),
    "conv2d-even": (lambda **k: L.Conv2D(3, (2, 4), strides=(2, 3), **k), (2, 7, 8), ("valid", "same")),
    "conv2d-groups": (lambda **k: L.Conv2D(6, 3, groups=2, **k), (4, 5, 6), ("valid", "same")),
    "conv2d-dilation": (lambda **k: L.Conv2D(2, 3, dilation_rate=(1, 2), **k), (2, 5, 7), ("valid", "same")),
    "conv3d": (lambda **k: L.Conv3D(3, (2, 3, 1), strides=(1, 2, 1), **k), (2, 4, 5, 3), ("valid", "same")),
    "depthwise1d": (lambda **k: L.DepthwiseConv1D(3, strides=2, depth_multiplier=2, **k), (3, 8), ("valid", "same")),
    "depthwise2d": (lambda **k: L.DepthwiseConv2D(3, depth_multiplier=2, **k), (3, 5, 6), ("valid", "same")),
    "transposed1d": (lambda **k: L.Conv1DTranspose(3, 4, strides=3, **k), (2, 5), ("valid", "same")),
    "transposed2d": (lambda **k: L.Conv2DTranspose(3, 3, strides=(2, 1), **k), (2, 4, 3), ("valid", "same")),
    "transposed2d-dilation": (lambda **k: L.Conv2DTranspose(2, 3, dilation_rate=2, **k), (3, 4, 3), ("valid", "same")),
    "transposed3d": (lambda **k: L.Conv3DTranspose(2, 2, strides=2, **k), (3, 3, 2, 2), ("valid", "same")),
}
FORMATS = ("channels_last", "channels_first")


def built(name: str, padding: str, data_format: str, dtype: str = "float32") -> tuple[Any, tuple[int, ...]]:
    """The layer with random weights, and its input shape in its own format."""
    make, shape, _ = CASES[name]
    if data_format == "channels_last":
        shape = (*shape[1:], shape[0])
    layer = make(padding=padding, data_format=data_format, dtype=dtype)
    layer.build((None, *shape))
    return random_(layer), shape


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_the_layer(name: str, data_format: str) -> None:
    """The operator, given the input's size, has the very matrix that the layer applies."""
    layer, _ = built(name, "valid", data_format, dtype="float64")
    (op,) = operators(layer).values()
    _, (channels, *size), _ = CASES[name]
    finite = sh.ConvOperator(op.weight, op.stride, 0, 0, op.dilation, op.groups, op.transposed, input_size=size)
    # unit vectors of the operator's order, channels first, through the layer in its own
    identity = torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)
    with torch.no_grad():
        last = data_format == "channels_last"
        image = layer((identity.movedim(1, -1) if last else identity).to(op.weight.device))
        image = (image.movedim(-1, 1) if last else image) - layer.bias.value.reshape(-1, *[1] * len(size))
    torch.testing.assert_close(finite.to_dense().cpu(), image.flatten(1).T.cpu())


def geometry(name: str, layer: Any) -> dict[str, Any]:
    """What a user tells the constraint about the layer."""
    kind = {"depth": "depthwise", "trans": "transposed"}.get(name[:5], "conv")
    groups = getattr(layer, "groups", 1)
    return {"kind": kind, "strides": layer.strides, "dilation_rate": layer.dilation_rate, "groups": groups}


@pytest.mark.parametrize("name", CASES)
def test_a_clipped_layer_obeys_with_every_padding(name: str) -> None:
    """With the geometry of the layer, and without: the default bounds every layer."""
    for data_format, padding in itertools.product(FORMATS, CASES[name][2]):
        layer, shape = built(name, padding, data_format)
        before = layer.weights[0].numpy()
        assert norm(layer, shape) > 1

        layer.weights[0].assign(SpectralClip(1.0)(layer.weights[0]))
        assert norm(layer, shape) <= 1 + ROUNDING, "the default geometry"

        layer.weights[0].assign(before)
        (op,) = operators(layer).values()
        clipped = SpectralClip(1.0, **geometry(name, layer))(layer.weights[0])
        op.weight.copy_(sh.projections.clip(op, 1.0))
        np.testing.assert_array_equal(clipped.cpu().numpy(), layer.weights[0].numpy(), "what the callback knows by itself")
        assert norm(layer, shape) <= 1 + ROUNDING, "its own geometry"
        axes = range(len(shape) - 1) if data_format == "channels_last" else range(1, len(shape))
        larger = tuple(size + 2 if axis in axes else size for axis, size in enumerate(shape))
        assert norm(layer, larger) <= 1 + ROUNDING, "another input size"


@pytest.mark.parametrize("name", ["conv2d-even", "conv2d-groups", "depthwise2d"])
def test_geometry_makes_the_bound_sharp(name: str) -> None:
    layer, _ = built(name, "same", "channels_last")
    kernel = layer.weights[0].numpy()
    moved = [
        np.linalg.norm(SpectralClip(1.0, **given)(layer.weights[0]).cpu().numpy() - kernel)
        for given in ({}, geometry(name, layer))
    ]
    assert moved[1] < 0.98 * moved[0]


@pytest.mark.parametrize("layer", [L.SeparableConv1D, L.SeparableConv2D])
def test_separable_convolutions_are_two_maps(layer: Any) -> None:
    dims = 1 if layer is L.SeparableConv1D else 2
    sep = layer(5, 3, strides=2, depth_multiplier=2, padding="same", dtype="float64", name="sep")
    shape = (*(6,) * dims, 3)
    sep.build((None, *shape))
    ops = operators(random_(sep))
    assert list(ops) == ["depthwise_kernel", "pointwise_kernel"]
    assert ops["depthwise_kernel"].groups == 3
    bound = math.prod(float(sh.spectral_norm(op)) for op in ops.values())
    assert norm(sep, shape) <= bound
    for op in ops.values():
        # written through the operator's view, in the layer's own memory
        op.weight.copy_(sh.projections.clip(op, 1.0))
    assert norm(sep, shape) <= 1 + ROUNDING


@pytest.mark.parametrize(
    ("equation", "in_shape", "out_shape"),
    [
        ("ab,bc->ac", (4,), (5,)),
        ("...x,xy->...y", (4,), (5,)),
        ("abc,cde->abde", (3, 4), (3, 2, 3)),  # the queries of attention
        ("abcd,cde->abe", (3, 2, 3), (3, 4)),  # its output
        ("ab,cb->ac", (4,), (5,)),
    ],
)
def test_einsum_dense_is_a_matrix(equation: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
    layer = L.EinsumDense(equation, output_shape=out_shape, dtype="float64")
    layer.build((None, *in_shape))
    (op,) = operators(random_(layer)).values()
    # a batch axis in the middle repeats the matrix, and no more
    assert norm(layer, in_shape) == pytest.approx(float(sh.spectral_norm(op)))
    op.weight.copy_(sh.projections.clip(op, 0.5))
    assert norm(layer, in_shape) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("equation", "out_shape", "reason"),
    [
        ("abc,bcd->abd", (3, 5), "more than a product"),  # a matrix for each b
        ("abc,cd->ad", (5,), "more than a product"),  # a sum over b as well
        ("abc,dce->abde", (3, 2, 5), "does not lie in memory"),
    ],
)
def test_einsum_dense_that_is_no_matrix(equation: str, out_shape: tuple[int, ...], reason: str) -> None:
    layer = L.EinsumDense(equation, output_shape=out_shape)
    layer.build((None, 3, 4))
    (kernel,) = mirror(layer).modules()
    with pytest.raises(NotImplementedError, match=reason):
        sh.as_operator(kernel)


def test_kernels_that_lie_in_another_order_in_memory() -> None:
    """The orthogonal initializer leaves a kernel that cannot be flattened in place."""
    layer = L.DepthwiseConv2D(3, depth_multiplier=2, depthwise_initializer="orthogonal")
    layer.build((None, 6, 6, 4))
    assert not layer.kernel.value.is_contiguous(), "Keras makes it contiguous by itself now"
    before, parameter = layer.kernel.numpy(), layer.kernel.value
    clipped = SpectralClip(0.1, kind="depthwise")(layer.kernel)
    assert clipped.shape == layer.kernel.shape
    (op,) = operators(layer).values()
    assert layer.kernel.value is parameter
    np.testing.assert_array_equal(layer.kernel.numpy(), before)
    op.weight.copy_(sh.projections.clip(op, 0.1))
    assert norm(layer, (6, 6, 4)) <= 0.1 + ROUNDING
    np.testing.assert_allclose(layer.kernel.numpy(), clipped.cpu().numpy())


# -- the constraint ------------------------------------------------------------------------------------------------------


def test_a_constraint_returns_a_new_tensor_and_changes_nothing_that_is_inside() -> None:
    layer = L.Conv2D(4, 3)
    layer.build((None, 6, 6, 3))
    random_(layer, 1e-3)
    before = layer.kernel.numpy()
    clipped = SpectralClip(1.0)(layer.kernel)
    assert isinstance(clipped, torch.Tensor)
    assert clipped.data_ptr() != layer.kernel.value.data_ptr()
    np.testing.assert_array_equal(clipped.cpu().numpy(), before)
    np.testing.assert_array_equal(layer.kernel.numpy(), before)


def test_config_round_trip() -> None:
    constraint = SpectralClip(0.7, kind="conv", strides=(2, 1), dilation_rate=1, groups=2, rounds=4)
    config = json.loads(json.dumps(keras.constraints.serialize(constraint)))
    assert config["registered_name"] == "spectral_hooks>SpectralClip"
    again = keras.constraints.deserialize(config)
    assert type(again) is SpectralClip
    kernel = torch.randn(3, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(kernel), constraint(kernel), rtol=0, atol=0)
    assert SpectralClip.from_config(constraint.get_config()).get_config() == constraint.get_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": 0}, "`max_norm`"),
        ({"max_norm": "large"}, "`max_norm`"),
        ({"kind": "pointwise"}, "`kind` must be one of dense, conv"),
        ({"rounds": 0}, "`rounds`"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralClip(**arguments)


def test_a_bias_has_no_norm() -> None:
    layer = L.Dense(3, bias_constraint=SpectralClip(1.0), name="dense")
    layer.build((None, 4))
    with pytest.raises(ValueError, match="two axes or more"):
        layer.bias.constraint(layer.bias)


def test_a_kernel_that_is_not_finite_is_named() -> None:
    layer = L.Dense(3, kernel_constraint=SpectralClip(1.0), name="broken")
    layer.build((None, 4))
    layer.kernel.assign(np.full((4, 3), np.nan))
    with pytest.raises(ValueError, match=r"broken/kernel.*NaN"):
        layer.kernel.constraint(layer.kernel)


# -- training ------------------------------------------------------------------------------------------------------------

X = np.random.default_rng(1).normal(size=(24, 6, 6, 2)).astype("float32")
Y = np.random.default_rng(2).integers(3, size=24)
BATCH = 4
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(constraint: Any = None, dtype: Any = None) -> Any:
    """Every supported kind of layer, with weights far outside the ball."""

    def kernel(**geometry: Any) -> dict[str, Any]:
        return {"kernel_constraint": constraint and constraint(**geometry), "dtype": dtype}

    each = {f"{part}_constraint": constraint and constraint(kind=kind) for part, kind in _PARTS.items()}
    x = inputs = keras.Input(X.shape[1:])
    x = L.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="conv", **kernel(strides=2))(x)
    x = L.Conv2D(4, 3, padding="same", groups=2, dilation_rate=2, name="grouped", **kernel(groups=2, dilation_rate=2))(x)
    x = L.DepthwiseConv2D(
        3, depth_multiplier=2, padding="same", name="depthwise", depthwise_constraint=each["depthwise_constraint"], dtype=dtype
    )(x)
    x = L.BatchNormalization(name="norm", dtype=dtype)(x)
    x = L.SeparableConv2D(4, 3, padding="same", activation="relu", name="separable", dtype=dtype, **each)(x)
    x = L.Conv2DTranspose(3, 3, strides=2, padding="same", name="up", **kernel(kind="transposed", strides=2))(x)
    x = L.Reshape((36, 3), name="flat")(x)
    x = L.Conv1D(3, 3, padding="causal", activation="relu", name="causal", **kernel())(x)
    x = L.EinsumDense("abc,cde->abde", output_shape=(36, 2, 2), name="einsum", dtype=dtype)(x)
    x = L.Flatten()(x)
    x = L.Dense(3, name="head", **kernel())(x)
    return random_(keras.Model(inputs, x), 0.5)


_PARTS = {"depthwise": "depthwise", "pointwise": "conv"}
_CONSTRAINED = ("conv", "grouped", "depthwise", "up", "causal", "head", "separable")


def largest(model: Any) -> float:
    """Of all layers, each applied to the identity."""
    names = [*_CONSTRAINED, "einsum"]
    activated = {name: model.get_layer(name).activation for name in names if hasattr(model.get_layer(name), "activation")}
    for name in activated:
        model.get_layer(name).activation = None
    try:
        return max(norm(model.get_layer(name)) for name in names)
    finally:
        for name, activation in activated.items():
            model.get_layer(name).activation = activation


def observed(op: Any) -> float:
    """The norm of an operator's weight as it is stored, by an observer of its own in float64."""
    if isinstance(op, sh.DenseOperator):
        return observers.matrix_norm(op.weight)
    kind = getattr(torch.nn, f"Conv{'Transpose' if op.transposed else ''}{op.weight.ndim - 2}d")
    ins, outs = (op.weight.shape[1] * op.groups, op.weight.shape[0])[:: -1 if op.transposed else 1]
    layer = kind(ins, outs, op.weight.shape[2:], stride=op.stride, dilation=op.dilation, groups=op.groups, bias=False)
    layer.weight = torch.nn.Parameter(op.weight.cpu(), requires_grad=False)
    return observers.lattice_norm(layer)


def largest_norm(model: Any) -> float:
    """Of all kernels."""
    return max(map(observed, operators(model).values()))


class Watch(keras.callbacks.Callback):
    """The largest norm at each event."""

    def __init__(self, *events: str) -> None:
        super().__init__()
        self.norms: dict[str, list[float]] = {event: [] for event in events}
        for event in events:
            setattr(self, event, lambda *_, _event=event, **__: self.norms[_event].append(largest_norm(self.model)))


def compiled(model: Any, optimizer: Any = None, **settings: Any) -> Any:
    model.compile(optimizer or keras.optimizers.SGD(0.5), LOSS, **settings)
    return model


def fit(model: Any, *callbacks: Any, epochs: int = 1, **settings: Any) -> Any:
    return model.fit(X, Y, batch_size=BATCH, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks), **settings)


#: The contract.
CLOSE = 1 + 1e-6


def test_callback_keeps_every_layer_in_the_ball() -> None:
    plain = compiled(network(), keras.optimizers.SGD(1e-3))
    fit(plain)
    assert largest(plain) > 2, "without it the norms leave the ball, and the laws below can fail"

    model = compiled(network())
    variables = {weight.path: weight.value for weight in model.weights}
    config = model.get_config()
    clip, watch = SpectralClipCallback(1.0), Watch("on_train_batch_begin", "on_train_batch_end")
    history = fit(model, clip, watch, epochs=2)

    assert largest(model) <= 1 + ROUNDING
    assert max(watch.norms["on_train_batch_begin"]) <= CLOSE, "from the first batch on"
    assert max(watch.norms["on_train_batch_end"]) <= CLOSE
    assert clip.hook.step == 2 * len(X) // BATCH
    assert clip.skipped == {"norm": "BatchNormalization has no operator; batch_norm='clip' bounds its gains."}
    assert {weight.path: weight.value for weight in model.weights} == variables, "the same parameter objects"
    assert model.get_config() == config
    assert "spectral_clip/clipped" not in history.history


def test_constraint_in_every_layer() -> None:
    """Keras applies constraints after the update: not at build."""
    model = compiled(network(lambda **geometry: SpectralClip(1.0, **geometry)))
    before = {name: norm(model.get_layer(name)) for name in ("depthwise", "up", "head")}
    assert min(before.values()) > 1
    fit(model)
    for name in ("depthwise", "up", "head"):
        assert norm(model.get_layer(name)) <= 1 + ROUNDING
    ops = operators(model)
    del ops["einsum"]
    assert max(map(observed, ops.values())) <= CLOSE


def small(**kernel: Any) -> Any:
    conv = L.Conv2D(3, 3, strides=2, activation="relu", name="conv", **kernel)
    return random_(keras.Sequential([keras.Input(X.shape[1:]), conv, L.Flatten(), L.Dense(3, name="head", **kernel)]))


@pytest.fixture
def compiler() -> Iterator[None]:
    """What a test compiles goes with it."""
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("compiler")
def test_compiled_training_step() -> None:
    """`jit_compile=True`: the projection stays out of the compiled step, and its result is in it."""
    bare = [compiled(small(), keras.optimizers.SGD(0.01), jit_compile=jit) for jit in (False, True)]
    for model in bare:
        fit(model)
    # Keras 3.5 trains a plain compiled model in another way than one that is not
    keras_compiles = all(
        np.allclose(a.numpy(), b.numpy(), atol=1e-4) for a, b in zip(bare[0].weights, bare[1].weights, strict=True)
    )
    models = []
    for jit in (False, True):
        model = compiled(small(kernel_constraint=SpectralClip(0.7)), jit_compile=jit)
        watch = Watch("on_train_batch_begin")
        fit(model, SpectralClipCallback(0.7), watch)
        assert max(watch.norms["on_train_batch_begin"]) <= 0.7 * CLOSE
        assert norm(model.get_layer("head")) <= 0.7 + ROUNDING
        models.append(model)
    for plain, jitted in zip(models[0].weights, models[1].weights, strict=True) if keras_compiles else ():
        np.testing.assert_allclose(plain.numpy(), jitted.numpy(), atol=1e-4)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy: str) -> None:
    model = network(lambda **geometry: SpectralClip(1.0, **geometry), dtype=policy)
    compiled(model)
    watch = Watch("on_train_batch_begin")
    fit(model, SpectralClipCallback(1.0), watch)
    assert max(watch.norms["on_train_batch_begin"]) <= CLOSE
    assert {keras.backend.standardize_dtype(kernel.dtype) for kernel in model.trainable_weights} == {"float32"}
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_stored_in_half_precision_obey(dtype: str) -> None:
    for constraint, callbacks in ((SpectralClip(1.0), []), (None, [SpectralClipCallback(1.0)])):
        model = compiled(small(dtype=dtype, kernel_constraint=constraint), keras.optimizers.SGD(0.1))
        fit(model, *callbacks)
        for name, op in operators(model).items():
            assert op.weight.dtype == getattr(torch, dtype)
            assert observed(op) <= CLOSE, name


def test_steps_that_loss_scaling_skips_are_none() -> None:
    model = small()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=3.4e38)
    compiled(model, optimizer)
    clip = SpectralClipCallback(1.0)
    model.fit(100 * X, Y, batch_size=BATCH, verbose=0, callbacks=[clip])
    skipped = len(X) // BATCH - int(optimizer.inner_optimizer.iterations.numpy())
    assert skipped > 0
    assert clip.hook.step == int(optimizer.inner_optimizer.iterations.numpy())


@pytest.mark.parametrize("steps", [2, 3])
def test_gradient_accumulation(steps: int) -> None:
    """Updates are counted, not micro-steps; the constraint, which Keras calls at each of these, keeps the bound too."""
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=steps)
    model = compiled(small(kernel_constraint=SpectralClip(1.0)), optimizer)
    clip, watch = SpectralClipCallback(1.0, every=2), Watch("on_train_batch_end")
    fit(model, clip, watch)
    assert clip.hook.step == len(X) // BATCH // steps
    assert max(watch.norms["on_train_batch_end"]) <= CLOSE


def test_every() -> None:
    clip, watch = SpectralClipCallback(1.0, every=4), Watch("on_train_batch_end")
    fit(compiled(small()), clip, watch)
    inside = [value <= CLOSE for value in watch.norms["on_train_batch_end"]]
    assert inside[3]
    assert not all(inside)
    assert largest_norm(clip.model) <= CLOSE, "what fit leaves"


def test_a_pace_that_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the history; and what is validated, and stands at the end of an epoch, is inside whatever the number."""
    monkeypatch.setattr(pace, "_SLOWEST_TRIED", 1)  # it is not tried out for long
    clip, watch = SpectralClipCallback(1.0, every="auto", log=True), Watch("on_test_batch_begin", "on_epoch_end")
    history = fit(compiled(small()), clip, watch, epochs=12, validation_data=(X[:4], Y[:4])).history
    assert clip.hook.step >= 66
    assert repr(clip) == f"SpectralClipCallback(1.0, every='auto' ({clip.hook.period}), log=True)"
    assert history["spectral_clip/every"][-1] == clip.hook.period
    for norms in watch.norms.values():
        assert len(norms) == 12
        assert max(norms) <= CLOSE
    assert largest_norm(clip.model) <= CLOSE


def test_options_of_the_hook() -> None:
    """Another projection, and a bound that changes with the steps."""
    schedule = {0: 2.0, 1: 1.5, 2: 1.0}
    clip = SpectralClipCallback(9.0, projection="rescale", schedule=lambda step: schedule.get(step, 0.5))
    watch = Watch("on_train_batch_begin")
    fit(compiled(small()), clip, watch)
    for seen, bound in zip(watch.norms["on_train_batch_begin"], (2.0, 1.5, 1.0, 0.5), strict=False):
        assert 0.9 * bound <= seen <= bound * CLOSE


def test_keras_takes_one_step_per_execution_on_torch() -> None:
    """So every update has its own event; were several allowed, the callback could act after the last of them only."""
    with pytest.raises(ValueError, match="steps_per_execution"):
        fit(compiled(small(), steps_per_execution=2), SpectralClipCallback(1.0))


class TwoOptimizers(keras.Model):
    """A training step of its own: the body and the head have an optimizer each, and `compile` knows of neither."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = L.Dense(8, name="body"), L.Dense(3, name="head")
        self.body_optimizer, self.head_optimizer = keras.optimizers.SGD(1.0), keras.optimizers.SGD(1.0)

    def call(self, x: Any) -> Any:
        return self.head(self.body(x))

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        self.zero_grad()
        LOSS(y, self(x)).backward()
        for optimizer, layer in ((self.body_optimizer, self.body), (self.head_optimizer, self.head)):
            variables = layer.trainable_weights
            with torch.no_grad():
                optimizer.apply([variable.value.grad for variable in variables], variables)
        return {"loss": 0.0}


@pytest.mark.parametrize("every", [1, 2])
def test_a_train_step_of_ones_own(every: int) -> None:
    model = TwoOptimizers()
    model(X.reshape(len(X), -1))
    model.compile()
    clip, watch = SpectralClipCallback(1.0, every=every), Watch("on_train_batch_end")
    model.fit(X.reshape(len(X), -1), Y, batch_size=BATCH, verbose=0, shuffle=False, callbacks=[clip, watch])
    assert clip.hook.step == len(X) // BATCH
    norms = watch.norms["on_train_batch_end"]
    assert max(norms[every - 1 :: every]) <= CLOSE
    assert every == 1 or max(norms) > 1.01


# -- averages ------------------------------------------------------------------------------------------------------------


def averaging(**settings: Any) -> Any:
    return keras.optimizers.SGD(5.0, use_ema=True, ema_momentum=0.5, **settings)


def test_averages_of_the_weights_are_projected() -> None:
    """Keras averages weights from before the constraint, and writes them into the model when training ends."""
    model = compiled(small(kernel_constraint=SpectralClip(1.0)), averaging())
    fit(model)
    assert largest_norm(model) > 1.5, "Keras applies constraints to averages now: say so in the docstring"

    model = compiled(small(kernel_constraint=SpectralClip(1.0)), averaging())
    fit(model, SpectralClipCallback(1.0))
    assert largest_norm(model) <= CLOSE


@pytest.mark.parametrize("accumulation", [None, 2])
def test_averages_written_while_training(accumulation: int | None) -> None:
    """`ema_overwrite_frequency`: under accumulation Keras writes them between updates too."""
    optimizer = averaging(ema_overwrite_frequency=2, gradient_accumulation_steps=accumulation)
    watch = Watch("on_train_batch_begin")
    model = compiled(small(), optimizer)
    fit(model, SpectralClipCallback(1.0), watch)
    assert max(watch.norms["on_train_batch_begin"]) <= CLOSE
    assert largest_norm(model) <= CLOSE


@pytest.mark.parametrize("validation", [None, (X[:4], Y[:4])], ids=["alone", "validated"])
def test_averages_that_are_swapped_in(tmp_path: Path, validation: Any) -> None:
    """For validation and for checkpoints, the averages obey too."""
    watch = Watch("on_epoch_end", *(["on_test_batch_begin"] if validation else []))
    saved = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    model = compiled(small(), averaging())
    fit(model, swap, SpectralClipCallback(1.0), saved, watch, epochs=2, validation_data=validation)
    for event, norms in watch.norms.items():
        assert max(norms) <= CLOSE, event
    for path in tmp_path.iterdir():
        assert largest_norm(keras.saving.load_model(path)) <= CLOSE, path.name


# -- saving, loading, other callbacks ------------------------------------------------------------------------------------


def test_save_load_continue_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    """With `slack=0`: what is kept in memory to clip less often is not in Keras' files."""

    def fresh() -> Any:
        optimizer = keras.optimizers.SGD(0.3, momentum=0.9)
        return compiled(network(lambda **geometry: SpectralClip(1.0, **geometry)), optimizer)

    # with slack the moments of the clips would depend on what the callback knows from before
    whole = fresh()
    fit(whole, SpectralClipCallback(1.0, slack=0), epochs=2)

    first = fresh()
    fit(first, SpectralClipCallback(1.0, slack=0))
    first.save(tmp_path / "model.keras")
    second = keras.saving.load_model(tmp_path / "model.keras")
    assert second.get_layer("conv").kernel_constraint.get_config() == SpectralClip(1.0, strides=2).get_config() | {"strides": 2}
    np.testing.assert_array_equal(second.get_layer("conv").kernel.numpy(), first.get_layer("conv").kernel.numpy())
    fit(second, SpectralClipCallback(1.0, slack=0))

    assert largest(second) <= 1 + ROUNDING
    for one, two in zip(whole.weights, second.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy(), err_msg=one.path)


def test_clone_model() -> None:
    model = small(kernel_constraint=SpectralClip(0.5))
    clone = keras.models.clone_model(model)
    constraint = clone.get_layer("conv").kernel.constraint
    assert type(constraint) is SpectralClip
    assert constraint is not model.get_layer("conv").kernel.constraint
    fit(compiled(random_(clone)))
    assert largest_norm(clone) <= 0.5 * CLOSE


def test_what_backup_and_restore_brings_back_is_projected(tmp_path: Path) -> None:
    """It restores when training begins, after this callback has projected."""
    first = compiled(small())
    first.optimizer.build(first.trainable_variables)
    os.makedirs(tmp_path / "backup")
    first.save_weights(tmp_path / "backup" / "latest.weights.h5")
    assert largest_norm(first) > 2

    model, watch = compiled(small()), Watch("on_train_batch_begin")
    fit(model, SpectralClipCallback(1.0), keras.callbacks.BackupAndRestore(tmp_path / "backup"), watch)
    assert max(watch.norms["on_train_batch_begin"]) <= CLOSE


def test_one_callback_fits_twice_and_two_models() -> None:
    clip = SpectralClipCallback(1.0)
    for model in (first := compiled(small()), first, compiled(network())):
        random_(model)
        fit(model, clip)
        assert largest_norm(model) <= CLOSE
    # it lets go of the model when training is over
    random_(model)
    before = model.get_layer("head").kernel.numpy()
    model.evaluate(X, Y, verbose=0, callbacks=[clip])
    np.testing.assert_array_equal(model.get_layer("head").kernel.numpy(), before)


def test_logs_reach_the_history() -> None:
    clip = SpectralClipCallback(1.0, log=True)
    history = fit(compiled(small(), keras.optimizers.SGD(5.0)), clip, epochs=3, validation_data=(X[:4], Y[:4])).history
    assert len(history["spectral_clip/norm_before"]) == len(history["spectral_clip/clipped"]) == 3
    assert history["spectral_clip/norm_before"][0] > 1.1, "what the updates have led to, not what is left"
    assert 0 < history["spectral_clip/clipped"][0] <= 2


def test_weights_that_become_nan_stop_training_with_the_name_of_the_layer() -> None:
    model = compiled(small(), keras.optimizers.SGD(float("inf")))
    with pytest.raises(ValueError, match=r"(conv|head), after step 1"):
        fit(model, SpectralClipCallback(1.0))


def test_a_loop_of_ones_own_on_the_mirror() -> None:
    """A core hook, attached to the mirror and to a torch optimizer of the model's own parameters."""
    model = small()
    optimizer = torch.optim.SGD([weight.value for weight in model.trainable_weights], lr=0.5)
    device = model.weights[0].value.device
    x, y = torch.tensor(X, device=device), torch.tensor(Y, device=device)
    with sh.SpectralClip(1.0).attach(mirror(model), optimizer) as handle:
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            assert largest_norm(model) <= CLOSE
    assert handle.hook.step == 3


# -- which layers --------------------------------------------------------------------------------------------------------


class Standardized(L.Conv2D):
    """Rewrites its kernel when it is called."""

    def call(self, inputs: Any) -> Any:
        return super().call(inputs) * 2


class Block(L.Layer):
    """Two layers of the same name, and a weight of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.one, self.two = L.Dense(4, name="dense"), L.Dense(4, name="dense")

    def build(self, shape: Any) -> None:
        self.gain = self.add_weight(shape=(4, 4), name="gain")
        self.one.build(shape)
        self.two.build(shape)

    def call(self, x: Any) -> Any:
        return self.two(self.one(x)) @ self.gain


def zoo() -> Any:
    shared = L.Dense(4, name="shared")
    tokens = keras.Input((5,), dtype="int32")
    x = L.Embedding(10, 4, name="words")(tokens)
    x = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = keras.Sequential([L.Conv1D(4, 3, name="conv"), L.LayerNormalization(name="norm")], name="body")(x)
    x = L.TimeDistributed(shared, name="steps")(x)
    x = L.LSTM(4, return_sequences=True, name="recurrent")(x)
    x = Block(name="block")(shared(x))
    x = L.SpectralNormalization(L.Dense(4, name="inner"), name="normalized")(x)
    x = L.EinsumDense("abc,bcd->abd", output_shape=(3, 4), name="batched")(x)
    x = L.Reshape((3, 4, 1), name="image")(x)
    x = Standardized(2, 3, padding="same", name="standardized")(x)
    adapted = L.Dense(3, name="adapted")
    x = adapted(L.Flatten()(x))
    adapted.enable_lora(2)
    return random_(keras.Model(tokens, x))


@pytest.fixture(scope="module")
def animals() -> Any:
    return zoo()


def started(model: Any, **settings: Any) -> SpectralClipCallback:
    """A callback whose training has begun."""
    clip = SpectralClipCallback(1.0, **settings)
    clip.set_model(compiled(model))
    clip.on_train_begin()
    return clip


def chosen(clip: SpectralClipCallback) -> set[str]:
    return {target.name for target in clip.hook.targets}


@pytest.mark.filterwarnings("ignore:.*want of support.*")
def test_every_layer_is_found_or_has_a_reason(animals: Any) -> None:
    clip = started(animals)
    attention = {f"attention.{part}" for part in ("query", "key", "value", "attention_output")}
    # a layer that is used twice is there once, and two of the same name are two
    assert chosen(clip) == attention | {"body.conv", "steps.shared", "block.dense", "block.dense_"}
    reasons = {
        "words": "Embedding has no operator",
        "body.norm": "LayerNormalization has no operator",
        "recurrent.lstm_cell": "LSTMCell has no operator",
        "block": "Block has a call of its own",
        "normalized": "SpectralNormalization rewrites the kernel in every call; take the wrapper off",
        "batched": "'abc,bcd->abd' is more than a product with one matrix",
        "standardized": "Standardized has a call of its own",
        "adapted": "LoRA or quantization makes the kernel of this Dense anew",
    }
    assert set(clip.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in clip.skipped[name]
    assert max(float(sh.spectral_norm(op)) for op in operators(animals).values()) <= 1.001


@pytest.mark.filterwarnings("ignore:.*want of support.*")
@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ({"layers": "attention"}, {f"attention.{part}" for part in ("query", "key", "value", "attention_output")}),
        ({"layers": ["*.conv", "block.dense*"]}, {"body.conv", "block.dense", "block.dense_"}),
        ({"layers": L.Conv1D}, {"body.conv"}),
        ({"exclude": [L.EinsumDense, "block"]}, {"body.conv", "steps.shared"}),
        ({"layers": lambda layer: isinstance(layer, L.Dense), "exclude": "steps"}, {"block.dense", "block.dense_"}),
        ({"layers": lambda name, layer: name.startswith("body") and hasattr(layer, "kernel")}, {"body.conv"}),
    ],
)
def test_patterns_are_those_of_keras(animals: Any, patterns: dict[str, Any], names: set[str]) -> None:
    assert chosen(started(animals, **patterns)) == names


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ({"layers": "bodi.conv"}, ValueError, "did you mean body.conv"),
        ({"layers": "words"}, ValueError, "names words, but Embedding has no operator"),
        ({"layers": L.Embedding}, ValueError, "no layer to act on is left"),
        ({"exclude": [3]}, TypeError, "`exclude` takes globs"),
    ],
)
def test_patterns_that_do_not_fit(animals: Any, patterns: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        started(animals, **patterns)


def recurrent(**settings: Any) -> Any:
    x = keras.Input((4, 3))
    return random_(keras.Model(x, L.Dense(2, name="head")(L.LSTM(8, name="lstm", **settings)(x))), scale=2.0)


def run(model: Any, *callbacks: Any) -> Any:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 4, 3)).astype("float32"), rng.normal(size=(16, 2)).astype("float32")
    model.compile(keras.optimizers.SGD(0.5), "mse")
    return model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=list(callbacks)).history


def test_cells_that_are_left_free_are_a_warning_with_their_share() -> None:
    """3 · 32 and 8 · 32 of 368 elements of kernels."""
    clip = SpectralClipCallback(1.0, log=True)
    with pytest.warns(UserWarning, match=r"leaves 96% of the weights .* free for want of support: lstm\.lstm_cell") as seen:
        run(recurrent(), clip)
    assert sum("for want of support" in str(each.message) for each in seen) == 1
    assert "LSTMCell has no operator. Its recurrent_constraint=SpectralClip" in clip.skipped["lstm.lstm_cell"]


@pytest.mark.filterwarnings("error:.*want of support")
def test_cells_with_constraints_of_their_own_are_not_free() -> None:
    model = recurrent(kernel_constraint=SpectralClip(1.0), recurrent_constraint=SpectralClip(1.0))
    run(model, SpectralClipCallback(1.0))
    for kernel in (model.get_layer("lstm").cell.kernel, model.get_layer("lstm").cell.recurrent_kernel):
        assert np.linalg.norm(kernel.numpy(), 2) <= 1 + 1e-6


@pytest.mark.filterwarnings("error:.*want of support")
def test_embeddings_are_listed_and_not_counted() -> None:
    tokens = keras.Input((4,), dtype="int32")
    model = keras.Model(tokens, L.Dense(2, name="head")(L.Flatten()(L.Embedding(100, 8, name="words")(tokens))))
    assert "Embedding has no operator" in started(model).skipped["words"]


def test_frozen_layers_are_left_as_they_are() -> None:
    """As Keras' own constraints leave them; the next training after thawing constrains them."""
    model = random_(small(), scale=3.0)
    model.get_layer("conv").trainable = False
    before, clip = model.get_layer("conv").kernel.numpy().copy(), SpectralClipCallback(1.0)
    fit(compiled(model), clip)
    assert np.array_equal(model.get_layer("conv").kernel.numpy(), before)
    assert "frozen" in clip.skipped["conv"]
    assert norm(model.get_layer("head")) <= 1 + ROUNDING
    model.get_layer("conv").trainable = True
    fit(compiled(model), clip)
    assert largest_norm(model) <= CLOSE
    assert clip.skipped == {}


def test_a_finite_operator_is_refused() -> None:
    layer = L.Conv2D(2, 3)
    layer.build((None, 6, 6, 2))
    with pytest.raises(NotImplementedError, match="`input_size` is not supported"):
        sh.as_operator(mirror(layer), input_size=6)


# -- options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_the_hook_under_its_name(name: str) -> None:
    option = {name: OPTIONS[name]}
    if name == "lora":
        with pytest.raises(NotImplementedError, match=r"`lora` has no meaning in Keras; got 'product'.*enable_lora"):
            SpectralClipCallback(**option)
        return
    if name == "example":
        for example in (option[name], np.zeros((1, 4))):  # an array is no tensor, and a tensor would be refused next
            with pytest.raises(NotImplementedError, match=r"`example` is not supported in Keras.*at every input size"):
                SpectralClipCallback(example=example)
        return
    callback, core = SpectralClipCallback(**option), sh.SpectralClip(**option)
    assert getattr(callback.hook, name) == getattr(core, name) != getattr(sh.SpectralClip(), name)
    assert repr(callback) == repr(core).replace("SpectralClip", "SpectralClipCallback", 1) != repr(SpectralClipCallback())


@pytest.mark.parametrize(("option", "error"), WRONG)
def test_options_are_checked_in_the_constructor(option: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(NotImplementedError if "example" in option else error, match=f"`?{next(iter(option))}"):
        SpectralClipCallback(**option)


@pytest.mark.parametrize("momentum", [0.99, 0.5])
def test_gains_of_batch_normalizations(momentum: float) -> None:
    """`|γ| / √(variance + ε)` of each channel in float64, as the layer has them when `fit` is over."""

    def trained(*callbacks: Any) -> float:
        norm = L.BatchNormalization(momentum=momentum, name="norm")
        model = random_(keras.Sequential([keras.Input(X.shape[1:]), L.Conv2D(4, 3), norm, L.Flatten(), L.Dense(3)]), 0.2)
        norm.gamma.assign([3.0, -2.0, 0.1, 1.0])
        fit(compiled(model), *callbacks)
        gamma, variance = (value.numpy().astype("float64") for value in (norm.gamma, norm.moving_variance))
        return float((np.abs(gamma) / np.sqrt(variance + norm.epsilon)).max())

    assert trained(SpectralClipCallback(0.5)) > 1
    clip = SpectralClipCallback(0.5, batch_norm="clip")
    assert 0.3 < trained(clip) <= 0.5 * CLOSE
    assert clip.skipped == {}
    assert "norm" in clip.report()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_processes_share_the_work(tmp_path: Path) -> None:
    """`distribute=True` in two processes that train alike: the weights of one process alone, in both."""
    code = f"""
import sys
import numpy as np
import torch

sys.path[:0] = {[str(ROOT / "tests"), str(ROOT / "tests" / "integrations")]!r}
import test_keras as t

torch.distributed.init_process_group("gloo")
model = t.compiled(t.small())
t.fit(model, t.SpectralClipCallback(1.0, distribute=True))
np.savez({str(tmp_path)!r} + f"/{{torch.distributed.get_rank()}}.npz", *[weight.numpy() for weight in model.weights])
"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "run.py"]
    (tmp_path / "run.py").write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KERAS_BACKEND": "torch"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = compiled(small())
    fit(alone, SpectralClipCallback(1.0))
    for rank in range(2):
        saved = np.load(tmp_path / f"{rank}.npz")
        for weight, value in zip(alone.weights, saved.values(), strict=True):
            np.testing.assert_allclose(weight.numpy(), value, atol=1e-6, err_msg=weight.path)
    assert largest_norm(alone) <= CLOSE


def test_parts_of_dense_layers() -> None:
    """Each head of an attention by itself, patterns as Keras has them; the axes of an output one after another."""
    model = random_(keras.Sequential([keras.Input((5, 6)), L.EinsumDense("abc,cde->abde", (5, 2, 3), name="heads"), L.Flatten()]))
    model.add(L.Dense(4, name="head"))
    model.get_layer("head").kernel.assign(np.random.default_rng(3).normal(size=(30, 4)))
    before = model.get_layer("heads").kernel.numpy()
    started(model, split={L.EinsumDense: 2, "head": [1, 3]})
    for part in np.split(model.get_layer("head").kernel.numpy(), [1], axis=1):
        assert observers.matrix_norm(part) == pytest.approx(1, abs=1e-6)
    after = model.get_layer("heads").kernel.numpy()
    for head in range(2):
        expected = observers.clipped_matrix(before[:, head], 0.0, 1.0)
        np.testing.assert_allclose(after[:, head], expected, atol=1e-6)
    assert observers.matrix_norm(after.reshape(6, -1)) > 1.1, "the whole is not bounded then"


# -- any hook ------------------------------------------------------------------------------------------------------------


def test_any_hook_gets_every_event() -> None:
    hook = Counting(every=2, layers=[L.Dense, "conv"], log=True)
    model = compiled(small())
    history = fit(model, HookCallback(hook), epochs=2, validation_data=(X[:4], Y[:4])).history
    steps = 2 * len(X) // BATCH
    assert hook.step == steps
    assert hook.events == ["begin", *["before", "before", "act"] * (steps // 2), "finish"]
    assert {target.name for target in hook.targets} == {"conv", "head"}
    # over the second, fourth and sixth step of the epoch
    assert history["counting/step"] == [4.0, 10.0]
    fit(model, HookCallback(every := Counting()), validation_data=(X[:4], Y[:4]))
    assert every.events.count("act") == steps // 2
    # epochs begin and end, validation begins, training ends
    assert every.events.count("finish") == 4
    assert repr(HookCallback(hook)) == "HookCallback(Counting(0.0, layers=[Dense, 'conv'], every=2, log=True))"


def test_each_optimizer_gets_what_a_hook_adds_once() -> None:
    """Of its own variables, and no others."""
    seen: list[set[str]] = []

    class Sees(Counting):
        def before_step(self, parameters: Any) -> None:
            super().before_step(parameters)
            seen.append({target.name for target in self.targets if any(p is parameters[0] for p in target.leaves())})
            assert len(parameters) == 1

    flat = X.reshape(len(X), -1)
    model = TwoOptimizers()
    model(flat)
    model.compile()
    model.fit(flat, Y, batch_size=BATCH, verbose=0, shuffle=False, callbacks=[HookCallback(Sees())])
    assert seen == [{"body"}, {"head"}] * (len(X) // BATCH)


@pytest.mark.parametrize("accumulation", [None, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_a_hook_adds_to_gradients_reaches_the_optimizer(accumulation: int | None, scaled: bool) -> None:
    """A hook that pulls weights to zero is Keras' own penalty of their squares."""

    def trained(*callbacks: Any, **settings: Any) -> Any:
        parts = [L.Conv2D(4, 3, groups=2, name="conv", **settings), L.DepthwiseConv2D(3, name="depthwise"), L.Flatten()]
        if settings:
            parts[1].depthwise_regularizer = settings["kernel_regularizer"]
        model = random_(keras.Sequential([keras.Input(X.shape[1:]), *parts, L.Dense(3, name="head", **settings)]), 0.3)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=accumulation)
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0) if scaled else optimizer
        fit(compiled(model, optimizer), *callbacks)
        assert "_backend_update_step" not in vars(getattr(optimizer, "inner_optimizer", optimizer)), "nothing is left behind"
        return model

    pulled, penalized, plain = (
        trained(HookCallback(Counting(0.2))),
        trained(kernel_regularizer=keras.regularizers.L2(0.1)),
        trained(),
    )
    for one, two in zip(pulled.weights, penalized.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), two.numpy(), atol=2e-6, err_msg=one.path)
    assert np.abs(pulled.get_layer("conv").kernel.numpy() - plain.get_layer("conv").kernel.numpy()).max() > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("compiler")
def test_gradients_of_a_compiled_training_step() -> None:
    """`jit_compile=True`: the hook is called, and what it adds is in the step."""
    models = []
    for jit in (False, True):
        model = compiled(random_(small(), 0.1), keras.optimizers.SGD(0.01), jit_compile=jit)
        fit(model, HookCallback(hook := Counting(2.0)))
        assert hook.events.count("before") == len(X) // BATCH
        models.append(model)
    for plain, jitted in zip(models[0].weights, models[1].weights, strict=True):
        np.testing.assert_allclose(plain.numpy(), jitted.numpy(), atol=1e-4)


def test_a_training_that_an_error_has_ended_leaves_no_hook() -> None:
    class Stops(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            raise KeyboardInterrupt

    model, callback = compiled(small()), HookCallback(Counting())
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, Stops())
    callback.hook.events.clear()
    fit(model, callback)
    assert callback.hook.events.count("before") == callback.hook.events.count("act") == len(X) // BATCH


# -- the process ---------------------------------------------------------------------------------------------------------


def test_torch_keeps_its_defaults() -> None:
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")
    assert torch.is_grad_enabled()


def test_another_backend_is_an_import_error(tmp_path: Path) -> None:
    """Before Keras is imported, and nothing is set for the user."""
    code = f"""
import json, os, pathlib, sys

def refused(**environment):
    for name in ("KERAS_BACKEND", "KERAS_HOME"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    before = dict(os.environ)
    try:
        import spectral_hooks.integrations.keras
    except ImportError as error:
        assert "KERAS_BACKEND=torch" in str(error), error
        assert dict(os.environ) == before
        assert "keras" not in sys.modules
        return True
    return False

home = pathlib.Path({str(tmp_path)!r})
assert refused(KERAS_BACKEND="tensorflow", KERAS_HOME=str(home))
assert refused(KERAS_HOME=str(home)), "Keras takes TensorFlow by itself"
(home / "keras.json").write_text(json.dumps({{"backend": "jax"}}))
assert refused(KERAS_HOME=str(home)), "the settings file"
(home / "keras.json").write_text(json.dumps({{"backend": "torch"}}))
assert not refused(KERAS_HOME=str(home)), "the settings file says torch"
import keras
assert keras.config.backend() == "torch"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["keras", "keras_mirror"])
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"spectral_hooks.integrations.{name}"))
    assert result.failed == 0
    assert result.attempted > 0


def test_example(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, str(ROOT / "examples" / "keras_digits.py"), "--epochs", "1", "--quick"]
    environment = os.environ | {"KERAS_BACKEND": "torch", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    plain, clipped = (
        next(line for line in done.stdout.splitlines() if line.startswith(name) and "%" in line).split()
        for name in ("plain", "SpectralClip(1.0)")
    )
    assert plain[2] == clipped[2], "both start from the same weights"
    assert float(plain[3]) > 1
    assert clipped[3] == "1.000"
    assert not list(tmp_path.iterdir()), "nothing is left behind"
