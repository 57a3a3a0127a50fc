"""`skew`, and what it has in common with the other modules that take the place of a convolution."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import GEOMETRIES, apply_to_identity, in_shape, train
from cases import all_singular_values as singular_values
from cases import conv_layer as made
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import spectral_hooks as sh
from spectral_hooks.parametrizations.cayley import cayley
from spectral_hooks.parametrizations.conv_norm import conv_norm
from spectral_hooks.parametrizations.remove import remove_spectral
from spectral_hooks.parametrizations.rescaled import rescaled
from spectral_hooks.parametrizations.skew import nearest_frames, skew
from spectral_hooks.parametrizations.skew_kernels import modulus_one, skew_bound
from spectral_hooks.weights.selection import select

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


# -- the polynomial --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", range(2, 9))
def test_modulus_is_one_on_the_imaginary_interval(degree: int) -> None:
    coefficients = modulus_one(degree)
    assert len(coefficients) == degree + 1
    assert coefficients[0] == 1
    omega = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    values = sum(c * (1j * omega) ** t for t, c in enumerate(coefficients))
    squared = values.abs().square()
    low, high = (1 - 6e-6, 1) if degree % 2 == 0 else (1, 1 + 6.1e-6)
    assert low - 1e-12 <= float(squared.min())
    assert float(squared.max()) <= high + 1e-12
    # the documented reach
    reach = {2: 0.10, 3: 0.43, 4: 0.98, 5: 1.71, 6: 2.56, 7: 3.51, 8: 4.54}[degree]
    angles = torch.cumsum((values[1:] / values[:-1]).angle(), 0)
    assert float(angles[-1]) / 2 == pytest.approx(reach, abs=0.005)


# -- orthogonal -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("gain", [0.1, 1, 1e3])
def test_all_singular_values_are_one(name: str, gain: float) -> None:
    for dtype, degree in ((torch.float64, 4), (torch.float64, 5), (torch.float32, 4), (torch.float32, 7)):
        values = singular_values(skew(made(name, dtype, gain), degree=degree), in_shape(name))
        assert float((values.square() - 1).abs().max()) <= (6.1e-6 if dtype == torch.float64 else 1e-5)
        assert degree % 2 or float(values[0]) <= 1 + (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", ["square", "stride", "1-D", "dilated"])
def test_at_every_input_size(name: str) -> None:
    layer = skew(made(name, gain=30))
    channels, *size = in_shape(name)
    for grown in (0, 2, 4):
        values = singular_values(layer, (channels, *(n + grown for n in size)))
        assert float((values.square() - 1).abs().max()) <= 6.1e-6


def test_is_the_polynomial_of_a_skew_matrix() -> None:
    plain = made("square", gain=2)
    convolution = apply_to_identity(plain, in_shape("square"))
    layer = skew(plain)
    generator, frame = layer._factors(plain.weight.detach())
    assert frame is None
    generator = sh.ConvOperator(generator, padding=1, input_size=in_shape("square")[1:]).to_dense()
    difference = convolution - convolution.T
    scale = float(generator.norm() / difference.norm())
    assert torch.allclose(generator, scale * difference, atol=1e-14)
    assert 0.5 < float(torch.linalg.matrix_norm(generator, 2)) <= 1
    expected = sum(c * torch.linalg.matrix_power(generator, t) for t, c in enumerate(modulus_one(4)))
    assert torch.allclose(apply_to_identity(layer, in_shape("square")), expected, atol=1e-13)


@pytest.mark.parametrize(
    "name", ["stride", "stride, more outputs", "more outputs", "fewer outputs", "grouped stride, overlap", "1-D"]
)
def test_other_channels_are_framed(name: str) -> None:
    """`A = p(J) C` with `J = α (M Cᵀ - C Mᵀ)`, on the outputs alone; `C` is what is nearest to `M` among such convolutions."""
    plain, shape = made(name, gain=2), in_shape(name)
    layer = skew(plain)
    generator, frame = layer._factors(plain.weight.detach())
    out, groups, stride = plain.out_channels, plain.groups, plain.stride
    assert generator.shape[:2] == (out, out // groups)
    assert frame.shape == (out, plain.in_channels // groups, *stride)
    frames = sh.ConvOperator(frame, stride=stride, groups=groups, input_size=shape[1:]).to_dense()
    small = tuple(n // s for n, s in zip(shape[1:], stride, strict=True))
    padding = tuple(k // 2 for k in generator.shape[2:])
    j = sh.ConvOperator(generator, padding=padding, groups=groups, input_size=small).to_dense()
    convolution = apply_to_identity(plain, shape)
    difference = convolution @ frames.T - frames @ convolution.T
    assert torch.allclose(j, difference * (j.norm() / difference.norm()), atol=1e-13)
    assert 0.5 < float(torch.linalg.matrix_norm(j, 2)) <= 1
    polynomial = sum(c * torch.linalg.matrix_power(j, t) for t, c in enumerate(modulus_one(4)))
    assert torch.allclose(apply_to_identity(layer, shape), polynomial @ frames, atol=1e-13)
    # a polar factor: the other one is symmetric and has no negative eigenvalue
    taps = plain.weight.detach()[(..., *(slice(a, a + s) for a, s in zip(plain.padding, stride, strict=True)))]
    for a, b in zip(taps.flatten(1).chunk(groups), frame.flatten(1).chunk(groups), strict=True):
        other = a @ b.T if len(a) <= a.shape[1] else b.T @ a
        assert torch.allclose(other, other.T, atol=1e-13)
        assert float(torch.linalg.eigvalsh(other)[0]) > -1e-13


@pytest.mark.parametrize("name", ["square", "stride", "fewer outputs", "more outputs", "patches with gaps", "gap and overlap"])
def test_zero_weight_has_finite_gradients(name: str) -> None:
    layer = skew(made(name, gain=0, bias=True))
    assert float((singular_values(skew(made(name, gain=0)), in_shape(name)) - 1).abs().max()) <= 1e-12
    layer(torch.randn(2, *in_shape(name), dtype=torch.float64)).square().mul(2).sum().backward()
    assert bool(layer.weight.grad.isfinite().all())


@pytest.mark.parametrize("name", ["patches with gaps", "gap and overlap"])
def test_nothing_jumps_where_inputs_are_not_read(name: str) -> None:
    """Their share of the frame is no null space of the taps, in which any basis would do."""
    matrices = []
    for gain in (1.0, 1.0 + 1e-7):
        matrices.append(apply_to_identity(skew(made(name, gain=gain)), in_shape(name)))
    assert torch.allclose(*matrices, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 6, 2), (1, 3)])
def test_nearest_frame(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    u, _, vh = torch.linalg.svd(x.detach(), full_matrices=False)
    assert torch.allclose(nearest_frames(x).detach(), u @ vh, atol=1e-13)
    assert torch.autograd.gradcheck(nearest_frames, x)
    # of equal singular values, where decompositions have no derivative
    assert torch.autograd.gradcheck(nearest_frames, nearest_frames(x).detach().mul(3).requires_grad_())


@pytest.mark.parametrize("channels", [1, 2, 16, 40, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_of_skew_kernels(channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(2, channels, channels, 3, 3, dtype=dtype)
    kernel = kernel - kernel.transpose(1, 2).flip(3, 4)
    norm = float(sh.spectral_norm(sh.ConvOperator(kernel.double().flatten(0, 1), padding=1, groups=2), rtol=1e-5))
    bound = float(skew_bound(kernel))
    assert norm / 1.00001 <= bound <= (1.2 if channels <= 64 else 3) * norm
    for gain in (1e-25, 1e18):
        assert float(skew_bound(kernel * gain)) == pytest.approx(gain * bound, rel=1e-5)
    assert float(skew_bound(kernel * 0)) < 1e-30


def test_bound_of_a_generator_with_equal_eigenvalues() -> None:
    """The worst case for powers: 64 eigenvalues of modulus one at every frequency."""
    half = torch.eye(32, dtype=torch.float64)
    kernel = torch.zeros(1, 64, 64, 3, 3, dtype=torch.float64)
    kernel[0, :32, 32:, 1, 1], kernel[0, 32:, :32, 1, 1] = half, -half
    assert 1 <= float(skew_bound(kernel)) <= 1.17158 * 64 ** (1 / 64) * 1.0001


def test_bound_has_the_gradient_of_the_norm() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(2, 3, 3, 5, dtype=torch.float64)
    kernel = (kernel - kernel.transpose(1, 2).flip(3)).requires_grad_()
    assert torch.autograd.gradcheck(skew_bound, kernel)


def test_small_generators_are_not_scaled_up() -> None:
    """So the identity can be reached, and nothing jumps near it."""
    plain = made("square", gain=1e-3)
    convolution = apply_to_identity(plain, in_shape("square"))
    matrix = apply_to_identity(skew(plain), in_shape("square"))
    slope = modulus_one(4)[1]
    assert torch.allclose(matrix, torch.eye(len(matrix), dtype=matrix.dtype) + slope * (convolution - convolution.T), atol=1e-5)


def test_zero_weight_is_the_identity() -> None:
    x = torch.randn(2, *in_shape("square"), dtype=torch.float64)
    assert torch.equal(skew(made("square", gain=0))(x), x)


def test_gradcheck() -> None:
    for name in ("square", "stride", "more outputs", "grouped stride, overlap", "patches with gaps"):
        for gain in (0.1, 5.0):
            layer = skew(made(name, gain=gain, bias=True))
            x = torch.randn(2, *in_shape(name), dtype=torch.float64, requires_grad=True)

            def call(x: Tensor, weight: Tensor, bias: Tensor, layer: nn.Module = layer) -> Tensor:
                return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

            inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["square", "stride", "more outputs"])
def test_training_keeps_it(name: str) -> None:
    layer = skew(made(name, torch.float32))
    before = layer.weight.detach().clone()
    train(layer, in_shape(name))
    assert float((layer.weight - before).detach().norm()) > float(before.norm())
    for mode in (True, False):
        values = singular_values(layer.train(mode), in_shape(name))
        assert float((values.square() - 1).abs().max()) <= 1e-5
        assert float(values[0]) <= 1 + 1e-5


# -- refusals ---------------------------------------------------------------------------------------------------------------


def with_identity_bias(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    return layer


BAD = [
    ("zeros of another size", lambda: nn.Conv2d(2, 2, 3), ValueError, "padding=1"),
    ("too much padding", lambda: nn.Conv2d(2, 2, 3, padding=2), ValueError, "`layer` must keep the size"),
    ("overlap without padding", lambda: nn.Conv2d(2, 2, 5, stride=2), ValueError, "padding=2"),
    ("reflect", lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), NotImplementedError, "reflect padding"),
    ("dilated stride", lambda: nn.Conv2d(2, 2, 3, padding=2, dilation=2, stride=2), NotImplementedError, "dilation only"),
    ("linear", lambda: nn.Linear(2, 2), TypeError, "use orthogonal"),
    ("transposed, of another size", lambda: nn.ConvTranspose2d(2, 2, 3), ValueError, "`layer` must keep the size"),
    ("transposed, even", lambda: nn.ConvTranspose2d(2, 2, 2), ValueError, "multiply it by the stride"),
    (
        "transposed, one short",
        lambda: nn.ConvTranspose2d(2, 2, 3, padding=1, stride=2),
        ValueError,
        r"takes output_padding=\(1, 1\); got output_padding=\(0, 0\)",
    ),
    (
        "transposed, dilated stride",
        lambda: nn.ConvTranspose2d(2, 2, 3, padding=2, dilation=2, stride=2),
        NotImplementedError,
        "dilation only",
    ),
    ("transposed, padding by a word", lambda: nn.ConvTranspose2d(2, 2, 3, padding="same"), ValueError, "must be numbers"),
    ("pruned", lambda: prune.random_unstructured(nn.Conv2d(2, 2, 3, padding=1), "weight", 0.5), ValueError, "pruned"),
    ("pruned bias", lambda: prune.random_unstructured(nn.Conv2d(2, 2, 3, padding=1), "bias", 0.5), ValueError, "the bias of"),
    ("bias from elsewhere", lambda: with_identity_bias(rescaled(nn.Conv2d(2, 2, 3, padding=1))), ValueError, "the bias of"),
    ("from elsewhere", lambda: parametrizations.orthogonal(nn.Conv2d(2, 2, 3, padding=1)), ValueError, "parametrized"),
    ("old weight norm", lambda: weight_norm(nn.Conv2d(2, 2, 3, padding=1)), NotImplementedError, "weight_norm"),
    ("lazy", lambda: nn.LazyConv2d(2, 3, padding=1), ValueError, "no weight yet"),
]


@pytest.mark.parametrize(("layer", "error", "match"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
@pytest.mark.parametrize("function", [skew, cayley])
@pytest.mark.filterwarnings("ignore")
def test_refuses(function, layer, error, match) -> None:
    layer = layer()
    keys = list(layer.state_dict())
    with pytest.raises(error, match=match):
        function(layer)
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("degree", [1, 9, 4.0, True, None, "4"])
def test_refuses_degrees(degree) -> None:
    with pytest.raises(ValueError, match="`degree` must be an int from 2 to 8"):
        skew(made("square"), degree=degree)


@pytest.mark.parametrize("function", [skew, cayley])
def test_refuses_inputs(function) -> None:
    layer = function(made("stride"))
    with pytest.raises(ValueError, match="`x` must have sizes that the stride"):
        layer(torch.ones(1, 2, 6, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="`x` must have shape"):
        layer(torch.ones(1, 3, 6, 6, dtype=torch.float64))


# -- every module in the place of a convolution -------------------------------------------------------------------------------

REPLACEMENTS = [skew, cayley, conv_norm]
each = pytest.mark.parametrize("replace", REPLACEMENTS)


@each
@pytest.mark.parametrize("name", GEOMETRIES)
def test_shapes_types_and_bias_are_the_plain_ones(replace, name: str) -> None:
    plain = made(name, torch.float32, bias=True)
    x = torch.randn(2, *in_shape(name))
    expected = plain(x)
    layer = replace(plain)
    y = layer(x)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    assert torch.allclose(layer(x[0]), y[0], atol=1e-6), "without a batch"
    offset = layer(torch.zeros_like(x))
    assert torch.allclose(offset, plain.bias.view(-1, *[1] * (x.ndim - 2)).expand_as(offset))


@each
def test_parameters_are_those_of_the_layer(replace) -> None:
    plain = made("square", bias=True).eval()
    names, weight, bias = list(plain.state_dict()), plain.weight, plain.bias
    weight.requires_grad_(False)
    layer = replace(plain)
    assert layer.weight is weight
    assert layer.bias is bias
    assert not layer.training
    assert list(layer.state_dict()) == names
    assert not list(layer.buffers())
    assert "kernel_size=(3, 3)" in repr(layer)


@each
def test_state_dict_round_trip_and_plain_checkpoints(replace) -> None:
    layer, twin = replace(made("square", gain=3, bias=True)), replace(made("square", bias=True))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, *in_shape("square"), dtype=torch.float64)
    assert torch.equal(twin(x), layer(x))
    twin.load_state_dict(made("square", gain=2, bias=True).state_dict())
    assert torch.equal(twin.weight, made("square", gain=2).weight)


@each
def test_training_and_evaluation_agree_and_nothing_changes(replace) -> None:
    layer = replace(made("square", bias=True))
    x = torch.randn(2, *in_shape("square"), dtype=torch.float64)
    state = copy.deepcopy(layer.state_dict())
    first = layer(x).detach()
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(layer(x), first, rtol=0, atol=1e-14)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def counted(layer: nn.Module) -> list[int]:
    """How often what evaluation remembers is made."""
    name = next(name for name in ("_factors", "_transform", "_gain") if hasattr(layer, name))
    make, calls = getattr(layer, name), []

    def wrapped(*args):
        calls.append(1)
        return make(*args)

    setattr(layer, name, wrapped)
    return calls


def change_in_place(layer: nn.Module) -> None:
    layer.weight.mul_(-0.5)


def change_data(layer: nn.Module) -> None:
    layer.weight.data.mul_(-0.5)


def change_behind(layer: nn.Module) -> None:
    layer.weight.data = -0.5 * layer.weight.data


def load(layer: nn.Module) -> None:
    layer.load_state_dict(made("square", gain=-0.5).state_dict())


@each
@pytest.mark.parametrize("change", [change_in_place, change_data, change_behind, load])
def test_evaluation_remembers_until_the_weight_changes(replace, change) -> None:
    layer = replace(made("square")).eval()
    calls = counted(layer)
    sizes = (5, 6), (6, 5), (7, 7)
    xs = [torch.randn(1, 4, *size, dtype=torch.float64) for size in sizes]
    with torch.no_grad():
        for _ in range(2):
            before = [layer(x) for x in xs]
        made_once = 1 if replace is skew else len(sizes)
        assert len(calls) == made_once
        change(layer)
        after = [layer(x) for x in xs]
        assert len(calls) == 2 * made_once
        expected = replace(made("square", gain=-0.5))
        assert all(torch.allclose(a, expected(x), atol=1e-14) for a, x in zip(after, xs, strict=True))
        assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(after, before, strict=True))


@each
def test_evaluation_forgets_what_is_too_much(replace) -> None:
    layer = replace(made("square")).eval()
    with torch.no_grad():
        for size in range(3, 20):
            layer(torch.ones(1, 4, size, size, dtype=torch.float64))
    assert len(layer._memory._seen[1]) <= 8


@each
@pytest.mark.parametrize("name", ["square", "stride"])
def test_inference_mode_leaves_nothing_that_training_cannot_use(replace, name: str) -> None:
    layer = replace(made(name)).eval().requires_grad_(False)
    x = torch.randn(1, *in_shape(name), dtype=torch.float64)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).square().sum().backward()  # the gradient of a plain sum is expanded, which older Fourier transforms of torch refuse
    assert bool(x.grad.any())


@each
def test_gradients_in_evaluation_are_those_of_training(replace) -> None:
    layer, x = replace(made("square")), torch.randn(1, *in_shape("square"), dtype=torch.float64)
    gradients = []
    for mode in (True, False):
        layer.train(mode)
        with torch.no_grad():
            layer(x)
        layer.zero_grad()
        layer(x).square().mul(x).sum().backward()
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)
    assert bool(gradients[0].any())


@each
@pytest.mark.parametrize("name", ["square", "stride"])
def test_transforms_of_functions_see_the_weight(replace, name: str) -> None:
    """In evaluation too, where what is remembered knows of no tangent and of no batch."""
    layer, x = replace(made(name)).eval(), torch.randn(1, *in_shape(name), dtype=torch.float64)

    def call(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, x)

    weight = layer.weight.detach()
    change, cotangent = torch.randn_like(weight), torch.randn_like(layer(x))
    _, tangent = torch.func.jvp(call, (weight,), (change,))
    difference = (call(weight + 1e-6 * change) - call(weight - 1e-6 * change)) / 2e-6
    assert torch.allclose(tangent, difference, atol=1e-6 * float(difference.abs().max()) + 1e-8)
    assert float(tangent.norm()) > 0.01
    gradient = torch.func.grad(lambda weight: (call(weight) * cotangent).sum())(weight)
    assert float((gradient * change).sum()) == pytest.approx(float((tangent * cotangent).sum()), rel=1e-6)
    batched = torch.func.vmap(call)(torch.stack([weight, -2 * weight]))
    assert torch.allclose(batched[0], call(weight), atol=1e-12)
    assert torch.allclose(batched[1], call(-2 * weight), atol=1e-12)


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(replace, copied) -> None:
    layer = replace(made("square")).eval()
    x = torch.randn(1, *in_shape("square"), dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
        twin = copied(layer)
        assert torch.equal(twin(x), before)
        twin.weight.mul_(-0.5)
        assert not torch.allclose(twin(x), before)
        assert torch.equal(layer(x), before)


@each
def test_half_precision_and_autocast_compute_in_single(replace) -> None:
    layer = replace(made("square", torch.float32, bias=True))
    x = torch.randn(2, *in_shape("square"))
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # orthogonal ones lose but the rounding of the result; the convolution under ConvNorm is one in half precision
    assert torch.allclose(y.float(), exact, atol=5e-2 if replace is conv_norm else 0, rtol=5e-3)
    low = copy.deepcopy(layer).bfloat16()
    low(x.bfloat16()).sum().backward()
    assert low.weight.grad.dtype == torch.bfloat16
    assert bool(low.weight.grad.isfinite().all())
    if replace is not conv_norm:
        rounded = copy.deepcopy(low).float()
        y = low(x.bfloat16())
        assert y.dtype == torch.bfloat16
        assert torch.allclose(y.float(), rounded(x.bfloat16().float()), rtol=5e-3)


@each
def test_what_is_not_finite_shows(replace) -> None:
    layer = replace(made("square"))
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = float("nan")
    assert bool(layer(torch.ones(1, *in_shape("square"), dtype=torch.float64)).isnan().any())


@each
@pytest.mark.parametrize("name", ["square", "stride"])
def test_compiles_to_one_graph(replace, name: str) -> None:
    layer = replace(made(name, torch.float32))
    x = torch.randn(2, *in_shape(name))
    torch._dynamo.reset()
    y = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.allclose(y, layer(x), atol=1e-6)
    y.sum().backward()
    assert bool(layer.weight.grad.any())


@each
def test_parametrized_layers_start_from_what_they_compute(replace) -> None:
    plain = rescaled(made("square", gain=30))
    effective = plain.weight.detach().clone()
    layer = replace(plain)
    assert torch.allclose(layer.weight, effective)
    assert list(layer.state_dict()) == ["weight"]


@each
@pytest.mark.parametrize("name", ["1×1", "patches", "patches with gaps", "grouped stride"])
def test_layers_without_overlap_have_a_plain_equal(replace, name: str) -> None:
    layer = replace(made(name, bias=True))
    x = torch.randn(2, *in_shape(name), dtype=torch.float64)
    matrix = apply_to_identity(layer, in_shape(name))
    size = in_shape(name)[1:]
    assert torch.allclose(sh.as_operator(layer, size).to_dense(), matrix, atol=1e-12)
    model = nn.Sequential(layer)
    y = layer(x)
    remove_spectral(model)
    assert type(model[0]) is nn.Conv2d
    assert model[0].bias is layer.bias
    assert torch.allclose(model[0](x), y, atol=1e-12)


@each
def test_others_are_refused_by_name(replace) -> None:
    layer = replace(made("square"))
    with pytest.raises(NotImplementedError, match="no convolution of a small kernel"):
        sh.as_operator(layer)
    with pytest.raises(NotImplementedError, match="no convolution of a small kernel"):
        layer.to_plain()
    selection = select(nn.Sequential(layer, nn.Linear(2, 2)))
    assert [target.name for target in selection.targets] == ["1"]
    assert "no convolution of a small kernel" in selection.skipped["0"]


@pytest.mark.parametrize("make", [cayley, conv_norm])
def test_expanded_inputs_and_gradients_are_as_good_as_dense_ones(make) -> None:
    """MKL's Fourier transforms take no stride of zero."""
    layer = make(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"))
    x = torch.randn(1, 2, 1, 1).expand(4, 2, 6, 5).requires_grad_()
    dense = x.detach().clone().requires_grad_()
    y, expected = layer(x), layer(dense)
    torch.testing.assert_close(y, expected)
    (ours,) = torch.autograd.grad(y.sum(), x)
    (theirs,) = torch.autograd.grad(expected, dense, torch.ones_like(expected).clone())
    torch.testing.assert_close(ours, theirs)
