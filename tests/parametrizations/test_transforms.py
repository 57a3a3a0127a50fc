"""Transforms of `torch.func` of what a model makes of its inputs, its parameters left alone: per sample, Jacobians, tangents."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from spectral_hooks import parametrizations

LAYERS = {
    "banded": parametrizations.banded,
    "cayley": parametrizations.cayley,
    "clipped": parametrizations.clipped,
    "conv_norm": parametrizations.conv_norm,
    "group_shuffle": partial(parametrizations.group_shuffle, blocks=2),
    "orthogonal": parametrizations.orthogonal,
    "rescaled": parametrizations.rescaled,
    "skew": parametrizations.skew,
    "tensor_train": partial(parametrizations.tensor_train, rank=2),
}


def test_every_parametrization_is_there() -> None:
    assert set(LAYERS) == set(parametrizations.__all__) - {"remove_spectral", "spectral_report"}


@pytest.mark.parametrize("gain", [1.0, 5.0], ids=["as made", "far outside"])
@pytest.mark.parametrize("trains", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_the_inputs(name: str, frozen: bool, trains: bool, gain: float) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4, 4) if name == "banded" else nn.Conv2d(4, 4, 3, padding=1)
    layer = LAYERS[name](plain.double()).train(trains).requires_grad_(not frozen)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(gain)
    x = torch.randn(3, 4, *() if name == "banded" else (5, 5), dtype=torch.float64)
    alone = copy.deepcopy(layer)
    expected, slope = alone(x), torch.autograd.functional.jacobian(lambda z: alone(z[None])[0], x[0])

    def one(z: Tensor) -> Tensor:
        return layer(z[None])[0]

    # a Jacobian first: what is made within it must not be remembered
    torch.testing.assert_close(torch.func.jacrev(one)(x[0]), slope)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(torch.func.vmap(one)(x), expected)
    value, tangent = torch.func.jvp(one, (x[0],), (x[1],))
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(tangent, torch.tensordot(slope, x[1], dims=x[1].ndim))
    if not frozen:
        layer(x).square().sum().backward()
        alone(x).square().sum().backward()
        for ours, theirs in zip(layer.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.filterwarnings("error")
def test_ensembles_of_rescaled_models() -> None:
    """Models stacked and batched give what each gives, with its gradients, and torch has nothing to warn of."""

    def made() -> nn.Module:
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 70, 2)]
        return nn.Sequential(*map(parametrizations.rescaled, layers)).double()

    torch.manual_seed(0)
    models, x = [made() for _ in range(3)], torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for i, model in enumerate(models):
            for parameter in model.parameters():
                parameter.mul_(0.5 + i / 2)
    parameters, buffers = torch.func.stack_module_state(models)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    found = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]))
    found.square().sum().backward()
    for i, model in enumerate(models):
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name].grad[i], parameter.grad)
