"""What holds by construction holds for every parameter, of any scale and shape, and however the layer is run."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import spectral_hooks as sh
from spectral_hooks.parametrizations.stiefel import FAR, MAPS, bounded, cayley_transform, householder, polar_factor, qr

P = sh.parametrizations

SCALES = [1e-30, 1e-10, 1e-3, 0.1, 1.0, 10.0, 60.0, 300.0, 1e3, 1e5, 1e10, 1e30]
#: How far singular values may be from one.
NEAR = {torch.float32: 1e-5, torch.float64: 1e-12}
SHAPES = [(1, 1), (6, 1), (2, 2), (5, 5), (12, 5), (2, 7, 3), (80, 24)]

#: A layer, and the shape of an input that is orthogonal to no border: the layer's matrix has all singular values 1.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "orthogonal tall": (lambda: P.orthogonal(nn.Linear(3, 5, bias=False)), (3,)),
    "orthogonal row": (lambda: P.orthogonal(nn.Linear(6, 1, bias=False)), (6,)),
    "orthogonal exp": (lambda: P.orthogonal(nn.Linear(7, 4, bias=False), orthogonal_map="exp"), (7,)),
    "orthogonal qr": (lambda: P.orthogonal(nn.Linear(4, 4, bias=False), orthogonal_map="qr"), (4,)),
    "orthogonal householder": (lambda: P.orthogonal(nn.Linear(4, 6, bias=False), orthogonal_map="householder"), (4,)),
    "kernel cayley": (lambda: P.orthogonal(circular(4, 6)), (4, 6, 4)),
    "kernel exp": (lambda: P.orthogonal(circular(4, 4), orthogonal_map="exp"), (4, 6, 4)),
    "kernel qr": (lambda: P.orthogonal(circular(6, 4, groups=2), orthogonal_map="qr"), (6, 6, 4)),
    "kernel householder": (lambda: P.orthogonal(circular(2, 9, stride=2), orthogonal_map="householder"), (2, 6, 4)),
    "skew": (lambda: P.skew(nn.Conv2d(4, 4, 3, padding=1, bias=False)), (4, 5, 6)),
    "skew wide": (lambda: P.skew(nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False)), (6, 5, 4)),
    "skew stride": (lambda: P.skew(nn.Conv1d(2, 5, 4, stride=2, padding=1, bias=False)), (2, 12)),
    "skew transposed": (lambda: P.skew(transposed(5, 2, 4, stride=2, padding=1)), (5, 6)),
    "cayley": (lambda: P.cayley(circular(4, 4)), (4, 5, 6)),
    "cayley transposed": (lambda: P.cayley(transposed(6, 2, 3, stride=2, padding=1, output_padding=1)), (6, 5)),
    "cayley tall": (lambda: P.cayley(nn.Conv1d(3, 8, 5, padding=2, bias=False)), (3, 9)),
    "cayley stride": (lambda: P.cayley(nn.Conv2d(2, 6, 4, stride=2, padding=1, bias=False)), (2, 6, 4)),
    "group shuffle": (lambda: P.group_shuffle(nn.Linear(16, 16, bias=False), blocks=4), (16,)),
    "group shuffle uneven": (lambda: P.group_shuffle(nn.Linear(15, 15, bias=False), blocks=3), (15,)),
    "group shuffle conv": (lambda: P.group_shuffle(nn.Conv2d(4, 8, 3, padding=1, bias=False), blocks=2), (4, 5, 6)),
    "group shuffle conv transposed": (lambda: P.group_shuffle(transposed(8, 4, 3, padding=1), blocks=2), (8, 6)),
}
KINDS = ["zeros", "ones", "row", "rank one", "repeated columns", "nearly dependent", "strict triangle", "graded", "random"]


def transposed(*args: int, **settings: int) -> nn.ConvTranspose1d:
    return nn.ConvTranspose1d(*args, bias=False, **settings)


def circular(inputs: int, outputs: int, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="circular", bias=False, **settings)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_kind(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Matrices, the largest entry about 1, in float64."""
    shape = (1,) * (2 - len(shape)) + tuple(shape)
    random = seeded(*shape, seed=seed)
    ones = torch.ones_like(random)
    if kind == "zeros":
        return 0 * ones
    if kind == "ones":
        return ones
    if kind == "row":
        return torch.cat([ones[..., :1, :], 0 * ones[..., 1:, :]], -2)
    if kind == "rank one":
        return random[..., :1] * random[..., :1, :]
    if kind == "repeated columns":
        return random[..., :1] * ones
    if kind == "nearly dependent":
        return ones + 1e-6 * random
    if kind == "strict triangle":
        return ones.triu(1)
    if kind == "graded":
        graded = random * 10.0 ** (6 * seeded(*shape, seed=seed + 1))
        return graded / graded.abs().max()
    return random


def every_parameter(layer: nn.Module, dtype: torch.dtype) -> Iterator[str]:
    """The layer with parameters of every kind and scale that the dtype can hold."""
    for kind in KINDS:
        for scale in SCALES:
            with torch.no_grad():
                for i, parameter in enumerate(layer.parameters()):
                    parameter.copy_((scale * of_kind(kind, parameter.shape, seed=i)).view(parameter.shape))
            layer.zero_grad()
            yield f"{kind}, {scale}"


def matrix(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """By what it does to each unit vector, in float64."""
    size = torch.Size(shape).numel()
    with torch.no_grad():
        return layer(torch.eye(size, dtype=dtype).view(size, *shape)).flatten(1).double()


def weighed(y: Tensor) -> Tensor:
    return (y * seeded(*y.shape, seed=9).to(y)).sum()


# -- every parameter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_columns_are_orthonormal_at_every_scale(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    function, based = MAPS[name]
    for start in [(), (polar_factor(seeded(*shape, seed=5)).to(dtype),)][: 1 + based]:
        for kind in KINDS:
            for scale in SCALES:
                x = (scale * of_kind(kind, shape)).to(dtype).requires_grad_()
                frame = function(x, *start)
                error = float((torch.linalg.svdvals(frame.detach().double()) - 1).abs().max())
                assert error <= NEAR[dtype], (kind, scale)
                weighed(frame).backward()
                assert bool(x.grad.isfinite().all()), (kind, scale)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_isometries_at_every_scale(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().to(dtype)
    # what the polynomial of skew convolutions is off by
    near = NEAR[dtype] if "skew" not in name and "group shuffle conv" not in name else max(NEAR[dtype], 3.1e-6)
    for where in every_parameter(layer, dtype):
        found = matrix(layer, shape, dtype)
        values = torch.linalg.svdvals(found)[: min(found.shape)]
        assert float((values - 1).abs().max()) <= near, where
        weighed(layer(seeded(2, *shape).to(dtype))).backward()
        assert all(bool(p.grad.isfinite().all()) for p in layer.parameters()), where


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["orthogonal tall", "orthogonal qr", "orthogonal householder", "kernel exp", "group shuffle"])
def test_parameters_in_half_precision_are_off_by_the_cast_alone(name: str, dtype: torch.dtype) -> None:
    half, exact = LAYERS[name][0]().to(dtype), LAYERS[name][0]()
    for where in every_parameter(half, dtype):
        if not all(bool(p.isfinite().all()) for p in half.parameters()):  # beyond float16
            continue
        exact.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
        assert torch.equal(half.weight, exact.weight.to(dtype)), where


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 20), lambda: nn.Conv2d(4, 8, 3)], ids=["matrix", "kernel"])
def test_training_at_any_rate_keeps_it(make: Callable[[], nn.Module], map: str) -> None:
    torch.manual_seed(0)
    layer = P.orthogonal(make(), orthogonal_map=map)
    x = seeded(4, *((8,) if isinstance(layer, nn.Linear) else (4, 6, 6))).float()
    for rate in (1.0, 30.0, 1e4, 1e8):
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
        for _ in range(5):
            optimizer.zero_grad()
            weighed(layer(x)).backward()
            optimizer.step()
        op = sh.as_operator(layer)
        op = op.with_weight(op.weight.detach().double())
        values = sh.singular_values(op if isinstance(layer, nn.Linear) else op.circular(6))
        assert float((values - 1).abs().max()) <= 1e-5, rate


def test_frames_of_a_tensor_train_at_every_scale() -> None:
    for layer in (P.tensor_train(nn.Linear(12, 20), 6), P.tensor_train(nn.Conv2d(12, 8, 3, groups=2), (3, 4))):
        for where in every_parameter(layer, torch.float32):
            for frame in (layer.out_frame, layer.in_frame):
                assert float((torch.linalg.svdvals(frame.detach().double()) - 1).abs().max()) <= 1e-5, where


@pytest.mark.parametrize("two_sided", [False, True])
def test_rotated_weights_keep_their_singular_values_at_every_scale(two_sided: bool) -> None:
    torch.manual_seed(0)
    layer = P.group_shuffle(nn.Linear(12, 8, bias=False), blocks=2, fine_tune=True, two_sided=two_sided)
    before = torch.linalg.svdvals(layer.weight.detach().double())
    for kind in KINDS:
        for scale in SCALES:
            with torch.no_grad():
                for parameter in layer.parametrizations.weight[0].parameters():
                    parameter.copy_((scale * of_kind(kind, parameter.shape)).view(parameter.shape))
            after = torch.linalg.svdvals(layer.weight.detach().double())
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ones", "rank one", "random"])
@pytest.mark.parametrize("training", [True, False])
def test_a_normalizer_does_not_see_the_scale(training: bool, kind: str) -> None:
    layer = P.conv_norm(circular(3, 6)).train(training)
    x = seeded(2, 3, 5, 4).float()
    expected = None
    for scale in SCALES:
        with torch.no_grad():
            layer.weight.copy_((scale * of_kind(kind, (6, 27))).view(6, 3, 3, 3))
        layer.zero_grad()
        y = layer(x)
        weighed(y).backward()
        assert bool(layer.weight.grad.isfinite().all())
        expected = y if expected is None else expected
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.float16):  # in which a filter of this length could overflow
            torch.testing.assert_close(layer(x).float(), expected, rtol=3e-2, atol=3e-2)


def test_a_normalizer_of_zeros_gives_zeros() -> None:
    layer = P.conv_norm(circular(3, 6))
    nn.init.zeros_(layer.weight)
    y = layer(seeded(2, 3, 5, 4).float())
    weighed(y).backward()
    assert not y.any()
    assert bool(layer.weight.grad.isfinite().all())


# -- lengths that are bounded ----------------------------------------------------------------------------------------------


def test_short_tensors_stay_and_long_ones_keep_direction_and_order() -> None:
    for kind in KINDS[1:]:
        x = of_kind(kind, (9, 4))
        x = x / torch.linalg.matrix_norm(x, 2)
        last = 0.0
        for scale in [0.1, 1.0, FAR / 2, FAR, 2 * FAR, 1e3, 1e4, 1e5, 1e6]:
            y = bounded(scale * x)
            length = float(torch.linalg.matrix_norm(y, 2))
            torch.testing.assert_close(y / length, x)
            assert last < length < 2 * FAR
            last = length
            if scale <= FAR / 2:
                assert torch.equal(y, scale * x)
        assert bool(bounded(1e300 * x).isfinite().all())


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 20.0])
def test_the_derivative_of_what_is_bounded(scale: float) -> None:
    x = seeded(2, 4, 3)
    x = (scale * FAR * x / (x.mT @ x).norm(dim=(-2, -1), keepdim=True).sqrt() * 1.001).requires_grad_()
    assert torch.autograd.gradcheck(bounded, x)
    assert torch.autograd.gradgradcheck(bounded, x)
    for function in (cayley_transform, lambda x: cayley_transform(x[..., :3, :])):
        assert torch.autograd.gradcheck(function, x)


@pytest.mark.parametrize("function", [cayley_transform, qr, householder])
def test_derivatives_of_second_order(function: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradgradcheck(function, seeded(5, 3).requires_grad_())
    assert torch.autograd.gradgradcheck(function, seeded(3, 3).requires_grad_())


def test_the_derivative_of_gram_schmidt_is_that_of_torch() -> None:
    x, direction = seeded(7, 4), seeded(7, 4, seed=1)

    def torchs(x: Tensor) -> Tensor:
        q, r = torch.linalg.qr(x)
        return q * r.diagonal().sign()

    for scale in (1e-3, 1.0, 1e6):
        for left, right in zip(*(torch.func.jvp(f, (scale * x,), (scale * direction,)) for f in (qr, torchs)), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-8)


# -- what is assigned, and what cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: nn.Conv2d(3, 4, 3, padding=1)], ids=["matrix", "kernel"])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_a_start_of_every_scale(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    found = []
    for scale in [*SCALES, *([1e-200, 1e200] if dtype == torch.float64 else [])]:
        layer = make().to(dtype)
        with torch.no_grad():
            layer.weight.copy_(scale * of_kind("random", layer.weight.shape))
        P.orthogonal(layer)
        found.append(layer.weight.detach())
        distance = layer.parametrizations.weight[0].distance
        assert 0 < distance < float("inf")
        if scale >= 1e5:
            assert distance == pytest.approx(1, abs=1e-4)
    for weight in found[1:] if isinstance(layer, nn.Linear) else ():
        torch.testing.assert_close(weight, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        *((lambda map=map: P.orthogonal(nn.Linear(4, 6), orthogonal_map=map), (6, 5)) for map in MAPS),
        (lambda: P.orthogonal(nn.Linear(4, 6)), (4, 6)),
        (lambda: P.orthogonal(nn.Conv2d(4, 6, 3)), (6, 4, 5, 5)),
        (lambda: P.orthogonal(nn.Conv2d(4, 6, 3)), (6, 36)),
        (lambda: P.group_shuffle(nn.Linear(16, 16), blocks=4), (16, 8)),
        (lambda: P.group_shuffle(nn.Linear(16, 16), blocks=4, fine_tune=True), (16, 8)),
    ],
)
def test_weights_of_another_shape_are_refused(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer = make()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    message = rf"must have the layer's shape \({layer.weight.shape[0]}, .*got \({shape[0]}, {shape[1]}"
    with pytest.raises(ValueError, match=message):
        layer.weight = torch.ones(shape)
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict({"weight": torch.ones(shape), "bias": layer.bias})
    with pytest.raises(TypeError, match=r"floating-point tensor; got torch\.int64"):
        layer.weight = torch.ones(layer.weight.shape, dtype=torch.long)
    with pytest.raises(TypeError, match="floating-point tensor; got list"):
        layer.weight = [1.0]
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_transposed_convolutions_with_padding_by_a_word_are_refused(padding: str) -> None:
    for function in (sh.as_operator, P.orthogonal, P.rescaled, lambda layer: P.tensor_train(layer, 2)):
        with pytest.raises(ValueError, match=f"`padding` of a transposed convolution must be numbers.*{padding}"):
            function(nn.ConvTranspose2d(4, 4, 3, padding=padding))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_geometry_without_an_orthogonal_kernel_is_told(transposed: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Exactly where a singular value of the circular operator is not 1; all others are."""
    told = 0
    for inputs, outputs in ((1, 1), (1, 2), (2, 3), (3, 2), (2, 8), (1, 12)):
        for taps, stride, dilation in ((1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (3, 2, 1), (1, 3, 1), (2, 3, 2), (3, 4, 2)):
            caplog.clear()
            kind = nn.ConvTranspose1d if transposed else nn.Conv1d
            layer = kind(inputs, outputs, taps, stride=stride, dilation=dilation, dtype=torch.float64)
            found = sh.as_operator(P.orthogonal(layer, orthogonal_map="qr")).circular(12).to_dense().detach()
            values = torch.linalg.svdvals(found)
            ones, zeros = (values - 1).abs() <= 1e-10, values <= 1e-10
            assert bool((ones | zeros).all())
            short = int(ones.sum()) < min(found.shape)
            assert ("none is orthogonal" in caplog.text) == short, (inputs, outputs, taps, stride, dilation)
            told += short
    assert told


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("taps", [1, 3])
def test_the_memory_format_is_that_of_the_input(blocks: int, taps: int) -> None:
    torch.manual_seed(0)
    layer = P.group_shuffle(nn.Conv2d(16, 16, taps, padding=taps // 2), blocks=blocks)
    x = torch.randn(2, 16, 6, 5)
    assert layer(x).is_contiguous()
    assert layer(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


# -- however it is run -----------------------------------------------------------------------------------------------------

#: One of each family and map.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"matrix {map}": (lambda map=map: P.orthogonal(nn.Linear(6, 4), orthogonal_map=map), (6,)) for map in MAPS},
    **{
        f"kernel {map}": (lambda map=map: P.orthogonal(nn.Conv2d(4, 6, 3, padding=1), orthogonal_map=map), (4, 6, 6))
        for map in MAPS
    },
    "skew": (lambda: P.skew(nn.Conv2d(4, 6, 3, padding=1)), (4, 6, 6)),
    "cayley": (lambda: P.cayley(nn.Conv2d(4, 6, 3, padding=1)), (4, 6, 6)),
    "skew transposed": (lambda: P.skew(nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), 0.5), (4, 3, 5)),
    "cayley transposed": (lambda: P.cayley(nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), 0.5), (4, 3, 5)),
    "conv_norm": (lambda: P.conv_norm(nn.Conv2d(4, 6, 3, padding=1)), (4, 6, 6)),
    "group shuffle": (lambda: P.group_shuffle(nn.Linear(8, 8), blocks=2), (8,)),
    "group shuffle gain": (lambda: P.group_shuffle(nn.Linear(8, 8), 2.0, blocks=2), (8,)),
    "group shuffle conv": (lambda: P.group_shuffle(nn.Conv2d(4, 8, 3, padding=1), 2.0, blocks=2), (4, 6, 6)),
    "group shuffle transposed": (lambda: P.group_shuffle(nn.ConvTranspose2d(4, 8, 3, padding=1), blocks=2), (4, 6, 6)),
    "rotated": (lambda: P.group_shuffle(nn.Conv2d(4, 8, 3, padding=1), blocks=2, fine_tune=True), (4, 6, 6)),
    "train": (lambda: P.tensor_train(nn.Linear(6, 4), 2), (6,)),
    "train conv": (lambda: P.tensor_train(nn.Conv2d(4, 6, 3, padding=1), 2), (4, 6, 6)),
}
family = pytest.mark.parametrize("name", FAMILIES)


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    make, shape = FAMILIES[name]
    torch.manual_seed(seed)
    model = nn.Sequential(make())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, seeded(2, *shape).float()


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@family
@pytest.mark.parametrize("training", [True, False])
def test_ensembles_by_vmap(name: str, training: bool) -> None:
    models = [made(name, seed)[0].train(training) for seed in range(3)]
    x = made(name)[1]
    params, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])

    def run(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(base, (params, buffers), (x,))

    close(vmap(run)(params, buffers), torch.stack([model(x) for model in models]))
    with torch.no_grad():
        close(vmap(run)(params, buffers), torch.stack([model(x) for model in models]))
    weights = seeded(*models[0](x).shape, seed=9).float()
    found = vmap(grad(lambda *state: (run(*state) * weights).sum()))(params, buffers)
    for i, model in enumerate(models):
        weighed(model(x)).backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                close(found[key][i], parameter.grad, 1e-4)


@family
@pytest.mark.parametrize("gradients", [True, False])
def test_traced_models_are_functions_of_their_weights(name: str, gradients: bool) -> None:
    model, x = made(name)
    model.eval()
    with torch.no_grad():
        model(x)  # what is remembered is not what is traced
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, x)  # checks itself
    close(traced(x), model(x))
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    close(torch.jit.load(stored)(x), model(x))


@family
def test_exported_models(name: str) -> None:
    model, x = made(name)
    model.eval()
    with torch.no_grad():
        model(x)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            exported = torch.export.export(model, (x,))
        close(exported.module()(x), model(x))


@family
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_with_gradients(name: str, training: bool) -> None:
    model, x = made(name)
    model.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x))
    weighed(compiled(x)).backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    weighed(model(x)).backward()
    for left, right in zip(found, (p.grad for p in model.parameters() if p.requires_grad), strict=True):
        close(left, right, 1e-4)


def test_generated_code_for_training() -> None:
    """The default compiler needs every size to be known, that of the grid of a filter's energies too."""
    model, x = made("conv_norm")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    close(compiled(x), model(x))
    weighed(compiled(x)).backward()
    assert model[0].weight.grad.any()


@family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_does_not_reach_inside(name: str, dtype: torch.dtype) -> None:
    model, x = made(name)
    for training in (True, False):
        model.train(training).zero_grad()
        with torch.autocast("cpu", dtype):
            y = model(x)
            weighed(y.float()).backward()
        assert y.dtype == dtype
        close(y.float(), model(x), 3e-2)
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


@family
@pytest.mark.parametrize("training", [True, False])
def test_inference_then_training_and_copies(name: str, training: bool) -> None:
    model, x = made(name)
    model.train(training)
    expected = model(x).detach()
    with torch.inference_mode():
        close(model(x), expected)
    weighed(model(x)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    with torch.no_grad():
        close(model(x), expected)
        close(copy.deepcopy(model)(x), expected)
        if not torch.nn.utils.parametrize.is_parametrized(model[0]):  # torch cannot pickle these
            close(pickle.loads(pickle.dumps(model))(x), expected)
