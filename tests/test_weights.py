"""write_ changes the values of a weight and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from spectral_hooks import as_operator
from spectral_hooks.weights import full, leaves, write_


def test_a_plain_parameter_is_copied_into() -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    parameter, pointer = layer.weight, layer.weight.data_ptr()
    write_(layer, torch.ones(2, 3))
    assert layer.weight is parameter
    assert layer.weight.data_ptr() == pointer
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.requires_grad
    assert bool((layer.weight == 1).all())


def test_an_optimizer_still_holds_it() -> None:
    layer = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    write_(layer, torch.ones(2, 3))
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    assert bool((layer.weight == 0).all())


def test_writing_counts_as_a_change_for_autograd() -> None:
    """Between forward and backward it is an error, not a wrong gradient."""
    layer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    loss = layer(torch.ones(3)).sum()
    write_(layer[1], torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal], ids=lambda f: f.__name__)
def test_a_parametrized_weight_is_assigned_and_read_back(wrap) -> None:
    layer = wrap(nn.Linear(4, 4))
    torch.manual_seed(0)
    wanted = torch.linalg.qr(torch.randn(4, 4)).Q
    keys = list(layer.state_dict())
    held = {name: id(p) for name, p in layer.named_parameters()}
    write_(layer, wanted)
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=0, atol=1e-5)
    assert list(layer.state_dict()) == keys
    assert {name: id(p) for name, p in layer.named_parameters()} == held


class Half(nn.Module):
    """A parametrization that gives back another weight than was assigned."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return x


class OneWay(nn.Module):
    """A parametrization that cannot be assigned."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


@pytest.mark.parametrize(
    ("parametrization", "message"),
    [(Half(), "Half did not take the projected weight"), (OneWay(), "OneWay has no right_inverse")],
    ids=["half", "one-way"],
)
def test_a_parametrization_that_does_not_take_it_keeps_the_old_weight(parametrization: nn.Module, message: str) -> None:
    layer = parametrize.register_parametrization(nn.Linear(3, 2), "weight", parametrization)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message + ".*exclude the layer"):
        write_(layer, torch.ones(2, 3))
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_right_inverse_that_is_not_implemented() -> None:
    """torch's orthogonal has one, but without trivialization it raises."""
    layer = parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley", use_trivialization=False)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"_Orthogonal has no right_inverse.*exclude the layer"):
        write_(layer, torch.eye(3))
    assert torch.equal(layer.weight.detach(), before)


def test_a_value_that_an_orthogonal_weight_cannot_take_is_refused() -> None:
    layer = parametrizations.orthogonal(nn.Linear(3, 3))
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"Orthogonal|not orthogonal|did not take"):
        write_(layer, torch.diag(torch.tensor([1.0, 0.5, 0.1])))
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=1e-6)


def test_a_pruned_weight_is_written_where_its_mask_is_open() -> None:
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", amount=6)
    original, closed = layer.weight_orig, layer.weight_mask == 0
    before = original.detach().clone()
    write_(layer, torch.full((4, 4), 7.0))
    assert layer.weight_orig is original
    assert bool((original[~closed] == 7).all())
    assert torch.equal(original[closed], before[closed])
    assert torch.equal(as_operator(layer).weight.detach(), 7 * layer.weight_mask)
    assert torch.equal(layer.weight.detach(), 7 * layer.weight_mask)


def test_leaves_are_the_parameters_behind_a_weight() -> None:
    plain = nn.Linear(2, 2)
    normed = parametrizations.weight_norm(nn.Linear(2, 2))
    pruned = prune.identity(nn.Linear(2, 2), "weight")
    assert [id(p) for p in leaves(plain)] == [id(plain.weight)]
    assert [id(p) for p in leaves(normed)] == [id(p) for n, p in normed.named_parameters() if n != "bias"]
    assert [id(p) for p in leaves(pruned)] == [id(pruned.weight_orig)]


def test_full_is_the_weight_itself_without_gradient() -> None:
    weight = nn.Linear(2, 2).weight
    assert full(weight).data_ptr() == weight.data_ptr()
    assert not full(weight).requires_grad
