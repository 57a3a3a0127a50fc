"""parametrizations.rescaled: whatever the parameter, the layer's norm is inside; and the layer can be made plain again."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import BOUNDS, CONVS, FEW_CONVS, MATRICES, Case, apply_to_identity, traces_copies
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torchs
from torch.nn.utils import parametrize, prune

import spectral_hooks as sh
from spectral_hooks.norms.quick import quick
from spectral_hooks.parametrizations import remove_spectral, rescaled, spectral_report

COPYING = ("reflect", "replicate")
ON_LATTICE = [case for case in FEW_CONVS if case.mode not in COPYING]

#: One layer for each way that `quick` takes: grids of 8 and of 4 points, the reshaped kernel, a matrix; small and wide.
WAYS = {
    "grid of 8": lambda: nn.Conv2d(4, 6, 3),
    "grid of 4": lambda: nn.Conv2d(48, 40, 3, bias=False),
    "strided": lambda: nn.Conv2d(20, 12, 3, stride=2, padding=1),
    "large kernel": lambda: nn.Conv2d(3, 8, 7, stride=2),
    "depthwise": lambda: nn.Conv2d(24, 24, 5, groups=24),
    "grouped": lambda: nn.Conv2d(16, 24, 3, groups=4),
    "wide": lambda: nn.Conv2d(80, 96, 3),
    "wide, transposed": lambda: nn.ConvTranspose2d(96, 72, 3, stride=1),
    "wide groups": lambda: nn.Conv1d(150, 210, 3, groups=2),
    "volume": lambda: nn.Conv3d(5, 4, 3),
    "1×1": lambda: nn.Conv2d(12, 20, 1),
    "patches": lambda: nn.Conv2d(3, 70, 4, stride=4),
    "matrix": lambda: nn.Linear(13, 7),
    "wide matrix": lambda: nn.Linear(150, 90),
}


def made(name: str, dtype: torch.dtype = torch.float32, gain: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    layer = WAYS[name]().to(dtype)
    with torch.no_grad():
        layer.weight.mul_(gain)
    return layer


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def sampled_norm(layer: nn.Module, points: int = 12) -> float:
    """From below, and independent of the library: float64 frequency samples of the layer's own weight at stride 1 (a stride can
    only reduce the norm), the layer's matrix where there is no convolution."""
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(weight, 2))
    assert set(layer.stride) == {1}
    axes = tuple(range(2, weight.ndim))
    return max(
        float(
            torch.linalg.matrix_norm(torch.fft.fftn(kernel, s=(points,) * len(axes), dim=axes).flatten(2).movedim(2, 0), 2).max()
        )
        for kernel in weight.chunk(layer.groups)
    )


# -- the bound -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONVS[::3], ids=str)
def test_quick_is_a_bound_of_every_geometry(case: Case) -> None:
    layer = case.layer()
    norm = float(torch.linalg.matrix_norm(apply_to_identity(layer, case.in_shape), 2))
    for op in (case.operator(layer.weight), case.operator(layer.weight, finite=False)):
        assert float(quick(op).detach()) >= norm * (1 - 1e-12)


@pytest.mark.parametrize("shape", MATRICES)
def test_quick_is_exact_for_matrices(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(quick(sh.DenseOperator(weight))) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-9)


@pytest.mark.parametrize("name", WAYS)
def test_quick_is_as_tight_as_it_says(name: str) -> None:
    op = sh.as_operator(made(name, torch.float64))
    norm, bound = float(sh.spectral_norm(op, rtol=1e-4).detach()), float(quick(op).detach())
    # the certificate of the norm may itself be 1e-4 too high
    least, most = (norm / (1 + 1e-4) * (1 - 1e-12), norm)
    slack = {"grid of 4": 1.18, "wide": 2.1, "wide, transposed": 2.1, "wide groups": 1.75, "volume": 1.28, "strided": 1.18}
    exact = {"1×1", "patches", "matrix"}
    assert least <= bound <= most * (1 + 1e-9 if name in exact else 1.002 if name == "wide matrix" else slack.get(name, 1.04))


@pytest.mark.parametrize("size", [3, 70])
def test_quick_where_all_singular_values_are_equal(size: int) -> None:
    """No gap, which is what defeats Krylov steps; and the kernel for which the reshaped one overrates most."""
    torch.manual_seed(0)
    matrix = nn.init.orthogonal_(torch.empty(size, size, dtype=torch.float64))
    assert float(quick(sh.DenseOperator(matrix))) == pytest.approx(1, rel=1e-6)
    kernel = torch.zeros(size, size, 3, 3, dtype=torch.float64)
    kernel[:, :, 1, 1] = matrix
    assert 1 <= float(quick(sh.ConvOperator(kernel))) <= (1.05 if size == 3 else 3.001)


def test_quick_where_the_top_vector_hides() -> None:
    """The largest singular value belongs to a block without the largest entries; its vectors have a single entry."""
    matrix = 0.9 * torch.eye(100, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[0.8, 0.8], [0.8, 0.8]])
    assert float(quick(sh.DenseOperator(matrix))) == pytest.approx(1.6, rel=1e-6)
    single = torch.eye(100, dtype=torch.float64)
    single[57, 57] = 1.01
    assert 1.01 <= float(quick(sh.DenseOperator(single))) <= 1.01 * 1.06


@pytest.mark.parametrize("name", ["grid of 8", "wide", "wide matrix", "depthwise"])
@pytest.mark.parametrize("gain", [1e-150, 1e-30, 1e30, 1e150])
def test_quick_is_homogeneous(name: str, gain: float) -> None:
    layer = made(name, torch.float64)
    op = sh.as_operator(layer)
    assert float(quick(op.with_weight(layer.weight * gain)).detach()) == pytest.approx(float(quick(op).detach()) * gain, rel=1e-9)


@pytest.mark.parametrize("name", WAYS)
def test_quick_has_the_gradient_of_a_homogeneous_function(name: str) -> None:
    layer = made(name, torch.float64)
    value = quick(sh.as_operator(layer))
    value.backward()
    assert float((layer.weight.grad * layer.weight).sum().detach()) == pytest.approx(float(value.detach()), rel=1e-9)


# -- the guarantee ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ON_LATTICE, ids=str)
def test_certified_norm_is_inside_for_every_geometry(case: Case) -> None:
    layer = rescaled(case.layer(), max_norm=0.7)
    for gain in (1e-3, 1.0, 1e3):
        with torch.no_grad():
            original(layer).copy_(case.layer(seed=1).weight * gain)
        op = sh.as_operator(layer)
        bracket = float(sh.spectral_norm(op, rtol=1e-5).detach())
        assert bracket / (1 + 1e-5) <= 0.7 * (1 + 1e-12)
        assert float(torch.linalg.matrix_norm(apply_to_identity(layer, case.in_shape), 2)) <= 0.7 * (1 + 1e-12)


@pytest.mark.parametrize("case", [case for case in FEW_CONVS if case.mode in COPYING], ids=str)
def test_padding_that_repeats_inputs_needs_the_input_size(case: Case) -> None:
    layer = case.layer()
    with pytest.raises(ValueError, match="`input_size`"):
        rescaled(layer)
    assert not parametrize.is_parametrized(layer)
    with torch.no_grad():
        layer.weight.mul_(100)
    rescaled(layer, max_norm=0.7, input_size=case.size)
    norm = float(torch.linalg.matrix_norm(apply_to_identity(layer, case.in_shape), 2))
    assert 0.1 < norm <= 0.7 * (1 + 1e-12)


def test_input_size_of_a_layer_that_needs_none_is_no_restriction() -> None:
    case = Case((6,), 3, padding=1, stride=2, mode="circular")
    with_size, without = rescaled(case.layer(), 0.1, input_size=6), rescaled(case.layer(), 0.1)
    assert torch.equal(with_size.weight, without.weight)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_stored_values_obey_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    layer = rescaled(made(name, dtype, gain=30), max_norm=0.5)
    weight = layer.weight.detach()
    assert weight.dtype == dtype
    norm = float(sh.spectral_norm(sh.as_operator(layer).with_weight(weight.double()), rtol=1e-3))
    assert norm / 1.001 <= 0.5
    # at most the tightness of the bound and the room for rounding are given away
    loose = 3.1 if "wide" in name else 1.3
    assert norm >= 0.5 / loose / (1.3 if dtype in (torch.bfloat16, torch.float16) else 1)


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_any_bound_will_do(bound: str) -> None:
    layer = rescaled(made("grid of 8", gain=50), bound=BOUNDS[bound])
    norm = float(sh.spectral_norm(sh.as_operator(layer), rtol=1e-5).detach())
    assert 0.05 < norm <= 1 + 1e-5
    layer(torch.randn(2, 4, 5, 5)).sum().backward()
    assert bool(original(layer).grad.isfinite().all())


@pytest.mark.parametrize("name", ["grid of 8", "wide matrix"])
def test_training_never_leaves_the_ball(name: str) -> None:
    layer = rescaled(made(name), max_norm=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    x = torch.randn(4, 4, 6, 6) if name == "grid of 8" else torch.randn(4, 150)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().mean().mul(-1).backward()
        optimizer.step()
        assert float(original(layer).detach().norm()) > 10
        assert sampled_norm(layer) <= 1 + 1e-6
        length = float(original(layer).detach().norm() / layer.weight.detach().norm())
        assert length <= 2.001, "a parameter far outside has been brought back"
    assert sampled_norm(layer) > 0.9


# -- gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grid of 8", "strided", "large kernel", "grouped", "volume", "1×1", "matrix"])
@pytest.mark.parametrize("max_norm", [0.3, 100.0])
def test_gradcheck(name: str, max_norm: float) -> None:
    weight = made(name, torch.float64).weight.detach().requires_grad_()
    parametrization = rescaled(made(name, torch.float64), max_norm=max_norm).parametrizations.weight[0]
    direction = torch.randn_like(weight)
    direction -= direction.mul(weight.detach()).sum().clamp(min=0) * weight.detach() / weight.detach().square().sum()
    direction -= 0.1 * weight.detach()  # a descent along it leads outward, where the gradient is exact
    assert torch.autograd.gradcheck(lambda w: (parametrization(w) * direction).sum(), (weight,), fast_mode=True)
    assert torch.equal(parametrization(weight), weight) == (max_norm == 100.0)


@pytest.mark.parametrize("name", ["wide", "wide groups", "wide matrix"])
def test_gradient_of_wide_layers(name: str) -> None:
    """By Krylov steps, so not to the last digit."""
    layer = rescaled(made(name, torch.float64), max_norm=0.3)
    parametrization, weight = layer.parametrizations.weight[0], original(layer)
    direction = torch.randn_like(weight) / weight.numel() ** 0.5
    value = quick(parametrization.op.with_weight(weight))
    slope = float((torch.autograd.grad(value, weight)[0] * direction).sum())
    with torch.no_grad():
        norms = [float(quick(parametrization.op.with_weight(weight + h * direction))) for h in (-1e-4, 1e-4)]
    assert slope == pytest.approx((norms[1] - norms[0]) / 2e-4, rel=1e-2, abs=1e-4)


def test_gradient_flows_through_the_bound() -> None:
    """The effective weight does not change with the length of W, so a gradient that leads outward is orthogonal to W."""
    layer = rescaled(made("grid of 8", torch.float64), max_norm=0.3)
    layer(torch.randn(2, 4, 6, 6, dtype=torch.float64)).square().sum().neg().backward()
    weight, gradient = original(layer).detach(), original(layer).grad
    assert float(gradient.norm()) > 0
    assert abs(float((weight * gradient).sum())) < 1e-9 * float(weight.norm() * gradient.norm())


@pytest.mark.parametrize("name", ["grid of 8", "wide", "matrix", "wide matrix", "depthwise"])
def test_zero_weight(name: str) -> None:
    layer = rescaled(made(name, gain=0.0))
    assert not bool(layer.weight.any())
    layer.weight.sum().backward()
    assert torch.equal(original(layer).grad, torch.ones_like(layer.weight))


@pytest.mark.parametrize("name", ["grid of 8", "wide", "wide matrix"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(name: str, bad: float) -> None:
    """As in a plain layer: a loss that is NaN, no error in the middle of a forward."""
    layer = rescaled(made(name))
    with torch.no_grad():
        original(layer).view(-1)[3] = bad
    assert bool(layer.weight.isnan().any())


# -- assigning, saving, copying --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_feasible_weights_are_kept_and_others_rescaled(name: str) -> None:
    layer = rescaled(made(name), max_norm=1.0)
    weight = made(name).weight.detach()
    inside = weight * (0.9 / float(quick(sh.as_operator(made(name))).detach()))
    layer.weight = inside
    assert torch.equal(layer.weight, inside)
    layer.weight = 10 * inside
    assert torch.equal(original(layer), 10 * inside)
    assert torch.allclose(layer.weight, inside / 0.9, rtol=1e-4)


def test_what_is_assigned_is_copied() -> None:
    layer, weight = rescaled(nn.Linear(3, 3)), torch.ones(3, 3)
    layer.weight = weight
    with torch.no_grad():
        original(layer).zero_()
    assert torch.equal(weight, torch.ones(3, 3))


def test_registering_keeps_class_parameter_and_values() -> None:
    layer = made("grid of 8", gain=0.01)
    parameter, before = layer.weight, layer.weight.detach().clone()
    assert rescaled(layer) is layer
    assert isinstance(layer, nn.Conv2d)
    assert original(layer) is parameter
    assert torch.equal(layer.weight, before)
    assert not list(layer.buffers())
    assert repr(layer.parametrizations.weight[0]) == "Rescaled(max_norm=1.0)"


def test_every_setting_is_shown() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    rescaled(layer, 0.5, bound=sh.bounds.tap_sum, input_size=6)
    assert repr(layer.parametrizations.weight[0]) == "Rescaled(max_norm=0.5, bound=tap_sum, input_size=(6, 6))"


@pytest.mark.parametrize("number", [np.float32(2), np.float64(2), np.int64(2)])
def test_numpy_s_numbers_are_numbers(number) -> None:
    layer = rescaled(made("grid of 8", gain=30), number)
    assert type(layer.parametrizations.weight[0].max_norm) is float
    assert layer.weight.dtype == torch.float32
    assert 1.9 < sampled_norm(layer) <= 2


def test_state_dict_round_trip_bit_for_bit() -> None:
    layer, twin = (rescaled(made("grid of 8", gain=gain)) for gain in (30, 1))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert twin.load_state_dict(torch.load(file, weights_only=True)).missing_keys == []
    assert torch.equal(original(twin), original(layer))
    assert torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy], ids=["itself", "deepcopy"])
def test_plain_checkpoints_load(copied) -> None:
    checkpoint = nn.Sequential(made("grid of 8", gain=30), nn.BatchNorm2d(6)).state_dict()
    keys = list(checkpoint)
    first = nn.Sequential(rescaled(made("grid of 8")), nn.BatchNorm2d(6))
    model = copied(first)
    result = model.load_state_dict(checkpoint)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(original(model[0]), checkpoint["0.weight"])
    assert list(checkpoint) == keys, "the user's dict is as it was"
    if model is not first:
        assert not torch.equal(original(first[0]), checkpoint["0.weight"])
    with pytest.raises(RuntimeError, match=r"parametrizations\.weight\.original"):
        model.load_state_dict({key: value for key, value in checkpoint.items() if key != "0.weight"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(checkpoint | {"0.weight": torch.ones(1, 4, 3, 3)})


def test_deepcopy_is_independent() -> None:
    layer = rescaled(made("grid of 8", gain=30)).eval()
    with torch.no_grad():
        layer.weight  # noqa: B018 (fills the memory)
        twin = copy.deepcopy(layer)
        original(twin).mul_(-1)
        assert torch.equal(twin.weight, -layer.weight)
    weight = layer.weight.detach().clone()
    remove_spectral(twin)
    assert parametrize.is_parametrized(layer)
    assert torch.equal(layer.weight, weight), "torch lets a copy take the weight of its original away"
    rescaled(twin)
    assert remove_spectral(twin).state_dict().keys() == nn.Conv2d(4, 6, 3).state_dict().keys()
    assert type(layer) is not type(twin) is nn.Conv2d


def test_tied_weights_stay_tied() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    layers[1].weight = layers[0].weight
    with torch.no_grad():
        layers[0].weight.mul_(30)
    for layer in layers:
        rescaled(layer)
    assert original(layers[0]) is original(layers[1])
    before = layers[0].weight.detach().clone()
    remove_spectral(layers)
    assert layers[0].weight is layers[1].weight
    assert torch.allclose(layers[0].weight, before, rtol=1e-6)


# -- remembered in evaluation ----------------------------------------------------------------------------------------------


class Counted:
    """A bound that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, op: sh.LinearOperator) -> Tensor:
        self.calls += 1
        return quick(op)


def change_in_place(layer: nn.Module) -> None:
    original(layer).mul_(-2)


def change_data(layer: nn.Module) -> None:
    original(layer).data.mul_(-2)


def change_behind(layer: nn.Module) -> None:
    original(layer).data = -2 * original(layer).data


def load(layer: nn.Module) -> None:
    layer.load_state_dict(layer.state_dict() | {"parametrizations.weight.original": torch.ones_like(layer.weight)})


def cast(layer: nn.Module) -> None:
    layer.bfloat16()


CHANGES = [change_in_place, change_data, change_behind, load, cast]


@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_remembers_until_the_weight_changes(change) -> None:
    bound = Counted()
    layer = rescaled(made("grid of 8"), 0.3, bound=bound)
    trained = layer.weight.detach().clone()
    layer.eval()
    with torch.no_grad():
        bound.calls = 0
        values = [layer.weight.clone() for _ in range(3)]
        assert bound.calls == 1
        assert all(torch.equal(a, b) for a, b in pairwise([trained, *values])), "training and evaluation agree"
        change(layer)
        after = layer.weight
        assert bound.calls == 2
        expected = rescaled(made("grid of 8").to(after.dtype), 0.3)
        original(expected).copy_(original(layer))
        assert torch.equal(after, expected.weight)
        assert not torch.equal(after, trained)


def test_gradients_in_evaluation_are_those_of_training() -> None:
    """Fine-tuning with batch norm frozen by eval()."""
    layer, x = rescaled(made("grid of 8"), 0.3), torch.randn(2, 4, 5, 5)
    gradients = []
    for mode in (True, False, False):
        layer.train(mode)
        with torch.no_grad():
            layer(x)
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients.append(original(layer).grad.clone())
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_inference_mode_leaves_nothing_that_training_cannot_use() -> None:
    layer, x = rescaled(made("grid of 8"), 0.3).eval().requires_grad_(False), torch.randn(1, 4, 5, 5)
    with torch.inference_mode():
        layer(x)
    # a scale on top of what is remembered needs it for its gradient
    gain = torch.ones((), requires_grad=True)
    parametrization = layer.parametrizations.weight[0]
    (parametrization._memory(parametrization, original(layer), parametrization._factors)[1] * gain).backward()
    layer(x.requires_grad_()).sum().backward()
    assert bool(x.grad.any())


def test_transforms_of_functions_see_the_weight() -> None:
    layer, x = rescaled(made("grid of 8", torch.float64), 0.3).eval(), torch.randn(1, 4, 5, 5, dtype=torch.float64)
    key, weight = "parametrizations.weight.original", 3 * original(layer).detach()

    def call(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {key: weight}, x)

    change = torch.randn_like(weight)
    _, tangent = torch.func.jvp(call, (weight,), (change,))
    difference = (call(weight + 1e-6 * change) - call(weight - 1e-6 * change)) / 2e-6
    assert torch.allclose(tangent, difference, atol=1e-7)
    batched = torch.func.vmap(call)(torch.stack([weight, -2 * weight]))
    assert torch.allclose(batched[1], call(-2 * weight), atol=1e-12)


def test_parametrization_pickles_without_its_memory() -> None:
    layer = rescaled(made("grid of 8"), 0.3).eval()
    with torch.no_grad():
        layer.weight  # noqa: B018 (fills the memory)
    parametrization = layer.parametrizations.weight[0]
    data = pickle.dumps(parametrization)
    twin = pickle.loads(data)
    weight = original(layer)
    assert len(data) < 4 * weight.numel() + 4000
    assert twin._memory._seen is None
    assert torch.equal(twin(weight), parametrization(weight))


def test_deterministic_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    layers = [rescaled(made("wide matrix"), 0.3) for _ in range(2)]
    torch.set_rng_state(state)
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(torch.get_rng_state(), state)


# -- other machinery of torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "training"), [("strided", True), ("grid of 8", False), ("wide", True), ("wide matrix", False)])
def test_compiles_as_a_single_graph(name: str, training: bool) -> None:
    torch._dynamo.reset()
    layer = rescaled(made(name), 0.3).train(training)
    shape = (2, layer.weight.shape[1]) + ((8, 8) if isinstance(layer, nn.Conv2d) else ())
    x = torch.randn(shape)
    compiled = torch.compile(layer, fullgraph=traces_copies(), backend="aot_eager")
    expected = layer(x)
    expected.sum().backward()
    gradient = original(layer).grad.clone()
    layer.zero_grad()
    result = compiled(x)
    result.sum().backward()
    assert torch.allclose(result, expected, atol=1e-6)
    assert torch.allclose(original(layer).grad, gradient, atol=1e-4)
    with torch.no_grad():
        original(layer).mul_(-1)
        assert torch.allclose(compiled(x) - layer(0 * x), layer(0 * x) - expected, atol=1e-5), "no stale weight"


def test_compiles_with_a_bound_that_looks_at_values() -> None:
    torch._dynamo.reset()
    layer, x = rescaled(made("grid of 8"), 0.3, bound=sh.bounds.absolute_sum), torch.randn(2, 4, 8, 8)
    result = torch.compile(layer, backend="eager")(x)
    assert torch.allclose(result, layer(x), atol=1e-6)


def test_exports() -> None:
    layer, x = rescaled(made("grid of 8"), 0.3).eval(), torch.randn(2, 4, 8, 8)
    assert torch.allclose(torch.export.export(layer, (x,)).module()(x), layer(x), atol=1e-6)


def test_meta_device_and_materializing() -> None:
    with torch.device("meta"):
        layer = rescaled(nn.Conv2d(4, 6, 3), 0.3)
    assert layer(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 6, 6, 6)
    layer.to_empty(device="cpu").load_state_dict(made("grid of 8").state_dict())
    assert torch.equal(layer.weight, rescaled(made("grid of 8"), 0.3).weight)


def test_autocast_does_not_reach_the_bound() -> None:
    layer = rescaled(made("wide", gain=30))
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.weight.detach()
    assert torch.equal(inside, layer.weight)


# -- making plain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_remove_bakes_a_plain_layer(name: str) -> None:
    plain = made(name, gain=30)
    kind, keys, parameter = type(plain), list(plain.state_dict()), plain.weight
    layer = rescaled(plain)
    weight = layer.weight.detach().clone()
    assert remove_spectral(layer) is layer
    assert type(layer) is kind
    assert sorted(layer.state_dict()) == sorted(keys)
    assert layer.weight is parameter
    assert torch.equal(layer.weight, weight)
    assert not layer._load_state_dict_pre_hooks
    pickle.dumps(layer)
    assert remove_spectral(layer) is layer
    made(name).load_state_dict(layer.state_dict())


def test_a_new_bound_replaces_the_old_one() -> None:
    layer = rescaled(rescaled(made("matrix", gain=30), max_norm=1.0), max_norm=0.5)
    assert len(layer.parametrizations.weight) == 1
    assert len(layer._load_state_dict_pre_hooks) == 1
    assert sampled_norm(layer) == pytest.approx(0.5, rel=1e-5)


def test_remove_replaces_modules_that_stand_for_a_layer() -> None:
    class Factored(nn.Module):
        def to_plain(self) -> nn.Module:
            return nn.Linear(2, 2)

    stranger = Factored()
    Factored.__module__, shared = "spectral_hooks.parametrizations.factored", Factored()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, rescaled(nn.Linear(2, 2)))})
    assert remove_spectral(model) is model
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"][0]
    assert type(model["b"][1]) is nn.Linear
    assert type(remove_spectral(Factored())) is nn.Linear
    Factored.__module__ = "elsewhere"
    assert remove_spectral(stranger) is stranger


def test_parametrizations_from_elsewhere_are_left_alone() -> None:
    layer = torchs.weight_norm(nn.Linear(3, 3))
    assert remove_spectral(layer) is layer
    assert parametrize.is_parametrized(layer)
    with pytest.raises(ValueError, match=r"Linear.*_WeightNorm.*remove_parametrizations"):
        rescaled(layer)
    model = nn.Sequential(rescaled(nn.Linear(3, 3)), torchs.weight_norm(rescaled(nn.Linear(3, 3))))
    with pytest.raises(ValueError, match=r"^1: .*_WeightNorm"):
        remove_spectral(model)
    assert parametrize.is_parametrized(model[0])


def test_report_shows_the_model_as_it_is() -> None:
    model = nn.Sequential(rescaled(nn.Linear(4, 4), 0.5), nn.LayerNorm(4), nn.Linear(4, 2), nn.ReLU())
    report = spectral_report(model)
    assert list(report) == ["0", "1", "2"]
    assert report["0"] == "Rescaled(max_norm=0.5)"
    assert "LayerNorm has no operator" in report["1"]
    assert report["2"] == "none: it is plain"


# -- mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, float("inf"), float("nan"), "1", None, True])
def test_bad_max_norm(bad) -> None:
    with pytest.raises(ValueError, match=r"`max_norm`.*got"):
        rescaled(nn.Linear(2, 2), max_norm=bad)


def test_bad_bound() -> None:
    with pytest.raises(TypeError, match=r"`bound`.*got 'cosine_grid'"):
        rescaled(nn.Linear(2, 2), bound="cosine_grid")


@pytest.mark.parametrize(
    ("layer", "error"), [(nn.BatchNorm2d(3), TypeError), (nn.LazyLinear(3), ValueError), (torch.ones(2, 2), TypeError)]
)
def test_layers_that_cannot_be_rescaled(layer, error) -> None:
    with pytest.raises(error):
        rescaled(layer)


def test_pruned_layer() -> None:
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(ValueError, match=r"prune\.remove"):
        rescaled(layer)
    prune.remove(layer, "weight")
    rescaled(layer)


def test_remove_needs_a_module() -> None:
    with pytest.raises(TypeError, match="`model`"):
        remove_spectral({"weight": 1})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [1e-30, 1e30])
def test_zero_stays_zero_whatever_the_bound(dtype, max_norm):
    layer = rescaled(torch.nn.Linear(4, 7, bias=False).to(dtype), max_norm)
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    for training in (True, False):
        layer.train(training)
        assert not layer.weight.any()
        layer.weight.sum().backward()
        assert torch.isfinite(layer.parametrizations.weight.original.grad).all()
