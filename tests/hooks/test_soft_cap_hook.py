"""SpectralClip with the coupled soft cap: the bound holds whatever happens to weights, and a step waits for nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from observers import Counter, lattice_norm, matrix_norm
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.hooks import capped
from spectral_hooks.projections import carried, coupled

ALLOWED = 1 + 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two matrices of one shape, a wide one, and one that is a convolution, all of them outside."""
    torch.manual_seed(0)
    pointwise = nn.Conv2d(12, 18, 1, bias=False)
    layers = [nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False), nn.Linear(40, 16, bias=False), pointwise]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(3)
    return model.to(dtype)


def attached(model: nn.Module, max_norm: float = 1.0, **settings: Any) -> tuple[sh.SpectralClip, list[Tensor]]:
    hook = sh.SpectralClip(max_norm, projection="soft_cap", **settings)
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    return hook, [layer.weight for layer in model]


def norms(weights: list[Tensor]) -> list[float]:
    return [matrix_norm(weight.detach().flatten(1)) for weight in weights]


@torch.no_grad()
def push(weights: list[Tensor], size: float, seed: int) -> None:
    """Outwards, and anywhere."""
    for i, weight in enumerate(weights):
        noise = random(*weight.shape, seed=100 * seed + i) / max(weight.shape) ** 0.5
        weight.copy_((weight.double() * (1 + size) + size * noise).to(weight.dtype))


@pytest.fixture(params=["host", "device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the host may look at what is computed; if not, all that it knows comes a step later."""
    if request.param == "device":
        for module in (capped, carried, coupled):
            monkeypatch.setattr(module, "is_at_hand", lambda _: False)
    return request.param


# -- the bound -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [1.0, 0.01, 30.0])
def test_inside_for_steps_of_all_sizes(max_norm: float, dtype: torch.dtype, place: str) -> None:
    """Some of them 100 times larger."""
    model = network(dtype)
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(max_norm)
    hook, weights = attached(model, max_norm)
    assert max(norms(weights)) <= max_norm * ALLOWED
    acted = 0
    for seed in range(60):
        size = (1e-5, 1e-3, 1e-2)[seed // 20] * (100 if seed % 20 == 7 else 1)
        for weight in weights:
            weight.detach().div_(max_norm)
        push(weights, size, seed)
        for weight in weights:
            weight.detach().mul_(max_norm)
        hook.after_step()
        assert max(norms(weights)) <= max_norm * ALLOWED
        acted += hook.clipped
    assert acted >= 20
    assert min(norms(weights)) >= 0.6 * max_norm


def muon(weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    state["momentum"] = 0.95 * state.get("momentum", 0) + gradient
    u, _, vh = torch.linalg.svd(gradient + 0.95 * state["momentum"], full_matrices=False)
    return -0.02 * u @ vh


def adam(weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    state["first"] = 0.9 * state.get("first", 0) + 0.1 * gradient
    state["second"] = 0.99 * state.get("second", gradient.square()) + 0.01 * gradient.square()
    return -1e-2 * state["first"] / (state["second"].sqrt() + 1e-8)


def sgd(weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    state["momentum"] = 0.9 * state.get("momentum", 0) + gradient
    return -2e-3 * state["momentum"]


@pytest.mark.parametrize("update", [muon, adam, sgd])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "steps"), [((8, 8), 1000), ((12, 40), 300), ((96, 64), 100)])
def test_long_runs(shape: tuple[int, int], steps: int, dtype: torch.dtype, update: Callable[..., Tensor]) -> None:
    """Ten thousand steps, and large matrices: `tests/benchmarks/soft_cap.py`."""
    layer = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    hook, (weight,) = attached(nn.Sequential(layer))
    target, state, seen = 3 * random(*shape, seed=0).float() / max(shape) ** 0.5, {}, []
    for step in range(steps):
        with torch.no_grad():
            gradient = weight.float() - target + random(*shape, seed=step).float() / max(shape) ** 0.5
            weight.copy_((weight.float() + update(weight, gradient, state)).to(dtype))
        hook.after_step()
        seen += norms([weight])
    assert max(seen) <= ALLOWED
    # and not well below it, although nothing is measured in most steps
    assert sum(seen[steps // 2 :]) / (steps - steps // 2) >= 0.85


def test_it_settles_higher_than_without_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    means = {}
    for rest in (8, 10**9):
        monkeypatch.setattr(capped, "_REST", rest)
        hook, weights = attached(network())
        seen = []
        for seed in range(160):
            push(weights, 3e-3, seed)
            with torch.no_grad():
                for weight in weights:  # noise that does not grow
                    weight /= 1 + 3e-3
            hook.after_step()
            seen.append(sum(norms(weights)) / 4)
        means[rest] = sum(seen[80:]) / 80
    assert means[8] > means[10**9] + 0.02


def test_small_values_stay() -> None:
    """Not as by scaling: what is well inside hardly moves while the largest value is held."""
    layer = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 0.9, 0.2, 0.1, 0.05, 0.01])))
    hook, (weight,) = attached(nn.Sequential(layer))
    for _ in range(200):
        with torch.no_grad():
            weight[0, 0] += 0.01
        hook.after_step()
    found = weight.detach().diagonal()
    assert 0.9 <= found[0] <= ALLOWED
    # `3α²σ⁴` a step, with `α = .07` for a step of .01 and the room for rounding
    torch.testing.assert_close(found[2:], torch.tensor([0.2, 0.1, 0.05, 0.01]), rtol=200 * 3 * 0.07**2 * 0.2**4, atol=0)


# -- what happens to weights besides -------------------------------------------------------------------------------------------


def test_weights_that_others_write_between_steps(place: str) -> None:
    model = network()
    hook, weights = attached(model)
    saved = {name: 3 * value for name, value in model.state_dict().items()}
    inside = {name: 0.8 * value for name, value in model.state_dict().items()}
    for n in range(9):
        push(weights, 1e-3, n)
        hook.after_step()
        if n % 3 == 0:
            model.load_state_dict(saved)
        elif n % 3 == 1:
            weights[n // 3].data = 7 * random(*weights[n // 3].shape, seed=n).float()
        else:
            model.load_state_dict(inside)
        hook.after_step()
        assert max(norms(weights)) <= ALLOWED
        if n % 3 == 2 and place == "host":
            assert all(torch.equal(now, inside[name]) for name, now in model.state_dict().items()), "certified, so they stay"


def test_frozen_and_thawed(place: str) -> None:
    hook, weights = attached(network())
    weights[1].requires_grad_(False)
    before = weights[1].detach().clone()
    for n in range(12):
        push(weights[:1] + weights[2:], 3e-3, n)
        hook.after_step()
    assert torch.equal(weights[1], before)
    with torch.no_grad():
        weights[1].mul_(5)
    weights[1].requires_grad_(True)
    hook.after_step()
    assert max(norms(weights)) <= ALLOWED


def test_a_schedule_is_obeyed_at_once(place: str) -> None:
    model = network()
    hook = sh.SpectralClip(schedule=lambda step: 1.0 if step < 3 else 0.5, projection="soft_cap")
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    weights = [layer.weight for layer in model]
    for n in range(6):
        push(weights, 1e-4, n)
        hook.step += 1
        hook.after_step()
        assert max(norms(weights)) <= hook.bound * ALLOWED


class Other(nn.Module):
    """A fused projection, a matrix used twice, convolutions, an embedding's worth of layers that are no plain matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.one, self.two = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.conv, self.strided = nn.Conv2d(3, 4, 3, padding=1), nn.Conv1d(4, 6, 4, stride=2, groups=2)
        self.ring = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
        self.pruned = torch.nn.utils.prune.random_unstructured(nn.Linear(5, 4), "weight", 0.5)


def test_all_that_is_no_plain_matrix_obeys_too(place: str) -> None:
    """Convolutions are certified after every cap: the crop to their taps takes them out of what is known."""
    torch.manual_seed(0)
    model = Other()
    hook = sh.SpectralClip(0.6, projection="soft_cap", split={"fused": 3})
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for n in range(10):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * random(*parameter.shape, seed=n).float())
        model.pruned(torch.zeros(1, 5))
        hook.after_step()
        parts = [*model.fused.weight.split(6), model.one.weight, model.parametrized.weight, model.pruned.weight]
        assert max(map(matrix_norm, parts)) <= 0.6 * ALLOWED
        assert max(map(lattice_norm, (model.conv, model.strided))) <= 0.6 * (1 + 3e-6)
        assert float(sh.spectral_norm(model.ring)) <= 0.6 * (1 + 3e-6)
    assert model.two.weight is model.one.weight


# -- what is no number ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_named(bad: float, place: str) -> None:
    """On the host at once, and nothing changes; on a device at the next step, or where the hook projects besides."""
    model = network()
    hook, weights = attached(model)
    for n in range(3):
        push(weights, 1e-3, n)
        hook.after_step()
    push(weights, 0.1, 5)
    with torch.no_grad():
        weights[2][3, 4] = bad
    before = copy.deepcopy(model.state_dict())
    if place == "device":
        hook.after_step()
        assert torch.equal(weights[2].isfinite(), before["2.weight"].isfinite()), "it has not spread"
        assert max(norms([*weights[:2], weights[3]])) <= ALLOWED
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"2.*NaN or infinity"):
            hook.finish()
        hook.after_step()
    with pytest.raises(ValueError, match=r"2.*NaN or infinity"):
        hook.after_step()
    for now, was in zip(model.state_dict().values(), before.values(), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        weights[2][3, 4] = 0
    hook.after_step()
    assert max(norms(weights)) <= ALLOWED


# -- resuming, copies ----------------------------------------------------------------------------------------------------------


def run(hook: sh.SpectralClip, weights: list[Tensor], seeds: range) -> Iterator[float]:
    for seed in seeds:
        push(weights[seed % 2 :], 2e-3 if seed % 3 else -2e-3, seed)
        hook.after_step()
        yield max(norms(weights))


@pytest.mark.parametrize("known", [True, False])
def test_a_resumed_run(known: bool, place: str) -> None:
    """With what was carried along bit for bit, without it within the bound."""
    model = network()
    hook, weights = attached(model)
    list(run(hook, weights, range(7)))
    state, values = copy.deepcopy(hook.state_dict()), copy.deepcopy(model.state_dict())
    assert all(isinstance(norm, float) for _, norm, *_ in state["known"].values())
    list(run(hook, weights, range(7, 30)))
    other, resumed = network(), sh.SpectralClip(1.0, projection="soft_cap")
    other.load_state_dict(values)
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)) if known else {"step": state["step"]})
    resumed.attach(other, torch.optim.SGD(other.parameters(), lr=1.0))
    again = [layer.weight for layer in other]
    assert max(run(resumed, again, range(7, 30))) <= ALLOWED
    if known:
        assert all(torch.equal(one, two) for one, two in zip(weights, again, strict=True))


def test_as_much_memory_as_the_weights_take(place: str) -> None:
    """Whatever the paces: what is kept of a matrix that rests keeps none of the others alive, here and in a checkpoint."""
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(6)))
    hook, weights = attached(model)
    for step in range(12):
        push([weight for i, weight in enumerate(weights) if step % (i + 1) == 0], 0.05, seed=step)
        hook.after_step()
    kept = [known[0] for known in hook.state_dict()["known"].values()]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    assert len(kept) == len(weights)
    assert sum(storages.values()) == sum(weight.nbytes for weight in weights)


def test_from_one_projection_to_the_other() -> None:
    model = network()
    hook, weights = attached(model)
    list(run(hook, weights, range(5)))
    for projection in ("clip", "soft_cap"):
        state, hook = hook.state_dict(), sh.SpectralClip(1.0, projection=projection)
        hook.load_state_dict(state)
        hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
        assert max(run(hook, weights, range(5, 12))) <= ALLOWED


def test_copies_of_a_hook_carry_settings_only() -> None:
    hook, weights = attached(network())
    list(run(hook, weights, range(3)))
    for other in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert repr(other) == repr(hook)
        assert other.state_dict()["known"] == {}


def test_shared_with_one_process() -> None:
    hook, weights = attached(network(), distribute=True)
    assert max(run(hook, weights, range(12))) <= ALLOWED


def test_a_strength_guarantees_nothing() -> None:
    model = network()
    hook = sh.SpectralClip(0.3, projection=partial(sh.projections.soft_cap, strength=0.1))
    assert "soft_cap, strength=0.1) (does not guarantee the bound)" in repr(hook)
    hook.start(model)
    assert max(norms([layer.weight for layer in model])) > 0.3


# -- what a step asks of a device ----------------------------------------------------------------------------------------------


def test_a_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 linear layers of 4 shapes: capped, certified, or neither."""
    for module in (capped, carried, coupled):
        monkeypatch.setattr(module, "is_at_hand", lambda _: False)
    shapes = [(48, 48), (48, 160), (160, 48), (96, 32)]
    torch.manual_seed(0)
    hook, weights = attached(nn.Sequential(*[nn.Linear(*shapes[i % 4], bias=False) for i in range(24)]), 0.5)
    counter = Counter(weights)

    def read(self: capped.Late, original: Any = capped.Late.read) -> list[str]:
        waits = counter.waits
        found = original(self)
        counter.waits = waits  # of a step ago
        return found

    def tolist(x: Tensor, original: Any = Tensor.tolist) -> Any:
        counter.waits += x in counter.away
        return original(x)

    monkeypatch.setattr(capped.Late, "read", read)
    monkeypatch.setattr(Tensor, "tolist", tolist)
    acted = []
    for seed in range(12):
        push(weights, 4e-3, seed)
        for weight in weights:
            counter.away[weight] = True
        before = counter.operations
        with counter:
            hook.after_step()
        assert counter.waits == 0
        assert counter.operations - before <= 4500, "by the number of shapes, not of layers"
        acted.append(hook.clipped)
        assert max(norms(weights)) <= 0.5 * ALLOWED
    assert max(acted) == 24
