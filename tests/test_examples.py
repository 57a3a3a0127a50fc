"""The examples run, without a network, in a small setting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_quickstart(tmp_path: Path) -> None:
    for module in ("lightning", "matplotlib", "sklearn"):
        pytest.importorskip(module)
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--epochs", "1", "--quick", "--picture", "values.png"]
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path / "matplotlib"), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr

    plain, clipped = (
        next(line for line in done.stdout.splitlines() if line.startswith(name) and "%" in line).split()
        for name in ("plain", "SpectralClip(1.0)")
    )
    accuracy, start, end, *_ = clipped[1:]
    assert 0 <= float(accuracy.rstrip("%")) <= 100
    assert start == plain[2], "both start from the same weights"
    assert float(start) > 1
    assert float(plain[3]) > 1
    assert end == "1.000"

    assert (tmp_path / "values.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} <= {"values.png", "matplotlib"}, "nothing else is left behind"
