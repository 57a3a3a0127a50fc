"""Every Python block of the README and of the pages of `docs` runs, each by itself, in order and from an empty folder."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What a block needs besides the core, by a word in it.
_NEEDS = {"integrations.lightning": "lightning"} | {f"import {name}": name for name in ("accelerate", "keras", "skorch", "timm")}
_NEEDS |= {"from transformers": "transformers", "from accelerate": "accelerate", "from ignite": "ignite"}


def _blocks(page: Path) -> list[tuple[Path, int, str]]:
    """Page, line number and source of each block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(page, text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def _promised(source: str) -> list[str]:
    """What is said to be printed: numbers and tuples of them in the comment behind a print."""
    return re.findall(r"^print\(.*\)  # ([\d(][\d.,() ]*)$", source, flags=re.MULTILINE)


def test_has_blocks() -> None:
    blocks = _blocks(PAGES[0])
    assert len(blocks) >= 5
    assert sum(len(_promised(source)) for *_, source in blocks) >= 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # what a trainer says about loaders and devices
@pytest.mark.parametrize(
    ("page", "line", "source"), [pytest.param(*block, id=f"{page.stem}{block[1]}") for page in PAGES for block in _blocks(page)]
)
def test_block_runs(
    page: Path, line: int, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, module in _NEEDS.items():
        # not by importing it: keras reads its backend from the environment when it is imported
        if word in source and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    # line numbers in a traceback are the page's
    exec(compile("\n" * (line - 1) + source, str(page), "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in _promised(source) if line not in printed] == []
    # nothing is left behind but what the block names
    assert {path.name for path in tmp_path.iterdir()} <= {"out"} & set(re.findall(r'"(\w+)"', source))
