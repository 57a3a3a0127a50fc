"""What rescaled, clipped and banded have in common: a way inside, at every scale, in every precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from math import inf

import pytest
import torch
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.parametrizations import banded, clipped, rescaled

BOUNDING = {
    "rescaled": rescaled,
    "rescaled by cosine_grid": partial(rescaled, bound=sh.bounds.cosine_grid),
    "clipped": clipped,
    "banded": partial(banded, min_norm=0.0),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Linear(6, 6, bias=False),
    "conv": lambda: nn.Conv2d(3, 3, 3, padding=1, bias=False),
}
WAYS = [(function, layer) for function in BOUNDING for layer in LAYERS if (function, layer) != ("banded", "conv")]
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=1.0),
    "momentum": partial(torch.optim.SGD, lr=0.2, momentum=0.8),
    "Adam": partial(torch.optim.Adam, lr=0.03),
}


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def identity(layer: nn.Module, gain: float) -> Tensor:
    """The weight of a multiple of the identity."""
    weight = torch.zeros_like(layer.weight)
    index = torch.arange(len(weight))
    weight[(index, index, *([1] * (weight.ndim - 2)))] = gain
    return weight


def outside(layer: str, gain: float = 3.0) -> nn.Module:
    torch.manual_seed(0)
    made = LAYERS[layer]()
    with torch.no_grad():
        made.weight.copy_(identity(made, gain) + 0.03 * torch.randn_like(made.weight))
    return made


def data(layer: str) -> Tensor:
    return torch.randn(32, 6) if layer == "dense" else torch.randn(4, 3, 5, 5)


def train(
    layer: nn.Module, optimizer: torch.optim.Optimizer, kind: str, steps: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    for _ in range(steps):
        x = data(kind)
        optimizer.zero_grad()
        loss(layer(x), x).backward()
        optimizer.step()


def to_half(y: Tensor, x: Tensor) -> Tensor:
    """Best at half the identity, which is inside."""
    return (y - x / 2).square().mean()


# -- the way inside -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "layer"), WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimum_inside_is_reached_from_outside(function: str, layer: str, optimizer: str) -> None:
    made = BOUNDING[function](outside(layer))
    train(made, OPTIMIZERS[optimizer](made.parameters()), layer, 80, to_half)
    assert float(to_half(made(x := data(layer)), x).detach()) < 1e-3


@pytest.mark.parametrize(("function", "layer"), WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_reached_after_training_has_pushed_the_parameter_far_outside(function: str, layer: str, optimizer: str) -> None:
    made = BOUNDING[function](outside(layer))
    train(made, torch.optim.SGD(made.parameters(), lr=1e3), layer, 3, lambda y, x: -10 * (y * x).mean())
    assert float(torch.linalg.vector_norm(original(made).detach())) > 100
    train(made, OPTIMIZERS[optimizer](made.parameters()), layer, 80, to_half)
    assert float(to_half(made(x := data(layer)), x).detach()) < 1e-3


@pytest.mark.parametrize(("function", "layer"), WAYS)
def test_without_a_parameter_that_follows_gradients_lead_inside_too(function: str, layer: str) -> None:
    """As in a compiled graph, and in evaluation, where a forward changes nothing."""
    made = BOUNDING[function](outside(layer)).eval()
    with torch.no_grad():
        original(made).mul_(3)
    before = original(made).detach().clone()
    made(data(layer))
    assert torch.equal(original(made), before)
    if function != "clipped" or layer == "dense":
        train(made, torch.optim.SGD(made.parameters(), lr=1.0), layer, 500, to_half)
        assert float(to_half(made(x := data(layer)), x).detach()) < 1e-3


@pytest.mark.parametrize("function", ["rescaled", "clipped", "banded"])
def test_an_optimum_on_the_sphere_is_that_of_the_hook(function: str) -> None:
    """Where only some singular values of the target are outside, the best map inside is its clip, for all of them."""
    torch.manual_seed(0)
    target = torch.diag(torch.tensor([3.0, 2.0, 0.9, 0.5, 0.3, 0.1]))

    def loss(y: Tensor, x: Tensor) -> Tensor:
        return (y - x @ target).square().mean()

    hooked = outside("dense", 2.0)
    optimizer = torch.optim.SGD(hooked.parameters(), lr=0.5)
    sh.SpectralClip(1.0, slack=0).attach(hooked, optimizer)
    train(hooked, optimizer, "dense", 100, loss)
    made = BOUNDING[function](outside("dense", 2.0))
    # two singular values meet at the bound, where the norm has a kink
    rate, steps = (0.05, 1500) if function == "rescaled" else (0.5, 100)
    train(made, torch.optim.SGD(made.parameters(), lr=rate), "dense", steps, loss)
    x = torch.randn(4096, 6)
    best = float(loss(x @ target.clamp(max=1), x))
    assert float(loss(hooked(x), x).detach()) < best * 1.01
    assert float(loss(made(x), x).detach()) < best * 1.01


def test_banded_leaves_the_lower_end_too() -> None:
    made = banded(nn.Linear(6, 6, bias=False), min_norm=0.2)
    with torch.no_grad():
        original(made).copy_(1e-3 * torch.eye(6))
    train(made, torch.optim.SGD(made.parameters(), lr=1.0), "dense", 80, to_half)
    assert float(to_half(made(x := data("dense")), x).detach()) < 1e-3
    made.eval()
    with torch.no_grad():
        original(made).copy_(0.1 * torch.eye(6))
    train(made, torch.optim.SGD(made.parameters(), lr=1.0), "dense", 80, to_half)
    assert float(to_half(made(x := data("dense")), x).detach()) < 1e-3


@pytest.mark.parametrize(("function", "layer"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_registering_starts_the_parameter_inside(function: str, layer: str, dtype: torch.dtype) -> None:
    plain = outside(layer).to(dtype)
    parameter = plain.weight
    made = BOUNDING[function](plain)
    assert original(made) is parameter
    # at once, and not with the first forward
    assert float(torch.linalg.vector_norm(parameter.detach().float())) <= 3
    torch.testing.assert_close(made.weight, parameter, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    frozen = outside(layer).requires_grad_(False)
    before = frozen.weight.clone()
    assert torch.equal(original(BOUNDING[function](frozen)), before)


@pytest.mark.parametrize(("function", "layer"), WAYS)
def test_a_second_forward_leaves_the_first_one_s_gradient(function: str, layer: str) -> None:
    made = BOUNDING[function](outside(layer))
    with torch.no_grad():
        original(made).mul_(5)
    twin = copy.deepcopy(made)
    x = data(layer)
    to_half(twin(x), x).backward()
    first = to_half(made(x), x)
    second = to_half(made(x), x)
    first.backward()
    torch.testing.assert_close(original(made).grad, original(twin).grad)
    second.backward()
    torch.testing.assert_close(original(made).grad, 2 * original(twin).grad, rtol=1e-3, atol=1e-4)


# -- every scale ---------------------------------------------------------------------------------------------------------------

SHAPES: dict[str, Callable[[], nn.Module]] = {
    "matrix": lambda: nn.Linear(7, 5, bias=False),
    "wide matrix": lambda: nn.Linear(80, 70, bias=False),
    "conv": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "strided": lambda: nn.Conv2d(4, 6, (4, 2), stride=2, dilation=3, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 2, stride=3, groups=2, bias=False),
    "1-D": lambda: nn.Conv1d(3, 4, 5, bias=False),
    "circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 4, stride=2, bias=False),
}
FILLS = {
    "random": lambda w: torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "constant": lambda w: torch.ones(w.shape, dtype=torch.float64),
    "alternating": lambda w: torch.arange(w.numel(), dtype=torch.float64).remainder(2).mul(2).sub(1).reshape(w.shape),
    "single": lambda w: torch.arange(w.numel(), dtype=torch.float64).eq(1).double().reshape(w.shape),
    "mixed": lambda w: torch.logspace(-20, 0, w.numel(), dtype=torch.float64).reshape(w.shape),
}


def sampled_norm(layer: nn.Module, unit: float) -> float:
    """Of the stored values, in units of `unit`: in float64, at 16 frequencies per axis."""
    op = sh.as_operator(layer)
    kernel = op.with_weight(op.weight.detach().double() / unit).canonical()
    axes = tuple(range(3, kernel.ndim))
    symbols = torch.fft.fftn(kernel, s=(16,) * len(axes), dim=axes).movedim((1, 2), (-2, -1)) if axes else kernel
    return float(torch.linalg.matrix_norm(symbols, 2).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", ["rescaled", "clipped", "banded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_and_finite_gradients_at_every_scale(shape: str, function: str, dtype: torch.dtype) -> None:
    if function == "banded" and "matrix" not in shape:
        return  # kernels are refused
    powers = (-320, -40, -30, 0, 4, 18, 38, 308)
    bounds = (1.0, 1e-12) if shape in ("matrix", "conv") and dtype != torch.float16 else (1.0,)
    for bound in bounds:
        layer = SHAPES[shape]().to(dtype)
        made = banded(layer, bound, min_norm=0.0) if function == "banded" else BOUNDING[function](layer, bound)
        for name, fill in FILLS.items():
            for gain in [0.0, *(10.0**p for p in powers)]:
                weight = (fill(original(made)) * gain).to(dtype)
                if not bool(weight.isfinite().all()) or (
                    dtype != torch.float16 and name != "random" and abs(gain) not in (0, 1e18)
                ):
                    continue
                for training in (False, True):
                    made.train(training)
                    with torch.no_grad():
                        original(made).copy_(weight)
                    original(made).grad = None
                    made.weight.sum().backward()
                    where = f"{name} · {gain:g}, bound {bound:g}, training={training}"
                    assert bool(original(made).grad.isfinite().all()), where
                    assert sampled_norm(made, bound) <= 1 + 2e-6, where


@pytest.mark.parametrize("gain", [1e-38, 1e-20, 1e20, 1e38])
def test_scaling_weight_and_bound_alike_changes_nothing(gain: float) -> None:
    for function in (rescaled, clipped):
        made, reference = function(outside("conv", 1.0), gain), function(outside("conv", 1.0), 1.0)
        with torch.no_grad():
            original(reference).copy_(2 * outside("conv").weight)
            original(made).copy_(original(reference).double() * gain / 8)
            original(reference).div_(8)
        torch.testing.assert_close(made.weight.double() / gain, reference.weight.double(), rtol=1e-4, atol=1e-5)


# -- automatic mixed precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", ["rescaled", "clipped", "banded"])
def test_autocast_changes_neither_weight_nor_its_gradient(function: str, shape: str, dtype: torch.dtype) -> None:
    """Forward within; a backward within too, against torch's advice, is autocast by torch itself where it is torch's."""
    if function == "banded" and "matrix" not in shape:
        return  # kernels are refused
    torch.manual_seed(0)
    made = BOUNDING[function](SHAPES[shape]())
    direction = torch.randn_like(original(made))
    gradients = []
    for training in (True, False):
        made.train(training)
        with torch.no_grad():
            original(made).copy_(3 * direction.flip(0))
        start = original(made).detach().clone()
        expected = made.weight
        (gradient,) = torch.autograd.grad((expected * direction).sum(), original(made))
        for inside in (False, True):
            with torch.no_grad():
                original(made).copy_(start)
            with torch.autocast("cpu", dtype):
                weight = made.weight
                found = torch.autograd.grad((weight * direction).sum(), original(made)) if inside else None
            (found,) = found or torch.autograd.grad((weight * direction).sum(), original(made))
            assert torch.equal(weight, expected)
            if inside:
                lengths = torch.linalg.vector_norm(found) * torch.linalg.vector_norm(gradient)
                assert float((found * gradient).sum() / lengths) > 0.98
            else:
                torch.testing.assert_close(found, gradient)
            gradients.append(found)
    assert all(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("function", [rescaled, clipped, sh.parametrizations.orthogonal])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_networks_train_under_autocast(function, dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(128, 3)]
    model = nn.Sequential(*(layer if isinstance(layer, nn.ReLU | nn.Flatten) else function(layer) for layer in layers))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    x, labels = torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last), torch.arange(8) % 3
    losses = []
    for _ in range(4 if compiled else 12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(call(x).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(sampled_norm(layer, 1.0) <= 1 + 2e-6 for layer in model if hasattr(layer, "parametrizations")) or (
        function is sh.parametrizations.orthogonal
    )


# -- what is no bound ----------------------------------------------------------------------------------------------------------

NO_BOUNDS = {
    "padding": sh.padding_factor,
    "absolute sum of columns": partial(sh.bounds.absolute_sum, order=1),
    "absolute sum of rows": lambda op: sh.bounds.absolute_sum(op, order=inf),
    "estimate of one entry": lambda op: op.weight.abs().amax().double(),
    "constant": lambda op: torch.ones(()),
}


@pytest.mark.parametrize("name", NO_BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_refuses_what_is_no_bound_of_the_spectral_norm(name: str, shape: str) -> None:
    layer = SHAPES[shape]()
    weight = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"`bound` must never fall below the spectral norm"):
        rescaled(layer, bound=NO_BOUNDS[name])
    assert not hasattr(layer, "parametrizations")
    assert torch.equal(layer.weight, weight)
