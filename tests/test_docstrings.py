"""The examples in the docstrings run and print what they say, and public functions have one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import spectral_hooks as sh

CORE = sorted(
    info.name
    for info in pkgutil.walk_packages(sh.__path__, "spectral_hooks.")
    if not info.name.startswith("spectral_hooks.integrations") and not info.name.endswith("__main__")
)

#: Modules whose `__all__` lists what users call.
PUBLIC: list[ModuleType] = [sh, sh.bounds, sh.projections, sh.parametrizations]
#: Those without such a list: what they define is public.
DEFINING: list[ModuleType] = [sh.estimates, sh.initializers]


def public_functions() -> dict[str, object]:
    """By their names in the library."""
    found = {f"{module.__name__}.{name}": getattr(module, name) for module in PUBLIC for name in module.__all__}
    for module in DEFINING:
        own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        found |= {f"{module.__name__}.{name}": value for name, value in own.items() if not name.startswith("_")}
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


@pytest.mark.parametrize("name", ["spectral_hooks", *CORE])
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), raise_on_error=False).failed == 0


@pytest.mark.parametrize("name", public_functions())
def test_public_functions_come_with_an_example(name: str) -> None:
    assert doctest.DocTestFinder(recurse=False).find(public_functions()[name])[0].examples


def test_public_functions_are_found() -> None:
    assert public_functions().keys() >= {"spectral_hooks.spectral_norm", "spectral_hooks.projections.clip"}
    assert "spectral_hooks.norms.estimates.power_iteration" in public_functions()


def test_examples_of_lightning() -> None:
    pytest.importorskip("lightning")
    result = doctest.testmod(importlib.import_module("spectral_hooks.integrations.lightning"))
    assert result.failed == 0
    assert result.attempted > 0


def test_the_class_of_hooks_comes_with_an_example() -> None:
    assert doctest.DocTestFinder(recurse=False).find(sh.SpectralClip)[0].examples
