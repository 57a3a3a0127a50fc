"""`max_norm` of `skew`, `cayley` and `group_shuffle`: all singular values are that, and it goes wherever the layer goes."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import apply_to_identity
from torch import nn

import spectral_hooks as sh
from spectral_hooks.parametrizations import group_shuffle, remove_spectral, spectral_report

P = sh.parametrizations

#: A plain layer, what makes it a gain times an isometry, and the shape of an input.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module], tuple[int, ...]]] = {
    "skew": (lambda: nn.Conv2d(3, 5, 3, padding=1), P.skew, (3, 4, 5)),
    "skew stride": (lambda: nn.Conv1d(3, 4, 4, padding=1, stride=2), P.skew, (3, 8)),
    "skew patches": (lambda: nn.Conv1d(3, 4, 2, stride=2), P.skew, (3, 8)),
    "skew transposed": (lambda: nn.ConvTranspose1d(4, 3, 4, padding=1, stride=2), P.skew, (4, 5)),
    "cayley": (lambda: nn.Conv2d(4, 3, 3, padding=1), P.cayley, (4, 4, 5)),
    "cayley patches": (lambda: nn.Conv1d(3, 4, 2, stride=2), P.cayley, (3, 8)),
    "cayley transposed": (lambda: nn.ConvTranspose1d(4, 3, 4, padding=1, stride=2), P.cayley, (4, 5)),
    "matrix": (lambda: nn.Linear(12, 12), lambda layer, *c: group_shuffle(layer, *c, blocks=3), (12,)),
    "1×1 in groups": (lambda: nn.Conv1d(8, 8, 1, groups=2), lambda layer, *c: group_shuffle(layer, *c, blocks=2), (8, 3)),
    "group shuffle": (lambda: nn.Conv2d(3, 8, 3, padding=1), lambda layer, *c: group_shuffle(layer, *c, blocks=2), (3, 4, 3)),
    "group shuffle transposed": (
        lambda: nn.ConvTranspose1d(8, 3, 3, padding=1),
        lambda layer, *c: group_shuffle(layer, *c, blocks=2),
        (8, 5),
    ),
}
each = pytest.mark.parametrize("name", CASES)


def made(name: str, *gain: object, dtype: torch.dtype = torch.float64) -> nn.Module:
    plain, function, _ = CASES[name]
    torch.manual_seed(0)
    return function(plain().to(dtype), *gain)


def values(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    layer = copy.deepcopy(layer)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    matrix = apply_to_identity(layer, shape).double()
    return torch.linalg.svdvals(matrix)[: min(matrix.shape)]


@each
@pytest.mark.parametrize("gain", [1e-3, 0.3, 1, 2.5, 1e4])
def test_all_singular_values_are_it(name: str, gain: float) -> None:
    for dtype in (torch.float64, torch.float32):
        layer = made(name, gain, dtype=dtype)
        shape = CASES[name][2]
        for mode in (True, False):
            found = values(layer.train(mode), shape) / gain
            assert float((found - 1).abs().max()) <= (3.1e-6 if dtype == torch.float64 else 1e-5)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_().mul_(3)
        found = values(layer, shape) / gain
        assert float((found - 1).abs().max()) <= (3.1e-6 if dtype == torch.float64 else 1e-5)


@each
def test_it_is_one_by_default_and_a_factor_of_the_map(name: str) -> None:
    """The parameters are the same, but where the start is near a weight that is divided by it: those are copied."""
    layer, three = made(name), made(name, 3)
    three.load_state_dict(layer.state_dict())
    x = torch.randn(2, *CASES[name][2], dtype=torch.float64)
    bias = layer.bias.reshape(-1, *[1] * (x.ndim - 2)) if x.ndim > 2 else layer.bias
    torch.testing.assert_close(three(x) - bias, 3 * (layer(x) - bias), rtol=0, atol=1e-12)
    assert list(three.state_dict()) == list(layer.state_dict())
    for twin in (
        copy.deepcopy(three),
        *([] if nn.utils.parametrize.is_parametrized(three) else [pickle.loads(pickle.dumps(three))]),
    ):
        torch.testing.assert_close(twin(x), three(x))


@each
@pytest.mark.parametrize("gain", [np.float32(0.5), np.float64(0.5), np.int64(2), 2])
def test_numbers_of_any_kind(name: str, gain: object) -> None:
    layer = made(name, gain)
    held = layer.parametrizations.weight[0] if nn.utils.parametrize.is_parametrized(layer) else layer
    assert type(held.max_norm) is float
    assert f"max_norm={float(gain)}" in repr(layer)
    assert f"max_norm={float(gain)}" in spectral_report(nn.Sequential(layer))["0"]
    assert torch.allclose(values(layer, CASES[name][2]), torch.tensor(float(gain), dtype=torch.float64), rtol=4e-6)


@each
@pytest.mark.parametrize("gain", [0, -1.0, float("inf"), float("nan"), True, None, "1", [1.0]])
def test_what_is_no_gain_is_refused_and_the_layer_left(name: str, gain: object) -> None:
    plain, function, _ = CASES[name]
    layer = P.rescaled(plain())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="`max_norm` must be a positive, finite number; got"):
        function(layer, gain)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@each
def test_gains_beyond_the_dtype_are_refused(name: str) -> None:
    for gain in (1e300, 1e-300):
        with pytest.raises(ValueError, match=r"`max_norm` must be a number of the weight's dtype.*got 1e[+-]300\. Use a dtype"):
            made(name, gain, dtype=torch.float32)
    assert float((values(made(name, 1e100), CASES[name][2]) / 1e100 - 1).abs().max()) <= 3.1e-6


@pytest.mark.parametrize("function", [P.skew, P.cayley, P.group_shuffle])
def test_it_is_the_second_argument_and_all_others_have_names(function: Callable[..., nn.Module]) -> None:
    _, second, *others = inspect.signature(function).parameters.values()
    assert (second.name, second.default) == ("max_norm", 1.0)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in others)


@pytest.mark.parametrize("name", ["skew patches", "cayley patches", "matrix", "1×1 in groups"])
def test_plain_layers_have_it_in_their_weight(name: str) -> None:
    layer = made(name, 2.5)
    x = torch.randn(2, *CASES[name][2], dtype=torch.float64)
    y = layer(x)
    assert float(sh.spectral_norm(layer, rtol=1e-6).detach()) == pytest.approx(2.5, rel=5e-6)
    model = remove_spectral(nn.Sequential(layer))
    assert type(model[0]) is type(CASES[name][0]())
    torch.testing.assert_close(model[0](x), y, rtol=0, atol=1e-11)
    # and come back
    again = CASES[name][1](model[0], 2.5)
    if nn.utils.parametrize.is_parametrized(again):
        torch.testing.assert_close(again(x), y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["matrix", "1×1 in groups"])
def test_assigned_weights_come_back(name: str) -> None:
    layer = made(name, 0.4)
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    assert not torch.allclose(layer.weight, weight)
    layer.weight = weight
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-10)
    # what has another length is taken for its direction
    layer.weight = 7 * weight
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-10)
    half = copy.deepcopy(layer).bfloat16()
    assert torch.equal(half.weight, copy.deepcopy(half).float().weight.bfloat16())


def test_group_shuffle_convolutions_start_near_the_kernel_over_the_gain() -> None:
    torch.manual_seed(0)
    kernel = nn.Conv2d(16, 16, 3, padding=1, bias=False).double()
    nn.init.dirac_(kernel.weight)
    with torch.no_grad():
        kernel.weight.mul_(5)
    layer = group_shuffle(copy.deepcopy(kernel), 5, blocks=4)
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), kernel(x))
    fresh = group_shuffle(nn.Conv2d(16, 16, 3, padding=1, bias=False).double(), 5, blocks=4)
    fresh.load_state_dict(kernel.state_dict())
    torch.testing.assert_close(fresh(x), kernel(x))


@pytest.mark.parametrize("name", ["skew", "cayley", "group shuffle", "skew transposed"])
def test_others_say_what_their_norm_is(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"Its norm is 2\.5: keep it"):
        sh.as_operator(made(name, 2.5))


def test_fine_tuning_keeps_the_norm_that_the_weight_has() -> None:
    layer = nn.Linear(8, 8)
    weight = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"`max_norm` is for orthogonal weights; got 0\.5 with `fine_tune=True`"):
        group_shuffle(layer, 0.5, blocks=2, fine_tune=True)
    assert torch.equal(layer.weight, weight)
    # the remedy
    with torch.no_grad():
        layer.weight.copy_(sh.projections.clip(sh.as_operator(layer), 0.5))
    tuned = group_shuffle(layer, blocks=2, fine_tune=True)
    with torch.no_grad():
        tuned.parametrizations.weight[0].outer.normal_()
    assert float(torch.linalg.matrix_norm(tuned.weight.detach(), 2)) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("blocks", [np.int64(2), np.int32(2)])
def test_blocks_degrees_and_ranks_of_numpy(blocks: np.integer) -> None:
    assert "blocks=2)" in repr(group_shuffle(nn.Linear(8, 8), blocks=blocks).parametrizations.weight[0])
    assert "blocks=2)" in repr(group_shuffle(nn.Conv1d(8, 8, 3, padding=1), blocks=blocks))
    assert group_shuffle(nn.Linear(8, 8), blocks=blocks, fine_tune=True).parametrizations.weight[0].blocks == 2
    assert "degree=2)" in repr(P.skew(nn.Conv1d(2, 2, 3, padding=1), degree=blocks))
    assert P.tensor_train(nn.Linear(8, 8), blocks).ranks == (2, 2)
    assert P.tensor_train(nn.Linear(8, 8), np.array([3, 2])).ranks == (3, 2)
