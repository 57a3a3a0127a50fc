"""What is built and installed elsewhere is whole: every adapter, the types, the licence, and no package named `integrations`."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADAPTERS = sorted(path.stem for path in (ROOT / "integrations").glob("*.py") if path.stem != "__init__")
#: The framework that an adapter needs, where it is not called like the adapter.
_NEEDS = {"keras_mirror": "keras", "shared": "torch"}


def _run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy, so that the checkout stays as it is."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("built")
    litter = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=litter)
    out = folder / "dist"
    _run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", str(out), cwd=folder / "source")
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    _run(*pip, cwd=target)
    return target


def test_wheel_content(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"spectral_hooks"}
    assert "spectral_hooks/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    sources = {str(path.relative_to(ROOT).as_posix()) for path in (ROOT / "spectral_hooks").rglob("*.py")}
    sources |= {f"spectral_hooks/integrations/{path.name}" for path in (ROOT / "integrations").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources, "a subpackage is missing in pyproject.toml"


def test_sdist_content(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "pyproject.toml", "spectral_hooks/py.typed", "integrations/__init__.py"}
    wanted |= {f"integrations/{adapter}.py" for adapter in ADAPTERS}
    assert wanted <= names


def test_core_imports_no_framework(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, spectral_hooks; from pathlib import Path\n"
        f"assert Path(spectral_hooks.__file__).is_relative_to({str(installed)!r}), spectral_hooks.__file__\n"
        "frameworks = {'lightning', 'pytorch_lightning', 'transformers', 'timm', 'keras', 'matplotlib', 'pandas'}\n"
        "print(sorted(frameworks & set(sys.modules)))"
    )
    assert _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).strip() == "[]"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_imports_from_the_wheel(adapter: str, installed: Path, tmp_path: Path) -> None:
    framework = _NEEDS.get(adapter, adapter)
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    code = f"import spectral_hooks.integrations.{adapter} as adapter; print(adapter.__file__)"
    found = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed), KERAS_BACKEND="torch")
    found = found.strip().splitlines()[-1]
    assert Path(found) == installed / "spectral_hooks" / "integrations" / f"{adapter}.py"


def _versions(text: str) -> dict[str, str]:
    """The lower bound or the pin of each package."""
    return {name.lower().replace("_", "-"): version for name, version in re.findall(r"([A-Za-z][\w-]*)(?:>=|==)([\d.]+)", text)}


def test_the_oldest_environment_is_at_the_lower_bounds() -> None:
    """What `make test-oldest` installs is a release of each lower bound in pyproject.toml, and nothing is left out."""
    pins, bounds = (_versions((ROOT / name).read_text()) for name in ("tests/oldest.txt", "pyproject.toml"))
    assert {name: pin for name, pin in pins.items() if not f"{pin}.".startswith(f"{bounds.get(name, pin)}.")} == {}
    assert pins.keys() - {"torchvision"} == bounds.keys()
