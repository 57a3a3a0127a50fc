"""The core imports no framework."""

from __future__ import annotations

import subprocess
import sys

FRAMEWORKS = ("lightning", "pytorch_lightning", "transformers", "accelerate", "timm", "keras", "sklearn", "matplotlib", "pandas")


def test_the_core_imports_no_framework() -> None:
    code = f"""
import sys
import torch
before = set(sys.modules)
import spectral_hooks, spectral_hooks.hooks, spectral_hooks.weights.selection, spectral_hooks.weights.writing
op = spectral_hooks.as_operator(torch.nn.Linear(2, 2))
spectral_hooks.projections.clip(op, 1.0)
print(*sorted(name for name in set(sys.modules) - before if name.partition('.')[0] in {FRAMEWORKS!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_integrations_is_no_top_level_name() -> None:
    """The folder stands at the top of the repository, but is installed inside the package."""
    code = "import importlib.util as u; print(u.find_spec('spectral_hooks.integrations') is not None)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"
