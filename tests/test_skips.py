"""A skip that `conftest.py` does not list fails the run where that is asked for, in one process and in several."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")

EXPECTED = "import pytest\n\n@pytest.mark.skipif(True, reason='FSDP2 of torch 2.5 needs CUDA')\ndef test_shards():\n    pass\n"
PASSES = "def test_passes():\n    pass\n"
UNEXPECTED = {
    "a test": "import pytest\n\ndef test_later():\n    pytest.skip('one day')\n",
    "a mark": "import pytest\n\n@pytest.mark.skip\ndef test_later():\n    pass\n",
    "a reason that only begins so": EXPECTED.replace("CUDA'", "CUDA, or so'"),
    "a file": "import pytest\n\npytest.importorskip('no_such_framework')\n\ndef test_it():\n    pass\n",
    "a broken framework": "import pytest\n\npytest.importorskip('broken')\n\ndef test_it():\n    pass\n",
}


def outcome(folder: Path, source: str, *options: str, strict: bool = True) -> subprocess.CompletedProcess[str]:
    shutil.copy(CONFTEST, folder)
    (folder / "test_passes.py").write_text(PASSES)
    (folder / "test_file.py").write_text(source)
    (folder / "broken.py").write_text("import no_such_library_of_the_framework\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "EXPECTED"))}
    if strict:
        environment["EXPECTED_SKIPS_ONLY"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(folder), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two processes"])
def test_expected_skips_pass(options: tuple[str, ...], tmp_path: Path) -> None:
    done = outcome(tmp_path, EXPECTED, *options)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout


@pytest.mark.parametrize("kind", UNEXPECTED)
def test_other_skips_fail(kind: str, tmp_path: Path) -> None:
    done = outcome(tmp_path, UNEXPECTED[kind])
    assert done.returncode == 1, done.stdout
    assert "skips that tests/conftest.py does not expect" in done.stdout
    assert "test_file.py" in done.stdout.split("does not expect")[1]


@pytest.mark.parametrize("kind", ["a test", "a file"])
def test_other_skips_fail_in_several_processes(kind: str, tmp_path: Path) -> None:
    done = outcome(tmp_path, UNEXPECTED[kind], "-n", "2")
    assert done.returncode == 1, done.stdout
    assert "test_file.py" in done.stdout.split("does not expect")[1]


def test_where_nothing_is_asked_for_skips_pass(tmp_path: Path) -> None:
    done = outcome(tmp_path, UNEXPECTED["a test"], strict=False)
    assert done.returncode == 0, done.stdout
