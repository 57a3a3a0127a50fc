"""Composed and adjoint operators against the dense matrices of the layers themselves, applied one after the other."""

from itertools import pairwise
from math import prod

import pytest
import torch
from torch import nn

import spectral_hooks as sh

INNER = {
    "same": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 3, "padding": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
}
OUTER = {
    "valid": {},
    "same": {"padding": 1},
    "strided": {"stride": 2},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
}
#: Pairs (outer, inner) that are one kernel: the outer one does not pad and the inner one pads zeros; or both are circular.
ONE_KERNEL = {(o, i) for o in ("valid", "strided", "dilated", "grouped") for i in INNER if i != "circular"} | {("circular",) * 2}


def dense(layers, shape):
    """The matrix of the layers one after the other, the outermost first, in float64, without biases."""
    x, zero = torch.eye(prod(shape), dtype=torch.float64).reshape(-1, *shape), torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        for layer in reversed(layers):
            x, zero = layer(x), layer(zero)
    return (x - zero).flatten(1).T


def batch_norm(channels, kind=nn.BatchNorm2d):
    layer = kind(channels).double().eval()
    layer.running_var.uniform_(0.1, 3)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", INNER)
def test_a_composition_is_the_product_of_its_layers(outer, inner):
    torch.manual_seed(0)
    first, norm = nn.Conv2d(3, 6, 3, **INNER[inner]).double(), batch_norm(6)
    second = nn.Conv2d(6, 4, 3, **OUTER[outer]).double()
    true = dense([second, norm, first], (3, 13, 12))
    op = sh.compose(second, norm, first, input_size=(13, 12))
    torch.testing.assert_close(op.to_dense(), true)
    torch.testing.assert_close(sh.adjoint(op).to_dense(), true.T)
    assert isinstance(op, sh.ConvOperator) == ((outer, inner) in ONE_KERNEL)
    assert sh.spectral_norm(op).item() == pytest.approx(torch.linalg.matrix_norm(true, 2).item(), rel=2e-5)
    torch.testing.assert_close(sh.singular_values(op, k=3), torch.linalg.svdvals(true)[:3])


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", INNER)
def test_without_an_input_size_the_norm_bounds_every_size(outer, inner):
    torch.manual_seed(1)
    first, second = nn.Conv1d(2, 6, 3, **_one_axis(INNER[inner], 2)).double(), nn.Conv1d(6, 4, 3, **OUTER[outer]).double()
    bound = sh.spectral_norm(sh.compose(second, first)).item()
    norms = [torch.linalg.matrix_norm(dense([second, first], (2, n)), 2).item() for n in range(11, 27)]
    assert max(norms) <= bound
    if (outer, inner) in ONE_KERNEL and outer != "circular":
        assert max(norms) >= 0.9 * bound  # and it is no product of norms


def _one_axis(settings, groups):
    return {**settings, **({"groups": groups} if "groups" in settings else {})}


def test_the_kernel_of_padded_pairs_would_fall_below_their_norm():
    """Why padded convolutions stay apart: what the outer one pads with is not what the inner one computes there."""
    found = []
    for seed in range(40):
        torch.manual_seed(seed)
        pair = [nn.Conv1d(1, 1, 3, padding=1, bias=False).double() for _ in range(2)]
        true = torch.linalg.matrix_norm(dense(pair, (1, 9)), 2).item()
        unpadded = nn.Conv1d(1, 1, 3, bias=False).double()
        unpadded.weight = pair[0].weight
        one = sh.spectral_norm(sh.compose(unpadded, pair[1]), rtol=1e-6).item()
        found.append(true / one)
        assert true <= sh.spectral_norm(sh.compose(*pair)).item()
        assert sh.spectral_norm(sh.compose(*pair, input_size=9)).item() == pytest.approx(true, rel=1e-5)
    assert max(found) > 1.001


def test_batch_norm_and_convolution_are_one_operator():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False).double(), batch_norm(8)
    op = sh.compose(norm, conv)
    at_14 = torch.linalg.matrix_norm(dense([norm, conv], (3, 14, 14)), 2).item()
    assert at_14 <= sh.spectral_norm(op).item() <= 1.05 * at_14
    gains = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().max().item()
    assert sh.spectral_norm(op).item() < 0.9 * gains * sh.spectral_norm(sh.as_operator(conv)).item()


def test_matrices_and_features():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4).double(), batch_norm(5, nn.BatchNorm1d), nn.Linear(7, 5).double()]
    op = sh.compose(*layers)
    assert isinstance(op, sh.DenseOperator)
    torch.testing.assert_close(op.to_dense(), dense(layers, (7,)))


def test_a_linear_layer_takes_the_positions_in_a_row():
    torch.manual_seed(0)
    conv, norm, linear = nn.Conv2d(2, 3, 3, stride=2).double(), batch_norm(3), nn.Linear(3 * 3 * 2, 5).double()
    true = dense([linear, nn.Flatten(), norm, conv], (2, 7, 5))
    op = sh.compose(linear, norm, conv, input_size=(7, 5))
    torch.testing.assert_close(op.to_dense(), true)
    assert sh.spectral_norm(op).item() == pytest.approx(torch.linalg.matrix_norm(true, 2).item(), rel=2e-5)


def test_adjoints():
    torch.manual_seed(0)
    for layer, size in ((nn.Linear(4, 3), None), (nn.Conv2d(2, 4, 3, stride=2, groups=2), (7, 6))):
        op = sh.as_operator(layer, size)
        adjoint = sh.adjoint(op)
        torch.testing.assert_close(adjoint.to_dense(), op.to_dense().T)
        assert sh.adjoint(adjoint) is op
        assert sh.spectral_norm(adjoint) == sh.spectral_norm(op)
        clipped = sh.projections.clip(adjoint, 0.1)
        assert torch.equal(clipped, sh.projections.clip(op, 0.1))
    lattice = sh.adjoint(nn.Conv2d(2, 4, 3))
    assert sh.spectral_norm(lattice) == sh.spectral_norm(sh.adjoint(lattice))
    transposed = nn.ConvTranspose2d(4, 2, 3, stride=2, bias=False)
    torch.testing.assert_close(
        sh.adjoint(sh.ConvOperator(transposed.weight, stride=2, input_size=(7, 7))).to_dense(),
        sh.as_operator(transposed, (3, 3)).to_dense(),
    )


def test_gradients_flow_to_every_factor():
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 2, 3, padding=1), batch_norm(4).float(), nn.Conv2d(3, 4, 3, padding=1)]
    for settings in ({"input_size": (6, 6)}, {}):
        sh.spectral_norm(sh.compose(*layers, **settings)).backward()
        for layer in layers:
            assert layer.weight.grad is not None
            assert layer.weight.grad.abs().sum() > 0
            layer.weight.grad = None


def test_the_gradient_of_a_finite_norm_is_that_of_the_matrix():
    torch.manual_seed(0)
    layers = [nn.Conv1d(3, 2, 3, padding=1).double(), nn.Conv1d(2, 3, 3, padding=1).double()]
    weights = [layer.weight for layer in layers]
    norm = torch.linalg.matrix_norm(sh.compose(*layers, input_size=7).to_dense(), 2)
    wanted = torch.autograd.grad(norm, weights)
    found = torch.autograd.grad(sh.spectral_norm(sh.compose(*layers, input_size=7)), weights)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_bad_input_is_named():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    with pytest.raises(ValueError, match="at least one"):
        sh.compose()
    with pytest.raises(ValueError, match="are not the inputs of"):
        sh.compose(conv, conv)
    with pytest.raises(ValueError, match="give `input_size=`"):
        sh.compose(nn.Linear(4, 4), conv)
    with pytest.raises(ValueError, match="running statistics"):
        sh.compose(nn.BatchNorm2d(4, track_running_stats=False), conv)
    with pytest.raises(TypeError, match="has no operator"):
        sh.compose(nn.ReLU(), conv)
    with pytest.raises(TypeError, match="has no weight of its own"):
        sh.projections.clip(sh.compose(nn.Conv2d(4, 2, 3, padding=1), conv))
    with pytest.raises(TypeError, match="has no weight of its own"):
        sh.bounds.tap_sum(sh.compose(nn.Conv2d(4, 2, 3, padding=1), conv))


def test_a_composition_of_compositions_is_flat():
    layers = [nn.Conv1d(2, 2, 3, padding=1) for _ in range(4)]
    op = sh.compose(sh.compose(*layers[:2], input_size=9), sh.compose(*layers[2:], input_size=9))
    assert len(op.factors) == 4
    assert all(outer.in_shape == inner.out_shape for outer, inner in pairwise(op.factors))
