"""Everything on an accelerator: it obeys there, by references in float64 on the CPU, and gives what the CPU gives.

The CPU takes the accelerator's part too, so that the laws themselves are tried where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import observers
import pytest
import torch
from cases import BOUNDS, GEOMETRIES, PARAMETRIZATIONS, PROJECTIONS, conv_layer
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.norms import at_most, singular_values, spectral_norm

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLACES = [("cpu", torch.float32), *(pytest.param("cuda", dtype, marks=NEEDS_CUDA) for dtype in DTYPES)]
SOME_GEOMETRIES = sorted(GEOMETRIES)[::3]
BOUND = 0.8


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    model[2].weight = model[0].weight
    return model


#: One model for each way that weights go through a step.
MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "matrices": lambda: nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 96)),
    "pointwise": lambda: nn.Sequential(nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 1, groups=4)),
    "small": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
    "wide": lambda: nn.Sequential(nn.Conv2d(24, 20, 3)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 5, groups=8)),
    "strided": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.ConvTranspose2d(6, 4, 4, stride=2), nn.Conv2d(4, 4, 3)),
    "tied": tied,
}


def made(name: str, dtype: torch.dtype, device: str, scale: float = 3.0) -> nn.Sequential:
    """Weights, by default all outside; the same on every device."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model.to(device, dtype)


def trained(name: str, dtype: torch.dtype, device: str, **settings) -> nn.Sequential:
    """Three steps with the same gradients on every device, the hook attached; inside after each."""
    capped = settings.get("projection") == "soft_cap"
    model = made(name, dtype, device, 1.0 if capped else 3.0)  # a soft cap takes no weight from far outside
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    with sh.SpectralClip(BOUND, **settings).attach(model, optimizer):
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            optimizer.step()
            if not capped:
                assert_inside(model)
    assert all(p.device.type == device and p.dtype == dtype for p in model.parameters())
    return model


def assert_inside(model: nn.Module) -> None:
    layers = [layer for layer in model.modules() if hasattr(layer, "weight")]
    norms = [observers.lattice_norm(copy.deepcopy(layer).to("cpu")) for layer in layers]
    assert max(norms) <= BOUND * (1 + 1e-6)
    assert max(norms) > 0.5 * BOUND, "and no further than need be"


def close(device: Tensor, cpu: Tensor, atol: float) -> None:
    torch.testing.assert_close(device.detach().cpu().double(), cpu.detach().double(), rtol=0, atol=atol)


# -- the hook -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_hook_keeps_weights_inside(name: str, dtype: torch.dtype, device: str) -> None:
    trained(name, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_the_hook_gives_what_it_gives_on_the_cpu(name: str, device: str) -> None:
    """Matrices to rounding; what kernels are certified at may differ by what certificates leave open."""
    atol = 1e-4 if name in ("matrices", "pointwise", "tied") else 1e-2
    for ours, theirs in zip(
        trained(name, torch.float32, device, slack=0), trained(name, torch.float32, "cpu", slack=0), strict=True
    ):
        if hasattr(ours, "weight"):
            close(ours.weight, theirs.weight, atol)


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("name", ["matrices", "tied"])
def test_soft_caps(name: str, dtype: torch.dtype, device: str) -> None:
    eps = torch.finfo(dtype).eps
    models = [trained(name, dtype, place, projection="soft_cap") for place in (device, "cpu")]
    for ours, theirs in zip(*models, strict=True):
        if hasattr(ours, "weight"):
            close(ours.weight, theirs.weight, max(1e-4, 8 * eps))


@pytest.mark.parametrize("device", DEVICES)
def test_gains_of_batch_normalization(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).to(device)
    with torch.no_grad():
        model[1].weight.mul_(5)
    hook = sh.SpectralClip(BOUND, batch_norm="clip")
    with hook.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        gains = model[1].weight.detach().double() / (model[1].running_var.double() + model[1].eps).sqrt()
        assert float(gains.abs().max()) <= BOUND * (1 + 1e-6)
        state = hook.state_dict()
    assert all(known[0].device.type == device for known in state["known"].values())
    report = hook.report()
    assert "outside" not in report


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_that_is_no_number_is_named(device: str) -> None:
    model = made("matrices", torch.float32, device)
    with sh.SpectralClip(BOUND).attach(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1)):
        with torch.no_grad():
            model[1].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="layer 1, after step 1"):
            optimizer.step()


# -- norms, proofs, projections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "dtype"), PLACES[:3], ids=str)
@pytest.mark.parametrize("name", SOME_GEOMETRIES)
def test_norms_bounds_and_proofs(name: str, dtype: torch.dtype, device: str) -> None:
    layer = conv_layer(name, dtype)
    op, cpu = sh.as_operator(copy.deepcopy(layer).to(device)), sh.as_operator(layer)
    norm = observers.lattice_norm(layer)
    found = spectral_norm(op)
    assert found.device.type == device
    assert norm * (1 - 1e-9) <= float(found) <= norm * 1.01
    for bound in BOUNDS.values():
        ours, theirs = bound(op), bound(cpu)
        assert ours.device.type == device
        assert float(ours) >= norm * (1 - 1e-9)
        assert float(ours) == pytest.approx(float(theirs), rel=1e-3 if dtype == torch.float32 else 2e-2)
    assert bool(at_most(op, norm * 1.02).all())
    assert not bool(at_most(op, norm * 0.99).all())


@pytest.mark.parametrize("device", DEVICES)
def test_singular_values(device: str) -> None:
    torch.manual_seed(0)
    for layer, size in ((nn.Linear(12, 8), None), (nn.Conv2d(3, 4, 3, padding=1), (6, 5))):
        shape = {} if size is None else {"input_size": size}
        found = singular_values(sh.as_operator(copy.deepcopy(layer).to(device), **shape))
        expected = observers.singular_values(layer.weight) if size is None else observers.finite_singular_values(layer, size)
        assert found.device.type == device
        close(found, torch.from_numpy(expected.copy())[: len(found)], 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("model", ["matrices", "small", "depthwise", "wide"])
def test_projections(name: str, model: str, device: str) -> None:
    ours, theirs = (next(iter(made(model, torch.float32, place))) for place in (device, "cpu"))
    weights = [PROJECTIONS[name](sh.as_operator(layer), BOUND) for layer in (ours, theirs)]
    assert weights[0].device.type == device
    close(weights[0], weights[1], 1e-4 if model == "matrices" else 1e-2)


# -- parametrizations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrizations_forward_and_backward(name: str, device: str) -> None:
    case = PARAMETRIZATIONS[name]
    torch.manual_seed(0)
    cpu = case.make(case.layer())
    ours = copy.deepcopy(cpu).to(device)
    x = torch.randn(3, *case.shape)
    outputs = []
    for layer in (ours, cpu):
        given = x.to(next(layer.parameters()).device).requires_grad_()
        y = layer(given)
        y.square().mean().backward()
        outputs.append((y, given.grad, *(p.grad for p in layer.parameters() if p.grad is not None)))
    assert outputs[0][0].device.type == device
    for there, here in zip(*outputs, strict=True):
        close(there, here, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrizations_made_on_the_device(name: str, device: str) -> None:
    """And they obey there, also after a step."""
    case = PARAMETRIZATIONS[name]
    torch.manual_seed(0)
    layer = case.make(case.layer().to(device))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        x = torch.randn(3, *case.shape, device=device)
        y = layer(x)
        bias = layer(torch.zeros_like(x))
        ratio = (y - bias).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
        assert float(ratio.max()) <= case.max_norm * (1 + 1e-4)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
