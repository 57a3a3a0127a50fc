"""parametrizations.rescaled on the host, where it is one node of the graph: the same as in tensor operations, and never stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import spectral_hooks as sh
from spectral_hooks.norms.quick import quick, quick_with_direction
from spectral_hooks.parametrizations import rescaled

#: A layer for each way: a solver's grids and matrices; proofs of many symbols in float32, and of matrices in either precision.
LAYERS = {
    "grid of 8": lambda: nn.Conv2d(4, 6, 3),
    "grid of 4": lambda: nn.Conv2d(48, 40, 3, bias=False),
    "strided": lambda: nn.Conv2d(20, 12, 3, stride=2, padding=1),
    "large kernel": lambda: nn.Conv2d(3, 8, 7, stride=2),
    "depthwise": lambda: nn.Conv2d(24, 24, 5, groups=24),
    "grouped": lambda: nn.Conv2d(16, 24, 3, groups=4),
    "symbols": lambda: nn.Conv2d(40, 33, 3, padding=1),
    "groups of symbols": lambda: nn.Conv1d(40, 60, 3, groups=2),
    "wide": lambda: nn.Conv2d(80, 96, 3),
    "wide, transposed": lambda: nn.ConvTranspose2d(96, 72, 3, stride=1),
    "wide groups": lambda: nn.Conv1d(150, 210, 3, groups=2),
    "volume": lambda: nn.Conv3d(5, 4, 3),
    "1×1": lambda: nn.Conv2d(12, 20, 1),
    "patches": lambda: nn.Conv2d(3, 70, 4, stride=4),
    "matrix": lambda: nn.Linear(13, 7),
    "wide matrix": lambda: nn.Linear(150, 90),
    "high matrix": lambda: nn.Linear(80, 130),
}


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def layer_of(name: str, dtype: torch.dtype, gain: float, max_norm: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    layer = rescaled(LAYERS[name]().to(dtype), max_norm)
    with torch.no_grad():
        original(layer).mul_(gain)
    return layer


def gradient(parametrization: nn.Module, weight: Tensor, direction: Tensor, *, slowly: bool) -> tuple[Tensor, Tensor]:
    """Value and gradient, by one node or by tensor operations."""
    weight = weight.detach().clone().requires_grad_()
    value = (parametrization._rescaled if slowly else parametrization)(weight)
    (result,) = torch.autograd.grad((value * direction).sum(), weight)
    return value.detach(), result


def dense_norm(layer: nn.Module) -> float:
    """From below, in float64 and independent of the library: symbols at random frequencies, or the matrix."""
    weight = layer.weight.detach().double()
    if weight.ndim == 2:
        return float(torch.linalg.matrix_norm(weight, 2))
    weight = weight.flatten(0, 1).unflatten(0, (layer.groups, -1, weight.shape[1]))
    positions = torch.cartesian_prod(*[torch.arange(k) for k in weight.shape[3:]]).reshape(-1, weight.ndim - 3).double()
    theta = torch.rand(300, weight.ndim - 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 * torch.pi
    waves = torch.exp(-1j * (theta @ positions.T))
    symbols = torch.einsum("ft,grct->fgrc", waves, weight.flatten(3).to(waves.dtype))
    return float(torch.linalg.svdvals(symbols)[..., 0].max())


# -- the same as in tensor operations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outward", [True, False])
@pytest.mark.parametrize("gain", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_tensor_operations(name: str, gain: float, outward: bool) -> None:
    for dtype in (torch.float64, torch.float32):
        layer = layer_of(name, dtype, gain)
        parametrization, weight = layer.parametrizations.weight[0], original(layer).detach()
        direction = torch.randn(weight.shape, dtype=dtype) + (-1 if outward else 1) * 3 * weight / weight.std()
        (value, slope), (same, reference) = (gradient(parametrization, weight, direction, slowly=slow) for slow in (False, True))
        assert torch.equal(value, same)
        assert float((slope - reference).norm()) <= 1e3 * torch.finfo(dtype).eps * float(reference.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_direction_is_that_of_the_gradient(name: str) -> None:
    layer = LAYERS[name]().double()
    op = sh.as_operator(layer)
    bound = quick(op)
    (expected,) = torch.autograd.grad(bound, layer.weight)
    value, direction = quick_with_direction(op)
    assert value == float(bound.detach())
    found = direction()
    torch.testing.assert_close(found * (expected.norm() / found.norm()), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["grid of 8", "strided", "grouped", "matrix", "1×1"])
def test_second_derivatives_are_those_of_the_tensor_operations(name: str) -> None:
    layer = layer_of(name, torch.float64, 1.0)
    parametrization, weight = layer.parametrizations.weight[0], original(layer).detach()
    directions = [torch.randn_like(weight) for _ in range(2)]
    found = []
    for make in (parametrization, parametrization._rescaled):
        w = weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad((make(w).square() * directions[0]).sum(), w, create_graph=True)
        found.append(torch.autograd.grad((slope * directions[1]).sum(), w)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["grid of 8", "symbols", "wide matrix"])
def test_a_graph_may_be_kept(name: str) -> None:
    layer = layer_of(name, torch.float32, 1.0)
    value = layer.weight.square().sum()
    value.backward(retain_graph=True)
    once = original(layer).grad.clone()
    value.backward()
    assert torch.equal(original(layer).grad, 2 * once)


# -- never stale -----------------------------------------------------------------------------------------------------------


def in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        original(layer).mul_(-40)


def through_data(layer: nn.Module) -> None:
    original(layer).data.mul_(100)


def other_data(layer: nn.Module) -> None:
    original(layer).data = 50 * torch.randn_like(original(layer))


def loaded(layer: nn.Module) -> None:
    layer.load_state_dict({key: 70 * value for key, value in layer.state_dict().items()})


def stepped(layer: nn.Module) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=10.0, foreach=True)
    layer.weight.sum().backward()
    optimizer.step()


def assigned(layer: nn.Module) -> None:
    layer.weight = torch.randn_like(original(layer)) * 20


@pytest.mark.parametrize("change", [in_place, through_data, other_data, loaded, stepped, assigned])
@pytest.mark.parametrize("name", ["grid of 8", "symbols", "wide", "wide matrix", "high matrix"])
def test_no_change_of_the_parameter_is_missed(name: str, change: Callable[[nn.Module], None]) -> None:
    """Forwards of every kind before and after, in turn."""
    layer = layer_of(name, torch.float32, 1.0)
    for _ in range(2):
        layer.train().weight.sum().backward()
        with torch.no_grad():
            assert dense_norm(layer) <= 0.3 * (1 + 1e-6)
        with torch.inference_mode():
            layer.eval().weight  # noqa: B018 (fills the memory)
        change(layer)
        with torch.no_grad():
            evaluated = dense_norm(layer)
        assert 0.03 < evaluated <= 0.3 * (1 + 1e-6)
        assert 0.03 < dense_norm(layer.train()) <= 0.3 * (1 + 1e-6)


def test_two_layers_with_one_parameter_both_obey() -> None:
    layers = [nn.Linear(70, 70), nn.Linear(70, 70)]
    layers[1].weight = layers[0].weight
    for layer, most in zip(layers, (1.0, 0.25), strict=True):
        rescaled(layer, most)
    for _ in range(3):
        with torch.no_grad():
            original(layers[0]).mul_(30)
        sum(layer.weight.square().sum() for layer in layers).backward()
        for layer, most in zip(layers, (1.0, 0.25), strict=True):
            assert 0.2 < dense_norm(layer) <= most * (1 + 1e-6)


@pytest.mark.parametrize("name", ["grid of 8", "symbols", "wide matrix"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: layer], ids=["deepcopy", "itself"])
def test_the_same_weight_gives_the_same_result_whatever_was_before(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = layer_of(name, torch.float32, 1.0)
    weight = original(layer).detach().clone()
    first = layer.weight.detach().clone()
    with torch.no_grad():
        for seed in range(3):
            original(layer).copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
            layer.weight  # noqa: B018
        twin = copied(layer)
        original(twin).copy_(weight)
    assert torch.equal(twin.weight, first)
    assert torch.equal(twin.eval().weight, first)
    parametrization = pickle.loads(pickle.dumps(layer.parametrizations.weight[0]))
    assert torch.equal(parametrization(weight), first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_recompute_the_same(reentrant: bool) -> None:
    x = torch.randn(4, 150, requires_grad=True)
    gradients = []
    for wrapped in (False, True):
        layer = layer_of("wide matrix", torch.float32, 30.0)
        layer.weight  # noqa: B018 (a parameter far outside has come back)
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrapped else layer(x)
        y.square().sum().backward()
        gradients.append(original(layer).grad)
    assert torch.equal(*gradients)


def test_one_forward_s_weight_serves_several_where_torch_is_asked() -> None:
    layer, x = layer_of("wide matrix", torch.float32, 1.0), torch.randn(4, 150)
    with parametrize.cached():
        (layer(x).sum() + layer(2 * x).sum()).backward()
    once = original(layer).grad.clone()
    layer.zero_grad()
    (layer(x).sum() + layer(2 * x).sum()).backward()
    torch.testing.assert_close(once, original(layer).grad)


def test_hooks_on_the_parameter_and_modes_that_watch_are_served() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    layer = layer_of("grid of 8", torch.float32, 1.0)
    seen: list[Tensor] = []
    original(layer).register_hook(lambda gradient: seen.append(gradient))
    layer.weight.sum().backward()
    with Watching():
        layer.weight.sum().backward()
    assert len(seen) == 2
    torch.testing.assert_close(*seen)
