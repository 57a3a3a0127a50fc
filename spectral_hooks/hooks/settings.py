"""How a hook shows its settings: the same text in every process, for checkpoints know a hook by it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any

from ..operators.base import is_number, is_whole


def changed(thing: Any, shown: Any) -> Iterator[str]:
    """The arguments of a constructor as a thing has them in attributes of the same names: those by position, and all changed.

    Args:
        thing: what was constructed.
        shown: of a name and a value, how that value is shown; a changed one is shown otherwise than the default.
    """
    for name, parameter in signature(type(thing)).parameters.items():
        value = shown(name, getattr(thing, name))
        if parameter.kind is not Parameter.KEYWORD_ONLY:
            yield value
        elif value != shown(name, parameter.default):
            yield f"{name}={value}"


def text(value: Any) -> str:
    """Like `repr`, without addresses: functions and classes by where they are imported from."""
    if isinstance(value, list):
        return f"[{', '.join(map(text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{text(key)}: {text(each)}' for key, each in value.items())}}}"
    if isinstance(value, partial):
        positions = "".join(f", {text(each)}" for each in value.args)
        options = "".join(f", {name}={text(each)}" for name, each in value.keywords.items())
        return f"partial({text(value.func)}{positions}{options})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{_home(value)}.{value.__qualname__}"
    if getattr(type(value), "__repr__", None) is object.__repr__:
        return f"{_home(type(value))}.{type(value).__qualname__}(...)"
    if is_whole(value):
        return repr(int(value))
    return repr(float(value)) if is_number(value) else repr(value)


def _home(value: Any) -> str:
    """The outermost module that has it: in which file of a package something stands may change."""
    parts = value.__module__.split(".")
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((name for name in modules if vars(sys.modules.get(name, sys)).get(value.__qualname__) is value), modules[-1])
