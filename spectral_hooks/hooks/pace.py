"""Every how many steps a hook acts, and what its acting costs: read from a clock over the first steps, and never again.

What is measured is wall time. A step's training is all that goes by between where the hook has left off and where it is called
again, so loading data counts; its acting is what goes by within the hook. At both edges the host waits for the accelerators of
the weights, or the work that is still queued would count for the wrong side. After the last look nothing is timed nor waited for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from math import ceil, inf
from statistics import median
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch

from ..operators.base import is_whole

#: The setting `every` by which a hook finds out itself every how many steps to act.
AUTO = "auto"
#: Of the time of training, how much a hook with that setting takes at most.
SHARE = 0.1

#: What the first steps take says little: compilation, loaders that start, a first clip from far outside.
_WARM_UP = 3
#: Medians are taken over so many blocks: of their acting, and of all their steps' training. A single hiccup counts for nothing.
_BLOCKS = 3
#: Steps of a block, look by look. Slow hooks are seen by the first; the second covers those that clip now and rest for long.
_QUICK, _LONG, _TOLD = 1, 16, 4
#: A pace beyond which it is not tried out whether it is slow enough: that would take some hundreds of steps.
_SLOWEST_TRIED = 100
#: Seconds a step, and in all, below which nobody minds that a hook takes longer than training: a demonstration is soon over.
_WORTH_A_WARNING, _FELT = 0.01, 20.0


class Figures(NamedTuple):
    """Seconds: of the training of one step, and of a hook's acting once."""

    training: float
    acting: float

    @property
    def fits(self) -> int:
        """The smallest number of steps between two actions for which these take at most `SHARE` of the training."""
        if self.acting <= 0:
            return 1
        steps = self.acting / (SHARE * self.training) if self.training > 0 else inf
        return max(ceil(min(steps, 1e9) * (1 - 1e-9)), 1)  # what fits but for rounding fits

    def is_slow(self, period: int) -> bool:
        """Whether acting once in so many steps takes longer than their training, and long enough for anybody to mind."""
        return self.acting / period > max(self.training, _WORTH_A_WARNING)


class Pace:
    """The stopwatch for the first steps, and the number of steps between two actions that it leads to.

    Args:
        every: the setting: a number, or "auto".
        clock: seconds, from anywhere.

    Attributes:
        period: the number now; of "auto" the one that is tried.
    """

    def __init__(self, every: int | str, clock: Callable[[], float] = perf_counter) -> None:
        self.every, self.clock = every, clock
        self.period = 1 if every == AUTO else int(every)
        self._looks = [_QUICK, _LONG] if every == AUTO else [_TOLD]
        self.start(())

    def start(self, devices: Iterable[torch.device]) -> None:
        """Training begins, with weights on these devices."""
        self._devices = [device for device in dict.fromkeys(devices) if device.type not in ("cpu", "meta")]
        self._entered = 0.0
        self._left: float | None = None
        self._seen = self._skipped = 0
        #: What has been found to be slow, and has not yet taken long enough in all to be told.
        self._slow: Figures | None = None
        #: Training and acting of each step since the last look; the last may not have ended.
        self._steps: list[list[float]] = []

    def enter(self) -> None:
        """The hook is called."""
        self._entered = self._now() if self._slow is None else 0.0

    def leave(self, *, is_new: bool) -> Figures | None:
        """The hook has done what it was called for.

        Args:
            is_new: whether it was called for a step; else for more of the last one.

        Returns:
            What it takes, when enough steps are seen for a look: give it to `look`. Of a hook that is slow with the number that
            was asked for, once that has cost some time.
        """
        self._seen += is_new
        if self._slow is not None:
            return self._told(self._slow)
        now, before = self._now(), self._left
        self._left = now
        if before is None:
            return None
        passed = [self._entered - before, now - self._entered]
        if is_new and self._skipped < _WARM_UP:
            self._skipped += 1
        elif is_new:
            self._steps.append(passed)
        elif self._steps:
            self._steps[-1] = [old + new for old, new in zip(self._steps[-1], passed, strict=True)]
        figures = self._figures() if is_new else None
        return figures if figures is None or self.every == AUTO else self._told(figures)

    def look(self, fits: int) -> bool:
        """Look at what fits, a number of steps on which all processes have agreed: try that, or go on to the next look.

        Returns:
            Whether that was the last look.
        """
        self._steps.clear()
        if self.every != AUTO or fits <= self.period:
            self._looks.pop(0)
        else:
            self.period = fits
            if fits > _SLOWEST_TRIED:
                self._looks.clear()
        return not self._looks

    def _told(self, figures: Figures) -> Figures | None:
        """The figures, unless they are worth a warning that is too early."""
        is_early = figures.is_slow(self.period) and figures.acting / self.period * self._seen < _FELT
        self._slow = figures if is_early else None
        return None if is_early else figures

    def _figures(self) -> Figures | None:
        """By whole blocks of ended steps, each of whole periods; None if there are too few."""
        periods = ceil(self._looks[0] / self.period)
        size, ended = periods * self.period, self._steps[:-1]
        if len(ended) < _BLOCKS * size:
            return None
        blocks = [ended[start : start + size] for start in range(0, _BLOCKS * size, size)]
        acting = median(sum(acting for _, acting in block) for block in blocks)
        return Figures(median(training for block in blocks for training, _ in block), acting / periods)

    def _now(self) -> float:
        for device in self._devices:
            wait: Any = getattr(getattr(torch, device.type, None), "synchronize", None)
            if wait is not None:
                wait() if device.type == "mps" else wait(device)
        return self.clock()


def warn_of_cost(hook: object, figures: Figures, period: int) -> None:
    """Say once what a hook takes, if that is more than training, and what can be done."""
    if not figures.is_slow(period):
        return
    acting = figures.acting / period
    warnings.warn(
        f"projections take longer than training: {hook!r} takes {acting:.3g} s a step, and training {figures.training:.3g} s. "
        f'With every="auto", or every={figures.fits}, they take a tenth of it, and between them weights may exceed the bound; '
        "more `slack=` lets weights rest between clips; `apply_spectral` (spectral_hooks.integrations.timm) constrains layers by "
        "construction instead.",
        stacklevel=2,
    )


def check_every(every: int | Literal["auto"]) -> int | str:
    """The setting, refused if it is neither a positive integer nor "auto"."""
    if isinstance(every, str) and every == AUTO:
        return every
    if not is_whole(every) or every < 1:
        raise ValueError(f"`every` must be a positive int or 'auto'; got {every!r}.")
    return int(every)
