"""Parametrized layers in evaluation, as other machinery of torch records and transforms them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import spectral_hooks as sh

P = sh.parametrizations

#: Every parametrization, on a convolution where it has one.
LAYERS = {
    "rescaled": lambda: P.rescaled(nn.Conv2d(4, 4, 3, padding=1), 0.5),
    "rescaled matrix": lambda: P.rescaled(nn.Linear(8, 6), 0.3),
    "clipped": lambda: P.clipped(nn.Conv2d(4, 4, 3, padding=1), 0.5),
    "clipped matrix": lambda: P.clipped(nn.Linear(8, 6), 0.3),
    "banded": lambda: P.banded(nn.Linear(8, 6), 0.5, min_norm=0.4),
    "orthogonal": lambda: P.orthogonal(nn.Conv2d(4, 4, 3, padding=1)),
    "skew": lambda: P.skew(nn.Conv2d(4, 4, 3, padding=1)),
    "cayley": lambda: P.cayley(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
    "conv_norm": lambda: P.conv_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "group_shuffle": lambda: P.group_shuffle(nn.Linear(8, 8), blocks=2),
    "tensor_train": lambda: P.tensor_train(nn.Conv2d(4, 4, 3, padding=1), 2),
}
#: Those whose traced graph computes the weight from the parameters; a kernel's clip decides by values, and is a constant.
FUNCTIONS = [name for name in LAYERS if name != "clipped"]


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LAYERS[name]().eval()


def inputs(layer: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = "Linear" in type(layer).__name__ or "GroupShuffle" in type(layer).__name__
    return torch.randn((3, 8) if matrix else (2, 4, 8, 8), generator=generator)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_traced_layers_agree_on_other_inputs(name: str, frozen: bool) -> None:
    layer = made(name).requires_grad_(not frozen)
    first, second = inputs(layer), inputs(layer, 1)
    with torch.no_grad():
        layer(first)  # fills what is remembered
    traced = torch.jit.trace(layer, first)
    for x in (first, second):
        torch.testing.assert_close(traced(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traced_layers_follow_their_parameters(name: str) -> None:
    layer, other = made(name), made(name, 1)
    x = inputs(layer)
    traced = torch.jit.trace(layer, x)
    layer.load_state_dict(other.state_dict())
    traced.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(traced(x), other(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_follows_a_loaded_state(name: str) -> None:
    layer, other = made(name), made(name, 1)
    x = inputs(layer)
    with torch.no_grad():
        layer(x)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x), other(x), atol=1e-6, rtol=1e-6)


needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)


def run_onnx(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@needs_onnx
@pytest.mark.parametrize("name", ["rescaled", "rescaled matrix", "clipped", "clipped matrix", "banded"])
def test_exports_to_onnx_with_the_weight_as_it_is(name: str, tmp_path: Path) -> None:
    layer = made(name)
    torch.onnx.export(layer, (inputs(layer),), str(tmp_path / "model.onnx"), dynamo=False)
    x = inputs(layer, 1)
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", x), layer(x).detach(), atol=1e-5, rtol=1e-4)


@needs_onnx
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", ["rescaled", "clipped", "banded", "orthogonal", "tensor_train"])
def test_plain_copies_export_to_onnx(name: str, dynamo: bool, tmp_path: Path) -> None:
    layer = made(name)
    plain = sh.remove_spectral(copy.deepcopy(layer))
    torch.onnx.export(plain, (inputs(layer),), str(tmp_path / "model.onnx"), dynamo=dynamo)
    x = inputs(layer, 1)
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", x), layer(x).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["rescaled", "rescaled matrix", "clipped matrix", "banded", "skew"])
def test_torch_export_is_a_function_of_the_parameters(name: str) -> None:
    layer, other = made(name), made(name, 1)
    program = torch.export.export(layer, (inputs(layer),)).module()
    program.load_state_dict(other.state_dict())
    x = inputs(layer, 1)
    torch.testing.assert_close(program(x), other(x), atol=1e-5, rtol=1e-5)


ENSEMBLES = ["rescaled", "rescaled matrix", "clipped matrix", "banded"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_ensembles_by_vmap(name: str, training: bool) -> None:
    """Values and gradients as those of the members one by one, wherever the parameters are; which stay as they are."""
    members = [nn.Sequential(made(name, seed)).double().train(training) for seed in range(3)]
    with torch.no_grad():
        for gain, member in zip((1e-4, 1.0, 10.0), members, strict=True):
            member[0].parametrizations.weight.original.mul_(gain)
    x = inputs(members[0][0]).double()
    params, buffers = stack_module_state(members)
    before = {key: value.detach().clone() for key, value in params.items()}
    base = copy.deepcopy(members[0])

    def loss(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(base, (p, b), (x,)).square().sum()

    values = vmap(loss)(params, buffers)
    gradients = vmap(torch.func.grad(loss))(params, buffers)
    assert all(torch.equal(params[key], before[key]) for key in params)
    key = "0.parametrizations.weight.original"
    for i, member in enumerate(members):
        value = member.eval()(x).square().sum()
        torch.testing.assert_close(values[i], value, atol=1e-5, rtol=1e-5)
        (expected,) = torch.autograd.grad(value, member[0].parametrizations.weight.original)
        torch.testing.assert_close(gradients[key][i], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["clipped matrix", "banded", "rescaled"])
def test_jacobian_is_that_of_backward(name: str) -> None:
    layer = made(name).double()
    parametrization = layer.parametrizations.weight[0]
    weight = 3 * layer.parametrizations.weight.original.detach()
    jacobian = torch.func.jacrev(parametrization)(weight).flatten(weight.ndim).flatten(0, weight.ndim - 1)
    tracked = weight.clone().requires_grad_()
    value = parametrization(tracked)
    rows = [torch.autograd.grad(value, tracked, unit.reshape(value.shape), retain_graph=True)[0].flatten()
            for unit in torch.eye(value.numel(), dtype=value.dtype)[::7]]  # fmt: skip
    torch.testing.assert_close(jacobian[::7], torch.stack(rows))


def test_kernels_whose_clip_looks_at_values_refuse_vmap() -> None:
    layer = made("clipped")
    weights = torch.randn(2, 4, 4, 3, 3)
    with pytest.raises(NotImplementedError, match=r"vmap.*rescaled"):
        vmap(layer.parametrizations.weight[0])(weights)
    gradient = torch.func.grad(lambda w: layer.parametrizations.weight[0](w).square().sum())(weights[0])
    assert bool(gradient.isfinite().all())
