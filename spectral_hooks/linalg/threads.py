"""How many threads work on what is small."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

#: Up to this many rows or columns the work is many short calls, and one thread is as fast as two.
_ONE_THREAD = 128
_P = ParamSpec("_P")
_T = TypeVar("_T")


def calm(function: Callable[Concatenate[Tensor, _P], _T]) -> Callable[Concatenate[Tensor, _P], _T]:
    """Run on one thread for a small kernel, whatever torch's setting, which is as it was afterwards.

    A thousand calls of ten microseconds wait for each other a thousand times, and on a busy machine each time for the scheduler:
    seconds instead of 50 ms. The setting belongs to the calling thread, and takes a microsecond to change; only a thread that
    uses torch for the first time meanwhile takes it over.
    """

    @wraps(function)
    def on_one(kernel: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        threads = torch.get_num_threads()
        if threads == 1 or kernel.device.type != "cpu" or min(kernel.shape[1:3]) > _ONE_THREAD:
            return function(kernel, *args, **kwargs)
        torch.set_num_threads(1)
        try:
            return function(kernel, *args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return on_one
