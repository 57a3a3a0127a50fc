"""A progress bar for what turns out to take long."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TypeVar

from .share import is_first

try:
    from tqdm.auto import tqdm
except ModuleNotFoundError:
    tqdm = None

Item = TypeVar("Item")

#: Seconds of silence.
_DELAY = 2.0


def shown(items: Sequence[Item], description: str, wanted: bool = True) -> Iterable[Item]:
    """The items, with a bar once going through them has taken two seconds, if tqdm is installed.

    Only the first process of torch.distributed shows it. `TQDM_DISABLE=1`, or the logger `spectral_hooks` set above WARNING, turn
    it off; and the hook whose bar is not `wanted`, for it works in a framework that was told to show none.
    """
    wanted = wanted and bool(items) and logging.getLogger("spectral_hooks").isEnabledFor(logging.WARNING)
    if tqdm is None or not wanted or not is_first():
        return items
    return tqdm(items, desc=description, delay=_DELAY, leave=False)
