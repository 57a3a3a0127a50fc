"""The room's public face: what it exports, and that all of it is called alike."""

from __future__ import annotations

import builtins
import inspect

import pytest

from spectral_hooks import parametrizations

LAYERS = [name for name in parametrizations.__all__ if name not in ("remove_spectral", "spectral_report")]


def test_dir_shows_what_is_public() -> None:
    assert dir(parametrizations) == sorted(parametrizations.__all__)
    assert all(inspect.isfunction(getattr(parametrizations, name)) for name in parametrizations.__all__)


@pytest.mark.parametrize("name", LAYERS)
def test_all_are_called_alike(name: str) -> None:
    parameters = inspect.signature(getattr(parametrizations, name)).parameters
    assert next(iter(parameters)) == "layer"
    assert not set(parameters) & set(dir(builtins)), "no parameter shadows a builtin"


@pytest.mark.parametrize("name", ["rescaled", "clipped", "banded", "orthogonal"])
def test_the_bound_comes_second(name: str) -> None:
    parameters = list(inspect.signature(getattr(parametrizations, name)).parameters.values())
    assert (parameters[1].name, parameters[1].default) == ("max_norm", 1.0)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[2:])
