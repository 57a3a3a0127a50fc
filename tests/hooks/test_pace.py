"""`every="auto"` and the warning of what a hook takes, by a clock that the tests set; and what follows from the number."""

from __future__ import annotations

import copy
import logging
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import spectral_hooks as sh
from spectral_hooks.hooks import Hook, base, pace
from spectral_hooks.hooks.pace import Figures, Pace


class Clock:
    """Seconds, which only tests let pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Slow(Hook):
    """Takes its time to act: as the function of the step says."""

    def __init__(self, every) -> None:
        super().__init__(layers=None, exclude=None, every=every, split=None, lora="merged", log=False)
        self.takes = None
        self.acted_at: list[int] = []

    def act(self, targets, stepped) -> None:
        CLOCK.now += 0.0 if self.takes is None else self.takes(self.step)
        self.acted_at.append(self.step)


CLOCK = Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(base, "Pace", partial(Pace, clock=CLOCK))
    return CLOCK


def run(hook: Hook, steps: int, training=lambda step: 1.0, start: bool = True) -> Hook:
    """So many steps that take a second of training, or what the function says of each."""
    if start:
        hook.start(nn.Linear(3, 3))
    for _ in range(steps):
        CLOCK.now += training(hook.step + 1)
        hook.after_step()
    return hook


def slow(takes, every="auto") -> Slow:
    hook = Slow(every)
    hook.takes = takes if callable(takes) else lambda step: takes
    return hook


# -- the number -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acting", "period"), [(0.0, 1), (0.09, 1), (0.1, 1), (0.11, 2), (0.2, 2), (0.65, 7), (5.0, 50), (40.0, 400)]
)
def test_acting_takes_at_most_a_tenth_of_the_training(acting: float, period: int) -> None:
    hook = run(slow(acting), 1500)
    assert hook.period == period
    assert "every" in hook.state_dict()
    assert hook.acted_at[:4] == [1, 2, 3, 4], "while nothing is known it acts at every step"
    assert all(step % period == 0 for step in hook.acted_at if step > 1000)
    late = [step for step in hook.acted_at if step > 1000]
    assert acting * len(late) <= 0.1 * (500 + period)


def test_slow_ones_are_seen_after_the_first_steps() -> None:
    hook = run(slow(40.0), 10)
    assert len(hook.acted_at) <= 8
    assert hook.period == 400


def test_what_the_first_steps_take_does_not_count() -> None:
    """Compilation, loaders that start, the first clip."""
    hook = run(slow(lambda step: 1000.0 if step <= 4 else 0.05), 200, lambda step: 1e6 if step <= 4 else 1.0)
    assert hook.period == 1


@pytest.mark.parametrize("at", range(5, 70, 3))
def test_a_hiccup_does_not_count(at: int) -> None:
    """Of the hook, or of the training: a validation or a checkpoint in between."""
    assert run(slow(lambda step: 500.0 if step == at else 0.25), 400).period == 3
    assert run(slow(0.25), 400, lambda step: 500.0 if step == at else 1.0).period == 3


@pytest.mark.parametrize("rest", [2, 5, 10, 16])
@pytest.mark.parametrize("first", range(5))
def test_weights_that_are_clipped_now_and_then_rest(rest: int, first: int) -> None:
    """Each clip takes two seconds and lasts for a while: a median of all steps would see none, and clips are the rarer for it."""
    hook, last = slow(0), -first

    def takes(step: int) -> float:
        nonlocal last
        if step - last < rest:
            return 0.01
        last = step
        return 2.0

    hook.takes = takes
    run(hook, 1000)
    before = CLOCK.now
    run(hook, 1000, start=False)
    assert "every" in hook.state_dict()
    assert (CLOCK.now - before) / 1000 - 1 <= 0.1 * 1.01


def test_steps_in_parts_and_weights_that_are_replaced_count_for_their_step() -> None:
    """Optimizers that step in the backward pass, and those around another: their parts are one step."""
    layer, hook = nn.Linear(3, 3), slow(0.2)
    other = nn.Parameter(torch.zeros(2))
    hook.start(layer)
    for _ in range(150):
        CLOCK.now += 0.6
        hook.after_step([layer.weight])
        CLOCK.now += 0.4
        hook.after_step([other])
    assert (hook.step, hook.period) == (150, 2)

    hook = slow(0.2)
    hook.start(layer)
    for _ in range(150):
        CLOCK.now += 1.0
        hook.after_step()
        hook.rewritten()
    assert (hook.step, hook.period) == (150, 4), "it acts twice a step"


def test_figures() -> None:
    assert Figures(training=1.0, acting=0.3).fits == 3
    assert Figures(training=0.0, acting=0.3).fits > 10**6
    assert Figures(training=0.0, acting=0.0).fits == 1


# -- what follows from it -----------------------------------------------------------------------------------------------------


def test_the_number_stands_in_repr_state_metrics_and_log(caplog: pytest.LogCaptureFixture) -> None:
    hook = sh.SpectralClip(1.0, every="auto", log=True)
    assert repr(hook) == hook.key == "SpectralClip(1.0, every='auto', log=True)"
    model = nn.Linear(3, 3)
    hook.start(model)
    assert "every" not in hook.state_dict()
    act, takes = hook.act, 0.65

    def slowly(*arguments) -> None:
        CLOCK.now += takes
        act(*arguments)

    hook.act = slowly
    with caplog.at_level(logging.INFO, logger="spectral_hooks"):
        run(hook, 300, start=False)
    assert repr(hook) == "SpectralClip(1.0, every='auto' (7), log=True)"
    assert hook.key == "SpectralClip(1.0, every='auto', log=True)", "checkpoints know it by its settings"
    assert hook.state_dict()["every"] == 7
    assert hook.metrics()["spectral_clip/every"] == 7
    assert [record.getMessage() for record in caplog.records] == [
        "SpectralClip(1.0, every='auto' (7), log=True): acting takes 0.65 s, a step of training 1 s."
    ]
    assert "spectral_clip/every" not in sh.SpectralClip(1.0, log=True).metrics()
    assert sh.SpectralClip(1.0, every=7).state_dict().keys() == {"step", "known"}


def test_a_resumed_run_takes_it_from_there() -> None:
    first = run(slow(0.65), 300)
    state = copy.deepcopy(first.state_dict())
    for hook in (slow(50.0), Slow("auto")):
        hook.load_state_dict(state)
        hook.acted_at.clear()
        run(hook, 20)
        assert hook.period == 7
        assert hook.acted_at == [301, 308, 315]
        assert repr(hook) == "Slow('auto' (7))"
    told = Slow(3)
    told.load_state_dict(state)
    assert told.period == 3
    # before the number was found there is none to take
    early = Slow("auto")
    early.load_state_dict(run(slow(0.65), 5).state_dict())
    assert (early.period, repr(early)) == (1, "Slow('auto')")


def test_a_run_that_starts_anew_looks_anew() -> None:
    hook = run(slow(0.65), 300)
    hook.takes = lambda step: 0.25
    run(hook, 300)
    assert hook.period == 3


def test_copies_carry_it() -> None:
    hook = run(slow(0.65), 300)
    hook.takes = None
    for twin in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert (twin.period, repr(twin)) == (7, "Slow('auto' (7))")
    early = run(slow(0.65), 10)
    early.takes = None
    assert repr(copy.deepcopy(early)) == repr(pickle.loads(pickle.dumps(early))) == "Slow('auto')"


def test_nothing_is_timed_or_waited_for_once_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """And while it is sought the clock is read at the edges of what the hook does, and the accelerators are waited for there."""
    reads = 0

    def reading(self: Pace) -> float:
        nonlocal reads
        reads += 1
        return self.clock()

    monkeypatch.setattr(Pace, "_now", reading)
    for every, most in (("auto", 2 * 60), (1, 2 * 17), (10, 2 * 35)):
        reads = 0
        hook = run(Slow(every), 100)
        assert 0 < reads <= most
        reads = 0
        run(hook, 100, start=False)
        assert reads == 0


def test_accelerators_are_waited_for_at_both_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    watch = Pace("auto", clock=CLOCK)
    devices = [torch.device(name) for name in ("cpu", "cuda:1", "meta", "cuda:1", "cuda:0")]
    watch.start(devices)
    watch.enter()
    assert waits == [devices[1], devices[4]]
    watch.leave(is_new=True)
    assert waits == [devices[1], devices[4]] * 2


# -- the warning --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4])
def test_one_warning_where_projections_take_longer_than_training(every: int, recwarn: pytest.WarningsRecorder) -> None:
    run(slow(every * 3.0, every), 200)
    (warning,) = recwarn
    text = str(warning.message)
    assert text.startswith(f"projections take longer than training: Slow({every}) takes 3 s a step, and training 1 s.")
    assert all(choice in text for choice in (f"every={every * 30}", 'every="auto"', "`slack=`", "`apply_spectral`"))


@pytest.mark.parametrize("every", ["auto", 1, 4])
def test_no_warning_where_they_do_not(every, recwarn: pytest.WarningsRecorder) -> None:
    run(slow(0.9 if every == 1 else 3.9, every), 200)
    run(slow(0.009, every), 200, lambda step: 1e-4)  # nobody minds
    run(slow(lambda step: 100.0 if step <= 4 else 0.5, every), 200)
    assert len(recwarn) == 0


def test_a_warning_waits_until_the_hook_has_taken_some_time_in_all(recwarn: pytest.WarningsRecorder) -> None:
    """A demonstration of a few seconds is not worth it. Nothing is timed any more until then."""
    hook = run(slow(0.05, 1), 380, lambda step: 0.02)
    assert len(recwarn) == 0
    CLOCK.now += 1e3
    hook.takes = lambda step: 0.0
    run(hook, 30, start=False)
    assert [str(each.message).count("takes 0.05 s a step, and training 0.02 s.") for each in recwarn] == [1]
    run(hook, 1000, start=False)
    assert len(recwarn) == 1


def test_the_tenth_is_that_of_the_documentation() -> None:
    assert pace.SHARE == 0.1
