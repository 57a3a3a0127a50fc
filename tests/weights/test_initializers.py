"""Orthogonal starts and the singular values of a network's Jacobian."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import FEW_CONVS, MATRICES, Case, apply_to_identity
from torch import nn

import spectral_hooks as sh
from spectral_hooks.parametrizations.orthogonal import orthogonal
from spectral_hooks.weights.initializers import delta_orthogonal_, jacobian_singular_values, orthogonal_

CASES = [case for case in FEW_CONVS if case.mode not in ("reflect", "replicate")]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_matrices(shape: tuple[int, int]) -> None:
    for function in (orthogonal_, delta_orthogonal_):
        layer = nn.Linear(shape[1], shape[0], dtype=torch.float64)
        weight, bias = layer.weight, layer.bias.detach().clone()
        assert function(layer, 1.5, generator=generator()) is layer
        assert layer.weight is weight
        assert torch.equal(layer.bias, bias)
        found = torch.linalg.svdvals(layer.weight.detach())
        torch.testing.assert_close(found, torch.full_like(found, 1.5))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case) -> None:
    layer = orthogonal_(case.layer(), generator=generator())
    size = 12 if 4 in layer.stride else 6
    found = torch.linalg.svdvals(case.operator(layer.weight.detach(), finite=False).circular(size).to_dense())
    # what a stride beyond the kernel does not read has singular value 0
    assert float(torch.minimum((found - 1).abs(), found).max()) <= 1e-10
    assert float(found[0]) == pytest.approx(1)
    if case.mode == "zeros":
        assert float(torch.linalg.matrix_norm(apply_to_identity(layer, case.in_shape), 2)) <= 1 + 1e-9


@pytest.mark.parametrize("channels", [(4, 4), (3, 5), (6, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_delta_is_orthogonal_with_zero_padding(channels: tuple[int, int], groups: int) -> None:
    n_in, n_out = (groups * c for c in channels)
    layer = delta_orthogonal_(
        nn.Conv2d(n_in, n_out, 3, padding=1, groups=groups, dtype=torch.float64), 2.0, generator=generator()
    )
    found = torch.linalg.svdvals(apply_to_identity(layer, (n_in, 4, 5)))
    torch.testing.assert_close(found, torch.full_like(found, 2.0))
    assert int((layer.weight.abs().sum((0, 1)) > 0).sum()) == 1


@pytest.mark.parametrize("gain", [1e-20, np.float32(0.5), np.int64(3), 1e20, 0])
def test_gains_of_every_scale(gain) -> None:
    for function in (orthogonal_, delta_orthogonal_):
        for layer in (nn.Linear(5, 3), nn.Conv2d(3, 4, 3, padding=1)):
            weight = function(layer, gain, generator=generator()).weight
            assert weight.dtype == torch.float32
            op = sh.as_operator(layer)
            dense = op.with_weight(weight.detach().double())
            matrix = dense.weight if isinstance(layer, nn.Linear) else dense.circular(5).to_dense()
            found = torch.linalg.svdvals(matrix)
            torch.testing.assert_close(found, torch.full_like(found, float(gain)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gain", [-1.0, float("nan"), float("inf"), "2", None, True])
def test_refuses_what_is_no_gain(gain) -> None:
    for function in (orthogonal_, delta_orthogonal_):
        for layer in (nn.Linear(5, 3), nn.Conv2d(3, 4, 3)):
            before = layer.weight.detach().clone()
            with pytest.raises(ValueError, match="`gain` must be a finite number, 0 or more"):
                function(layer, gain)
            assert torch.equal(layer.weight, before)


def test_the_same_seed_gives_the_same_weight() -> None:
    for function in (orthogonal_, delta_orthogonal_):
        one, two, other = (function(nn.Conv1d(4, 4, 3), generator=generator(seed)).weight for seed in (0, 0, 1))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


def test_haar() -> None:
    """No sign is preferred, as QR without a correction would: the mean over many is near zero."""
    g = generator()
    mean = torch.stack([orthogonal_(nn.Linear(2, 2), generator=g).weight.detach() for _ in range(2000)]).mean(0)
    assert float(mean.abs().max()) < 0.08  # five standard deviations of √(1 / 2 / 2000)


def test_in_a_parametrized_layer_and_in_half_precision() -> None:
    layer = orthogonal(nn.Conv2d(4, 4, 3))
    orthogonal_(layer, generator=generator())
    reference = orthogonal_(nn.Conv2d(4, 4, 3), generator=generator())
    torch.testing.assert_close(layer.weight, reference.weight, rtol=0, atol=1e-5)
    for stem in ((3, 32, 3, 2), (3, 20, 4, 2)):  # factors on both sides of the projectors
        layer = orthogonal(nn.Conv2d(*stem))
        orthogonal_(layer, generator=generator())
        reference = orthogonal_(nn.Conv2d(*stem), generator=generator())
        torch.testing.assert_close(layer.weight, reference.weight, rtol=0, atol=1e-5)
    half = orthogonal_(nn.Linear(6, 6, dtype=torch.bfloat16), generator=generator())
    assert half.weight.dtype == torch.bfloat16


def test_a_layer_that_cannot_hold_it_is_left_as_it_was() -> None:
    """A single tap in an even kernel is no product of projector pairs."""
    layer = orthogonal(nn.Conv2d(4, 4, 2))
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="did not take"):
        delta_orthogonal_(layer, generator=generator())
    assert torch.equal(layer.weight, before)


def test_the_jacobian_of_a_linear_map_is_the_map() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    found = jacobian_singular_values(layer, torch.randn(2, 2, 4, 4, dtype=torch.float64))
    reference = torch.linalg.svdvals(apply_to_identity(layer, (2, 4, 4)))
    torch.testing.assert_close(found, reference.expand(2, -1))


def test_the_jacobian_of_a_network_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    model.train()
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 5, dtype=torch.float64)
    found = jacobian_singular_values(model, x)
    assert model.training
    assert model[0].training
    assert not model[3].training, "every mode is put back"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda z: model(z[None])[0], x[i])
        torch.testing.assert_close(found[i], torch.linalg.svdvals(jacobian))


def test_dynamical_isometry() -> None:
    """A deep linear network keeps all lengths from an orthogonal start, and not from torch's default."""

    def deep() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular") for _ in range(30)])

    x = torch.randn(1, 4, 4, 4)
    for function in (orthogonal_, delta_orthogonal_):
        model = deep()
        for layer in model:
            function(layer, generator=generator())
        assert float((jacobian_singular_values(model, x) - 1).abs().max()) <= 1e-4
    assert float(jacobian_singular_values(deep(), x)[0, -1]) < 1e-4


def test_what_is_refused() -> None:
    for function in (orthogonal_, delta_orthogonal_):
        with pytest.raises(TypeError, match="ReLU"):
            function(nn.ReLU())
        with pytest.raises(ValueError, match="repeats inputs"):
            function(nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"))
    with pytest.raises(TypeError, match="`example` must be a floating-point tensor"):
        jacobian_singular_values(nn.Linear(2, 2), torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="`model` must give an output"):
        jacobian_singular_values(nn.Flatten(0), torch.ones(2, 2))


def test_they_are_public() -> None:
    assert sh.initializers.orthogonal_ is orthogonal_
