"""Which names a pattern means."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

#: A glob on qualified names, a type of layer, or a predicate of `(name, layer)` or of the layer alone.
Pattern = str | type[nn.Module] | Callable[..., bool]
Patterns = Pattern | Iterable[Pattern] | None


def listed(patterns: Patterns) -> list[Pattern]:
    """The patterns as a list; a generator can be read only once."""
    if patterns is None:
        return []
    if isinstance(patterns, (str, type)) or callable(patterns):
        return [patterns]
    return list(patterns)


def check_patterns(argument: str, patterns: Patterns) -> list[Pattern] | None:
    """The patterns as a list, None for none; refuse what is no glob, type of layer or predicate."""
    if patterns is None:
        return None
    if not isinstance(patterns, (str, type, Iterable)) and not callable(patterns):
        raise TypeError(_no_pattern(argument, patterns))
    found = listed(patterns)
    for pattern in found:
        if not isinstance(pattern, (str, type)) and not callable(pattern):
            raise TypeError(_no_pattern(argument, pattern))
    return found


def _no_pattern(argument: str, pattern: object) -> str:
    return f"`{argument}` takes globs, layer types and predicates, or a list of them; got {pattern!r}."


def matcher(argument: str, patterns: Patterns, modules: dict[str, nn.Module]) -> Callable[[str], bool]:
    """The union of the patterns as a test of names."""
    chosen: set[str] = set()
    for pattern in listed(patterns):
        found = {name for name, module in modules.items() if matches(argument, pattern, name, module)}
        if not found and isinstance(pattern, str):
            close = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"the model has {', '.join(list(modules)[1:6])}, ..."
            raise ValueError(f"`{argument}` pattern {pattern!r} matches no layer; {hint}")
        chosen |= found
    return chosen.__contains__


def what_matches(argument: str, patterns: Patterns, modules: dict[str, nn.Module]) -> str | None:
    """What the patterns match, for an error."""
    if patterns is None:
        return None
    chosen = matcher(argument, patterns, modules)
    found = [f"{name or 'the model itself'} ({type(layer).__name__})" for name, layer in modules.items() if chosen(name)]
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return f"`{argument}` matches {', '.join(found[:4]) or 'nothing'}{more}"


def matches(argument: str, pattern: Pattern, name: str, module: nn.Module) -> bool:
    """Whether a pattern means this module; `argument` is what errors call it."""
    if isinstance(pattern, str):
        parts = name.split(".")
        return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if callable(pattern):
        takes_name = len(inspect.signature(pattern).parameters) > 1
        return bool(pattern(name, module) if takes_name else pattern(module))
    raise TypeError(_no_pattern(argument, pattern))
