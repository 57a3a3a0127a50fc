"""The examples run, without a network, in a small setting."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def shape(line: str) -> list[str]:
    """The words of a line, every digit before a point as one zero and every one behind it as another."""
    return re.sub(r"\d+(\.\d+)?", lambda number: "0" + re.sub(r"\d", "0", number[1] or ""), line).split()


def test_quickstart(tmp_path: Path) -> None:
    for module in ("lightning", "matplotlib", "sklearn"):
        pytest.importorskip(module)
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--epochs", "1", "--quick", "--picture", "values.png"]
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path / "matplotlib"), "PYTHONIOENCODING": "utf-8"}
    environment["PYTHONWARNINGS"] = "ignore:projections take longer than training"  # a matter of the machine
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

    shown = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- demo -->")[1].split("```")[1].strip().splitlines()
    printed = [shape(line) for line in done.stdout.splitlines()]
    assert len(shown) == 4
    assert [line for line in shown if shape(line) not in printed] == [], "the README shows another table"

    assert (tmp_path / "values.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} <= {"values.png", "matplotlib"}, "nothing else is left behind"
