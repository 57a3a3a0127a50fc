"""Matrices that live at the bound: what a hook promises of them with and without slack, and what a step asks of a device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from observers import Counter
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.hooks import keep_matrices
from spectral_hooks.projections import few, matrices

ALLOWED = 1 + 1e-6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: None is at most .02 for matrices.
SLACKS = [None, 0, 0.02, 0.3]


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two matrices of one shape, a wide one, and one that is a convolution, all of them outside."""
    torch.manual_seed(0)
    square, wide, pointwise = (
        (lambda: nn.Linear(24, 24, bias=False)),
        nn.Linear(40, 16, bias=False),
        nn.Conv2d(12, 18, 1, bias=False),
    )
    model = nn.Sequential(square(), square(), wide, pointwise)
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(3)
    return model.to(dtype)


def attached(dtype: torch.dtype, **settings: Any) -> tuple[nn.Module, sh.SpectralClip, list[Tensor]]:
    model = network(dtype)
    hook = sh.SpectralClip(1.0, **settings)
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    return model, hook, [layer.weight for layer in model]


@torch.no_grad()
def push(weights: list[Tensor], size: float, seed: int) -> None:
    """Outwards, and anywhere."""
    for i, weight in enumerate(weights):
        noise = random(*weight.shape, seed=100 * seed + i) / max(weight.shape) ** 0.5
        weight.copy_((weight.double() * (1 + size) + size * noise).to(weight.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slack", SLACKS)
def test_inside_and_no_deeper_than_the_slack(slack: float | None, dtype: torch.dtype) -> None:
    """For steps of all sizes, some 100 times larger; and what is inside does not change by a bit."""
    _, hook, weights = attached(dtype, slack=slack)
    deepest = 0.02 if slack is None else slack
    rounding = 8 * torch.finfo(dtype).eps + 2e-6
    kept = changes = 0
    for seed in range(60):
        size = (1e-5, 1e-3, 1e-2)[seed // 20] * (100 if seed % 20 == 7 else 1)
        push(weights, size, seed)
        before = [weight.detach().clone() for weight in weights]
        hook.after_step()
        for was, now in zip(before, weights, strict=True):
            assert norm(now) <= ALLOWED
            if norm(was) <= 1 - 1e-6:
                assert torch.equal(was, now)
                kept += 1
            elif norm(was) > ALLOWED:
                assert norm(now) >= 1 - deepest - rounding
                changes += 1
    assert changes >= 10
    assert kept or slack == 0


def test_slack_gives_rest_and_none_is_clipped_exactly() -> None:
    clips = {}
    for slack in (0, None):
        _, hook, weights = attached(torch.float32, slack=slack)
        clips[slack] = 0
        for seed in range(30):
            push(weights, 5e-4, seed)
            hook.after_step()
            clips[slack] += hook.clipped
            if slack == 0:
                assert all(norm(weight) >= 1 - 3e-6 for weight in weights)
    assert clips[0] == 4 * 30
    assert clips[None] <= clips[0] / 3


def test_the_slower_a_matrix_moves_the_less_deep_it_is_clipped() -> None:
    depths = []
    for size in (1e-6, 1e-4, 1e-1):
        _, hook, weights = attached(torch.float32)
        for seed in range(40):
            push(weights[:1], size, seed)
            hook.after_step()
            if hook.clipped:
                depths.append((size, 1 - norm(weights[0])))
    deepest = {size: max(depth for step, depth in depths if step == size) for size, _ in depths}
    assert deepest[1e-6] < deepest[1e-4] < deepest[1e-1] <= 0.02 + 1e-5
    assert deepest[1e-6] < 1e-3


def test_the_first_clip_and_those_outside_of_training_go_to_the_bound() -> None:
    model, hook, weights = attached(torch.float32)
    assert all(norm(weight) >= 1 - 3e-6 for weight in weights)
    push(weights, 0.1, 0)
    hook.after_step()
    assert norm(weights[0]) < 0.99
    inside = copy.deepcopy(model.state_dict())
    hook.project()
    assert all(torch.equal(now, was) for now, was in zip(model.state_dict().values(), inside.values(), strict=True))
    push(weights, 0.1, 1)
    hook.project()
    assert all(1 - 3e-6 <= norm(weight) <= ALLOWED for weight in weights)


@pytest.mark.parametrize("slack", SLACKS)
def test_weights_that_others_write_between_steps(slack: float | None) -> None:
    model, hook, weights = attached(torch.float32, slack=slack)
    saved = {name: 3 * value for name, value in model.state_dict().items()}
    for n in range(6):
        push(weights, 1e-3, n)
        hook.after_step()
        if n % 2:
            model.load_state_dict(saved)
        else:
            with torch.no_grad():
                weights[n // 2].data = 7 * random(*weights[n // 2].shape, seed=n).float()
        hook.after_step()
        assert max(map(norm, weights)) <= ALLOWED


@pytest.mark.parametrize("slack", [None, 0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_named_and_nothing_changes(slack: float | None, bad: float) -> None:
    model, hook, weights = attached(torch.float32, slack=slack)
    for n in range(3):
        push(weights, 1e-3, n)
        hook.after_step()
    push(weights, 0.1, 5)
    with torch.no_grad():
        weights[2][3, 4] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"2.*NaN or infinity"):
        hook.after_step()
    for now, was in zip(model.state_dict().values(), before.values(), strict=True):
        assert torch.equal(now, was) or not was.isfinite().all()


@pytest.mark.parametrize(("slack", "known"), [*((slack, True) for slack in SLACKS), (0, False)])
def test_a_resumed_run_goes_on_bit_for_bit(slack: float | None, known: bool) -> None:
    """With what was known; without slack even without that."""

    def run(weights: list[Tensor], hook: sh.SpectralClip, seeds: range) -> None:
        for seed in seeds:
            push(weights[seed % 2 :], 1e-3 if seed % 3 else -1e-3, seed)
            hook.after_step()

    model, hook, weights = attached(torch.float32, slack=slack)
    run(weights, hook, range(7))
    state, values = copy.deepcopy(hook.state_dict()), copy.deepcopy(model.state_dict())
    run(weights, hook, range(7, 20))
    other, resumed = network(), sh.SpectralClip(1.0, slack=slack)
    other.load_state_dict(values)
    resumed.load_state_dict(state if known else {"step": state["step"]})
    resumed.attach(other, torch.optim.SGD(other.parameters(), lr=1.0))
    run([layer.weight for layer in other], resumed, range(7, 20))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_schedule_that_lowers_the_bound_is_obeyed_at_once() -> None:
    hook = sh.SpectralClip(schedule=lambda step: 1.0 if step < 3 else 0.5)
    model = network()
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    weights = [layer.weight for layer in model]
    for n in range(5):
        push(weights, 1e-4, n)
        hook.step += 1
        hook.after_step()
        assert max(map(norm, weights)) <= hook.bound * ALLOWED


# -- what a step asks of a device ----------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any], weights: list[Tensor]) -> tuple[int, int]:
    """Torch operations, and for how many of them the host would wait: a `read`, and a `tolist`, is one."""
    counter = Counter(weights)

    def values(x: Tensor, original: Any = Tensor.tolist) -> Any:
        waits = counter.waits
        found = original(x)
        counter.waits = waits + (x in counter.away)
        return found

    def read(tensors: list[Tensor], original: Any = matrices.read) -> list[Tensor]:
        found = [x.tolist() for x in original(tensors)]
        counter.waits += bool(tensors) - len(tensors)
        return [torch.tensor(x, dtype=torch.float64).reshape(y.shape) for x, y in zip(found, tensors, strict=True)]

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", values)
        for module in (matrices, few, keep_matrices):
            patch.setattr(module, "read", read)
        with counter:
            function()
    return counter.operations, counter.waits


SHAPES = [(48, 48), (48, 160), (160, 48), (96, 32)]


def layers(bound: float, slack: float | None) -> tuple[list[Tensor], sh.SpectralClip]:
    """24 linear layers of 4 shapes."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(*SHAPES[i % 4], bias=False) for i in range(24)])
    hook = sh.SpectralClip(bound, slack=slack)
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    return [layer.weight for layer in model], hook


@pytest.mark.parametrize("slack", [None, 0])
def test_operations_and_waits_of_a_step_at_the_bound(slack: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, hook = layers(0.5, slack)
    clips = []
    for seed in range(6):
        push(weights, 2e-3 if seed < 4 else 0.1, seed)
        operations, waits = counted(monkeypatch, hook.after_step, weights)
        clips.append(hook.clipped)
        assert operations <= 1500
        assert waits <= 12
        assert max(map(norm, weights)) <= 0.5 * ALLOWED
    assert max(clips) == 24


def test_operations_and_waits_of_a_step_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, hook = layers(10.0, None)
    for seed in range(3):
        push(weights, 1e-3, seed)
        operations, waits = counted(monkeypatch, hook.after_step, weights)
        assert hook.clipped == 0
        assert operations <= 200
        assert waits <= 3
