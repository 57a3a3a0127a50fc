"""parametrizations.orthogonal with a gain: all singular values are `max_norm`, in whatever way the layer is used."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import observers
import pytest
import torch
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.parametrizations import orthogonal, remove_spectral, spectral_report
from spectral_hooks.parametrizations.stiefel import MAPS
from spectral_hooks.weights.initializers import orthogonal_

LAYERS = {
    "tall": lambda: nn.Linear(3, 5),
    "wide": lambda: nn.Linear(5, 3),
    "square": lambda: nn.Linear(4, 4),
    "kernel": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "more outputs": lambda: nn.Conv2d(3, 7, 3, padding=1),
    "stem": lambda: nn.Conv2d(2, 12, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv1d(6, 4, 4, groups=2, dilation=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1),
}
GAINS = [1e-20, 0.7, 3, 1e20]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().to(dtype)


@torch.no_grad()
def shaken(layer: nn.Module, seed: int = 1, size: float = 0.7) -> nn.Module:
    """Other parameters, far from the start."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.add_(size * seeded(*parameter.shape, seed=seed + i).to(parameter))
    return layer


def inputs(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Linear):
        return seeded(2, layer.in_features)
    return seeded(2, layer.in_channels, *[8] * len(layer.kernel_size))


def singular_values(layer: nn.Module, name: str) -> np.ndarray:
    """By numpy, in float64, of the stored weight: of the matrix, or at frequencies that no grid of the library has."""
    if isinstance(layer, nn.Linear):
        return observers.singular_values(layer.weight)
    same = plain(name, layer.weight.dtype)
    same.weight.data = layer.weight.detach()
    kernels, exponent = observers.by_groups(same)
    frequencies = np.random.default_rng(0).uniform(0, 2 * np.pi, size=(7, len(layer.kernel_size)))
    found = []
    for kernel in kernels:
        matrices = observers.alias_matrices(np.ldexp(kernel, exponent), frequencies, same.stride, same.dilation)
        found.append(np.linalg.svd(matrices, compute_uv=False))
    return np.concatenate([values.ravel() for values in found])


def off(layer: nn.Module, name: str, gain: float) -> float:
    return float(np.abs(singular_values(layer, name) / float(gain) - 1).max())


# -- the law ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("name", LAYERS)
def test_all_singular_values_are_max_norm_at_every_scale(name: str, map: str) -> None:
    for gain in GAINS:
        layer = orthogonal(plain(name), gain, orthogonal_map=map)
        assert off(layer, name, gain) <= 1e-5
        assert off(shaken(layer), name, gain) <= 1e-5
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1e20)
        assert off(layer, name, gain) <= 1e-5


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gain", [1e-250, 1e250])
def test_in_float64(name: str, gain: float) -> None:
    layer = orthogonal(plain(name, torch.float64), gain)
    assert off(shaken(layer), name, gain) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wide", "kernel", "stem"])
def test_in_half_precision_the_gain_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    layer = shaken(orthogonal(plain(name, dtype), 3.3))
    twin = copy.deepcopy(layer).float()
    assert torch.equal(layer.weight, twin.weight.to(dtype))
    assert off(layer, name, 3.3) <= 0.01


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_is_that_of_gain_one_times_the_gain(name: str, map: str) -> None:
    one, scaled = (orthogonal(plain(name, torch.float64), gain, orthogonal_map=map) for gain in (1.0, 8.0))
    scaled.load_state_dict(shaken(one).state_dict())
    assert torch.equal(scaled.weight, 8 * one.weight)
    for layer in (one, scaled):
        (layer.weight * seeded(*layer.weight.shape, seed=3, dtype=torch.float64)).sum().backward()
    for a, b in zip(one.parameters(), scaled.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, 8 * a.grad)


def test_zero_padding_stays_below() -> None:
    layer = shaken(orthogonal(plain("kernel"), 2.5))
    found = torch.linalg.svdvals(sh.as_operator(layer, input_size=5).to_dense().detach().double())
    assert float(found[0]) <= 2.5 * (1 + 1e-6)
    assert float(found[-1]) < 2.4


def test_gradients() -> None:
    for name in ("wide", "stem"):
        layer = shaken(orthogonal(plain(name, torch.float64), 0.3))
        free = [p.detach().clone().requires_grad_() for n, p in layer.named_parameters() if "original" in n]
        assert torch.autograd.gradcheck(layer.parametrizations.weight[0], free, fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gain", [1e-3, 4.0])
def test_training_keeps_it(name: str, gain: float) -> None:
    layer = orthogonal(plain(name), gain)
    x = inputs(layer)
    target = gain * seeded(*layer(x).shape, seed=4)
    before, losses = layer.weight.detach().clone(), []
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        loss = ((layer(x) - target) / gain).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert off(layer, name, gain) <= 1e-5
    assert losses[-1] < losses[0]
    assert float((layer.weight - before).detach().norm()) > 0.01 * float(before.norm())


# -- a layer like any other ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gain", [1e-20, 2.5, 1e20])
def test_assigning_keeps_what_has_the_gain(name: str, map: str, gain: float) -> None:
    weight = shaken(orthogonal(plain(name), gain, orthogonal_map="qr")).weight.detach().clone()
    layer = orthogonal(plain(name), gain, orthogonal_map=map)
    layer.weight = weight
    torch.testing.assert_close(layer.weight / gain, weight / gain, rtol=0, atol=2e-5)
    assert layer.parametrizations.weight[0].distance <= 1e-5


@pytest.mark.parametrize("name", ["tall", "wide", "square"])
@pytest.mark.parametrize("gain", [1e-20, 2.5, 1e20])
@pytest.mark.parametrize("size", [1e-10, 1.0, 1e10])
def test_assigning_gives_the_nearest_of_the_gain(name: str, gain: float, size: float) -> None:
    layer = orthogonal(plain(name), gain)
    weight = size * seeded(*layer.weight.shape)
    layer.weight = weight
    u, _, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    nearest = gain * (u @ vh)
    np.testing.assert_allclose(layer.weight.detach().numpy() / gain, u @ vh, atol=1e-5)
    distance = np.linalg.norm(nearest - weight.double().numpy()) / np.linalg.norm(weight.double().numpy())
    assert layer.parametrizations.weight[0].distance == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize("name", ["kernel", "more outputs", "stem", "groups", "transposed"])
def test_assigning_a_kernel_is_scaling_of_assigning_its_multiple(name: str) -> None:
    """The nearest kernel of gain `c` to `c V` is `c` times that of gain 1 to `V`."""
    one, scaled = orthogonal(plain(name), 1.0), orthogonal(plain(name), 16.0)
    weight = seeded(*one.weight.shape)
    one.weight, scaled.weight = weight, 16 * weight
    assert torch.equal(scaled.weight, 16 * one.weight)
    assert scaled.parametrizations.weight[0].distance == pytest.approx(one.parametrizations.weight[0].distance)


@pytest.mark.parametrize("gain", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_kernels_of_any_length_are_taken(gain: float, size: float) -> None:
    layer = orthogonal(plain("kernel"), gain)
    layer.weight = size * seeded(*layer.weight.shape)
    assert off(layer, "kernel", gain) <= 1e-5


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("name", ["wide", "kernel", "stem"])
def test_checkpoints_copies_and_plain_layers(name: str, map: str) -> None:
    layer = shaken(orthogonal(plain(name), 2.5, orthogonal_map=map))
    x = inputs(layer)
    expected = layer(x).detach()
    other = orthogonal(plain(name), 2.5, orthogonal_map=map)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), expected)
    parametrization = layer.parametrizations.weight[0]
    assert pickle.loads(pickle.dumps(parametrization)).max_norm == 2.5
    made = remove_spectral(copied)
    assert type(made) is type(plain(name))
    assert torch.equal(made(x), expected)
    fresh = orthogonal(plain(name), 2.5, orthogonal_map=map)
    fresh.load_state_dict(made.state_dict())
    torch.testing.assert_close(fresh.weight, layer.weight, rtol=0, atol=3e-5)
    assert off(fresh, name, 2.5) <= 1e-5


def test_a_second_call_gives_a_new_gain() -> None:
    for name in ("wide", "kernel"):
        layer = shaken(orthogonal(plain(name), 2.0))
        direction = layer.weight.detach() / 2
        orthogonal(layer, 0.5, orthogonal_map="exp")
        assert len(layer.parametrizations.weight) == 1
        torch.testing.assert_close(layer.weight, direction / 2, rtol=0, atol=1e-5)


def test_a_random_orthogonal_start_of_the_gain_is_kept() -> None:
    layer = orthogonal(orthogonal_(plain("stem"), 3.0, generator=torch.Generator().manual_seed(0)), 3.0)
    reference = orthogonal_(plain("stem"), 3.0, generator=torch.Generator().manual_seed(0)).weight
    torch.testing.assert_close(layer.weight, reference, rtol=0, atol=3e-5)


def test_autocast_and_evaluation_change_nothing() -> None:
    for name in ("wide", "kernel"):
        layer = shaken(orthogonal(plain(name), 2.5))
        expected = layer.weight.detach().clone()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.weight, expected)
        assert torch.equal(layer.eval().weight, expected)


def test_compiles_as_one_graph() -> None:
    for name in ("wide", "kernel"):
        torch._dynamo.reset()
        layer = shaken(orthogonal(plain(name), 2.5))
        x = inputs(layer)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), rtol=1e-4, atol=1e-5)


def test_repr_and_report_tell() -> None:
    model = nn.Sequential(orthogonal(plain("wide"), 2.5), orthogonal(plain("kernel"), np.float32(0.5), orthogonal_map="qr"))
    report = spectral_report(model)
    assert report["0"] == "Orthogonal(max_norm=2.5)"
    assert report["1"].startswith("OrthogonalKernel(max_norm=0.5, orthogonal_map='qr'; ")


@pytest.mark.parametrize("number", [np.float32(2), np.float64(2), np.int64(2), 2])
def test_numpy_s_numbers_are_numbers(number) -> None:
    for name in ("wide", "kernel"):
        layer = orthogonal(plain(name), number)
        assert layer.weight.dtype == torch.float32
        assert type(layer.parametrizations.weight[0].max_norm) is float
        assert off(layer, name, 2.0) <= 1e-5


# -- refusals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0, -1.0, float("inf"), float("nan"), "qr", None, True, torch.ones(2)])
@pytest.mark.parametrize("name", ["wide", "kernel"])
def test_refuses_what_is_no_gain(name: str, max_norm) -> None:
    layer = plain(name)
    before = layer.weight
    with pytest.raises(ValueError, match="`max_norm` must be a positive, finite number"):
        orthogonal(layer, max_norm)
    assert layer.weight is before


@pytest.mark.parametrize(
    ("dtype", "max_norm"), [(torch.float32, 1e39), (torch.float32, 1e-40), (torch.float16, 1e5), (torch.float16, 1e-6)]
)
def test_refuses_a_gain_that_the_dtype_has_not(dtype: torch.dtype, max_norm: float) -> None:
    for name in ("wide", "kernel"):
        layer = plain(name, dtype)
        with pytest.raises(ValueError, match=r"`max_norm` must be a number of the weight's dtype.*layer\.double\(\)"):
            orthogonal(layer, max_norm)
        assert not hasattr(layer, "parametrizations")
        assert off(orthogonal(layer.double(), max_norm), name, max_norm) <= 1e-10


def test_the_map_is_named() -> None:
    for unknown in ("polar", None, ["qr"]):
        with pytest.raises(ValueError, match="`orthogonal_map` must be one of cayley, qr, exp, householder"):
            orthogonal(plain("wide"), orthogonal_map=unknown)
    with pytest.raises(TypeError, match="positional"):
        orthogonal(plain("wide"), 1.0, "qr")
    with pytest.raises(TypeError, match="map"):
        orthogonal(plain("wide"), map="qr")
