"""Everything that the library offers has a row in `cases.py`, and passes what is common to all of its kind."""

from __future__ import annotations

from collections.abc import Iterable

import observers
import pytest
import torch
from cases import (
    BOUNDS,
    KEEPING,
    PARAMETRIZATIONS,
    PENALTIES,
    PROJECTIONS,
    SOME_CONVS,
    Made,
    apply_to_identity,
    random,
)
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.operators import KernelOperator

#: What is in `sh.parametrizations` beside them.
_BESIDE = {"remove_spectral", "spectral_report"}


def rows(names: Iterable[str]) -> set[str]:
    """What the rows are of: before the hyphen stands the name."""
    return {name.partition("-")[0] for name in names}


def test_every_bound_has_a_row() -> None:
    assert rows(BOUNDS) == set(sh.bounds.__all__)


def test_every_projection_has_a_row() -> None:
    assert rows(PROJECTIONS) == set(sh.projections.__all__)


def test_every_parametrization_has_a_row() -> None:
    assert rows(PARAMETRIZATIONS) == set(sh.parametrizations.__all__) - _BESIDE


def test_every_penalty_has_a_row() -> None:
    assert rows(PENALTIES) == set(sh.penalties.__all__ if "penalties" in sh.__all__ else ())


def test_a_row_is_of_what_it_is_named_after() -> None:
    for kind, table in ((sh.bounds, BOUNDS), (sh.projections, PROJECTIONS)):
        for name, row in table.items():
            assert getattr(row, "func", row) is getattr(kind, name.partition("-")[0]), name


# -- operators and their norms ------------------------------------------------------------------------------------------------


def operators(dtype: torch.dtype) -> dict[str, tuple[KernelOperator, float]]:
    """Of every kind, and its norm by a reference that uses nothing of the library."""
    found: dict[str, tuple[KernelOperator, float]] = {}
    for shape in ((5, 3), (3, 5), (4, 1)):
        matrix = random(*shape).to(dtype)
        found[f"matrix{shape}"] = sh.DenseOperator(matrix), observers.matrix_norm(matrix)
    for case in SOME_CONVS:
        layer = case.layer(dtype)
        weight = layer.weight.detach()
        found[f"{case}"] = case.operator(weight), observers.finite_norm(layer, case.size)
        if case.mode != "reflect":
            found[f"{case} on the lattice"] = case.operator(weight, finite=False), observers.lattice_norm(layer)
    return found


def norm_of(name: str, op: KernelOperator, weight: Tensor) -> float:
    """The norm of the stored values in the operator's place, by the same references."""
    if isinstance(op, sh.DenseOperator):
        return observers.matrix_norm(weight)
    case = next(case for case in SOME_CONVS if name.startswith(str(case)))
    layer = observers.with_weight(case.layer(), weight)
    return observers.lattice_norm(layer) if name.endswith("lattice") else observers.finite_norm(layer, case.size)


@pytest.fixture(scope="module")
def every() -> dict[torch.dtype, dict[str, tuple[KernelOperator, float]]]:
    return {dtype: operators(dtype) for dtype in (torch.float32, torch.float64)}


# -- bounds -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_is_never_below_the_norm(name: str, every) -> None:
    bound = BOUNDS[name]
    for dtype, found in every.items():
        for about, (op, norm) in found.items():
            leaf = op.weight.clone().requires_grad_()
            value = bound(op.with_weight(leaf))
            assert value.shape == (), about
            assert value.dtype == dtype, about
            assert float(value.detach()) >= norm * (1 - 1e-12), about
            (gradient,) = torch.autograd.grad(value, leaf)
            assert bool(torch.isfinite(gradient).all()), about
            assert float(bound(op.with_weight(torch.zeros_like(op.weight)))) == 0, about


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_takes_a_layer(name: str) -> None:
    for layer in (nn.Linear(3, 2), nn.Conv1d(2, 3, 3, stride=2)):
        assert torch.equal(BOUNDS[name](layer), BOUNDS[name](sh.as_operator(layer)))


# -- projections --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projection_obeys_or_comes_nearer(name: str, every) -> None:
    project = PROJECTIONS[name]
    guaranteed = sh.projections.guarantees(project)
    for dtype, found in every.items():
        for about, (op, norm) in found.items():
            before = op.weight.clone()
            bound = 0.7 * norm
            weight = project(op, bound)
            assert torch.equal(op.weight, before), about
            assert (weight.shape, weight.dtype, weight.requires_grad) == (before.shape, dtype, False), about
            after = norm_of(about, op, weight)
            if guaranteed:
                assert after <= bound * (1 + 1e-6), about
            elif "reflect" not in about:  # what repeats inputs is not the operator whose values these change
                assert after <= norm, about
            if name in KEEPING:
                assert torch.equal(project(op.with_weight(weight), bound), weight), about


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projection_is_known_by_name(name: str) -> None:
    function = getattr(PROJECTIONS[name], "func", PROJECTIONS[name])
    assert sh.projections.named(name.partition("-")[0]) is function
    layer = nn.Linear(3, 2)
    assert torch.equal(function(layer, 0.5), function(sh.as_operator(layer), 0.5))


# -- penalties ----------------------------------------------------------------------------------------------------------------


def test_a_penalty_is_a_term_of_the_loss(every) -> None:
    for name, penalty in PENALTIES.items():
        for dtype, found in every.items():
            for about, (op, _) in found.items():
                leaf = op.weight.clone().requires_grad_()
                value = penalty(op.with_weight(leaf))
                assert (value.shape, value.dtype) == ((), dtype), (name, about)
                (gradient,) = torch.autograd.grad(value, leaf)
                assert bool(torch.isfinite(gradient).all()), (name, about)
                assert bool(gradient.any()), (name, about)


# -- parametrizations ---------------------------------------------------------------------------------------------------------


def made(row: Made) -> nn.Module:
    torch.manual_seed(0)
    layer = row.layer().double()
    with torch.no_grad():
        layer.weight.mul_(4)
    return row.make(layer)


def pushed(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """After steps that make the outputs larger."""
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        x = torch.randn(8, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (-layer(x).square().mean()).backward()
        optimizer.step()
    return layer


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_parametrization_keeps_its_bound_in_training(name: str) -> None:
    row = PARAMETRIZATIONS[name]
    layer = made(row)
    start = [parameter.detach().clone() for parameter in layer.parameters()]
    for each in (layer, pushed(layer, row.shape)):
        assert observers.matrix_norm(apply_to_identity(each.eval(), row.shape)) <= row.max_norm * (1 + 1e-6)
        each.train()
    assert not all(torch.equal(*pair) for pair in zip(start, layer.parameters(), strict=True))


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_parametrization_is_taken_away_again(name: str) -> None:
    """`remove_spectral` gives a plain layer of the same outputs, or refuses and changes nothing."""
    row = PARAMETRIZATIONS[name]
    layer = pushed(made(row), row.shape).eval()
    x = torch.randn(3, *row.shape, dtype=torch.float64)
    expected = layer(x).detach()
    if row.is_plain:
        plain = sh.remove_spectral(layer)
        assert type(plain) is type(row.layer())
        assert plain.state_dict().keys() == row.layer().state_dict().keys()
    else:
        with pytest.raises(NotImplementedError):
            sh.remove_spectral(layer)
        plain = layer
    torch.testing.assert_close(plain(x).detach(), expected, rtol=0, atol=1e-12)
