"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import spectral_hooks

CORE = sorted(
    info.name
    for info in pkgutil.walk_packages(spectral_hooks.__path__, "spectral_hooks.")
    if not info.name.startswith("spectral_hooks.integrations")
)

#: Modules whose public functions must come with an example.
WITH_EXAMPLES = {
    "spectral_hooks.operators.conv",
    "spectral_hooks.operators.dense",
    "spectral_hooks.operators.layers",
    "spectral_hooks.norms.spectral_norm",
    "spectral_hooks.norms.singular_values",
    "spectral_hooks.norms.asymptotic",
    "spectral_hooks.norms.padding",
    "spectral_hooks.norms.quick",
    "spectral_hooks.norms.estimates",
    "spectral_hooks.norms.bounds.absolute_sum",
    "spectral_hooks.norms.bounds.cosine_grid",
    "spectral_hooks.norms.bounds.frobenius_grid",
    "spectral_hooks.norms.bounds.gram_iteration",
    "spectral_hooks.norms.bounds.kernel_gram",
    "spectral_hooks.norms.bounds.tap_sum",
    "spectral_hooks.norms.bounds.unfolding",
    "spectral_hooks.projections.band",
    "spectral_hooks.projections.clip",
    "spectral_hooks.projections.clipped_decay",
    "spectral_hooks.projections.hammer",
    "spectral_hooks.projections.low_rank",
    "spectral_hooks.projections.parseval",
    "spectral_hooks.projections.rescale",
    "spectral_hooks.projections.soft_cap",
    "spectral_hooks.parametrizations.cayley",
    "spectral_hooks.parametrizations.clipped",
    "spectral_hooks.parametrizations.conv_norm",
    "spectral_hooks.parametrizations.group_shuffle",
    "spectral_hooks.parametrizations.orthogonal",
    "spectral_hooks.parametrizations.remove",
    "spectral_hooks.parametrizations.rescaled",
    "spectral_hooks.parametrizations.skew",
    "spectral_hooks.parametrizations.tensor_train",
    "spectral_hooks.weights.initializers",
    "spectral_hooks.hooks.clip",
}


@pytest.mark.parametrize("name", ["spectral_hooks", *CORE])
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert result.failed == 0
    assert result.attempted > 0 or name not in WITH_EXAMPLES


def test_examples_of_lightning() -> None:
    pytest.importorskip("lightning")
    result = doctest.testmod(importlib.import_module("spectral_hooks.integrations.lightning"))
    assert result.failed == 0
    assert result.attempted > 0


def test_the_modules_are_found() -> None:
    assert set(CORE) >= WITH_EXAMPLES
