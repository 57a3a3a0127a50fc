"""CONTRIBUTING.md is true: what it names is there, its examples run, and what it says of additions is enough."""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
SESSIONS = [block for block in BLOCKS if block.startswith(">>>")]
#: A file as a whole, or lines for a place in one: `# path`, `# path, beside the imports`, `# path, in NAME`.
HEADER = re.compile(r"^# ([\w/]+\.(?:py|toml))(?:, (beside the imports|in \w+))?\n", flags=re.MULTILINE)


def additions() -> list[tuple[str, str | None, str]]:
    """Path, place and lines of each, in the page's order."""
    found = []
    for block in BLOCKS:
        _, *parts = HEADER.split(block)
        found += [
            (path, place, text.strip() + "\n") for path, place, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        ]
    return found


def added(source: str, place: str, lines: str) -> str:
    """The file with the lines before its first import from the package, or at the head of the listing of this name."""
    if place == "beside the imports":
        where = re.search(r"^from \.", source, flags=re.MULTILINE)
        return source[: where.start()] + lines + source[where.start() :]
    name = place.removeprefix("in ")
    where = re.search(rf"^{name}\b[^=\n]* = [\[({{]", source, flags=re.MULTILINE)
    return source[: where.end()] + lines.strip() + " " + source[where.end() :]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which the page has been followed to the letter."""
    house = tmp_path_factory.mktemp("house")
    litter = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, house, ignore=litter, dirs_exist_ok=True)
    for path, place, lines in additions():
        file = house / path
        if place is None:
            file.parent.mkdir(exist_ok=True)
            assert not file.exists(), path
            file.write_text(lines, encoding="utf-8")
        else:
            file.write_text(added(file.read_text(encoding="utf-8"), place, lines), encoding="utf-8")
    return house


def run(house: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(house), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, *command], cwd=house, env=environment, capture_output=True, encoding="utf-8", timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def examined(session: str) -> int:
    """Failures of a session."""
    test = doctest.DocTestParser().get_doctest(session, {}, "CONTRIBUTING.md", "CONTRIBUTING.md", 0)
    return doctest.DocTestRunner(verbose=False).run(test).failed


# -- the page and the house -----------------------------------------------------------------------------------------------------


def test_files_that_are_named_exist() -> None:
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    named = set(re.findall(r"`((?:\w+/)+\w+\.\w+|[A-Z]+\.md|\.ci/run)`", prose))
    assert len(named) > 5
    for name in named:
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "spectral_hooks")), name


def test_the_worked_example_runs() -> None:
    first, *_ = SESSIONS
    assert examined(first) == 0


# -- the recipe -----------------------------------------------------------------------------------------------------------------


def test_one_of_each_kind_is_added() -> None:
    rows = [place for path, place, _ in additions() if path == "tests/cases.py"]
    assert rows == ["in BOUNDS", "in PROJECTIONS", "in PENALTIES"]


def test_names_resolve(house: Path) -> None:
    names = "sh.__file__, sh.bounds.tap_frobenius.__name__, sh.projections.named('shrink').__name__, sh.penalties.__all__"
    found = run(house, "-c", f"import spectral_hooks as sh; print({names})")
    assert found.split() == [str(house / "spectral_hooks" / "__init__.py"), "tap_frobenius", "shrink", "['tap_energy']"]


def test_the_session_at_its_end_runs(house: Path) -> None:
    (house / "session.txt").write_text(SESSIONS[-1], encoding="utf-8")
    code = "import doctest; found = doctest.testfile('session.txt', module_relative=False, encoding='utf-8'); print(*found)"
    assert run(house, "-c", code).split() == ["0", str(SESSIONS[-1].count(">>>"))]


def test_the_common_tests_accept_them(house: Path) -> None:
    """And see to the order of imports; the examples of the new functions run."""
    own = "tap_frobenius or shrink or tap_energy or penalty or has_a_row or named_after"
    order = "upwards or private or alone or folder or file_is or function_is"
    files = [f"tests/test_{name}.py" for name in ("rows", "imports", "docstrings")]
    passed = run(house, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", f"{own} or {order}", *files)
    for name in ("tap_frobenius", "shrink", "tap_energy"):
        assert re.search(rf"[\[.]{name}\] PASSED", passed)


def test_the_common_tests_refuse_a_bound_that_falls_below(house: Path) -> None:
    """What a row is worth: half of the bound is none."""
    file = house / "spectral_hooks/norms/bounds/tap_frobenius.py"
    right = file.read_text(encoding="utf-8")
    file.write_text(right.replace(".max()", ".max() / 2"), encoding="utf-8")
    try:
        with pytest.raises(AssertionError, match="test_a_bound_is_never_below_the_norm"):
            run(house, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "tap_frobenius and below", "tests/test_rows.py")
    finally:
        file.write_text(right, encoding="utf-8")
