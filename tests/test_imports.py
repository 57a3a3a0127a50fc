"""The house keeps its order: who may import what, read from the source of every file; and no file or function grows large."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

#: The rooms in the order of imports, those of one step side by side: each may import from earlier steps and from itself.
ORDER = (
    ("linalg",),
    ("tensors",),
    ("operators",),
    ("norms",),
    ("projections", "penalties"),
    ("parametrizations",),
    ("weights",),
    ("hooks", "optimizers", "networks"),
    ("diagnostics",),
    ("integrations",),
)
STEP = {room: step for step, rooms in enumerate(ORDER) for room in rooms}
#: The public face and the command line: they import what they show, and no room imports them, but the adapters.
FACE = ""

#: What the core may import besides torch, numpy and the standard library, in a `try`.
GUARDED = {("hooks/progress.py", "tqdm")}

LARGEST_FILE, LARGEST_FUNCTION = 350, 40


class Import(NamedTuple):
    """What one file takes from a module: a part of the path `spectral_hooks.<room>...`, or a module from elsewhere."""

    file: str
    module: tuple[str, ...]
    name: str | None  # None: the module itself
    bound: str  # the name that the file calls it by
    guarded: bool  # in a `try`

    @property
    def is_ours(self) -> bool:
        return self.module[0] == "spectral_hooks"

    @property
    def room(self) -> str:
        """Of ours: the room that it is taken from; `FACE` where it is none."""
        path = (*self.module, *([self.name] if self.name else []))
        return path[1] if len(path) > 1 and path[1] in STEP else FACE

    @property
    def private(self) -> str | None:
        """The private part of what is imported."""
        path = (*self.module[1:], *([self.name] if self.name else []))
        return next((part for part in path if is_private(part)), None)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def room_of(file: str) -> str:
    first = file.split("/")[0]
    return first if first in STEP else FACE


def imports(file: str, tree: ast.Module) -> Iterator[Import]:
    """Every import, wherever in the file: at its top, in functions, for types only."""
    guarded = {id(node) for attempt in ast.walk(tree) if isinstance(attempt, ast.Try) for node in ast.walk(attempt)}
    package = ("spectral_hooks", *file.split("/")[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, tuple(alias.name.split(".")), None, alias.asname or alias.name, id(node) in guarded)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield Import(file, module, alias.name, alias.asname or alias.name, id(node) in guarded)


def private_uses(file: str, tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """File, room and private name, where one is imported from a file of ours or read from what is: `gram._rows`, `Gram._rows`."""
    ours = {found.bound: found for found in imports(file, tree) if found.is_ours}
    yield from ((file, found.room, found.private) for found in ours.values() if found.private)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and isinstance(node.value, ast.Name)
            and node.value.id in ours
        ):
            yield file, ours[node.value.id].room, node.attr


def goes_up(found: Import) -> bool:
    """Whether ours, from another room that does not come before; the face is after all but the adapters."""
    here, there = room_of(found.file), found.room
    if not found.is_ours or here in (FACE, there):
        return False
    if there == FACE:
        return here != "integrations"
    return STEP[there] >= STEP[here]


def is_foreign(found: Import) -> bool:
    """Whether it is neither ours nor torch, numpy, the standard library, nor the framework that an adapter is named after."""
    top = found.module[0]
    allowed = {"spectral_hooks", "torch", "numpy", *sys.stdlib_module_names}
    if room_of(found.file) == "integrations":
        # and what torch itself asks for, since Python 3.10 lacks some of `typing`
        allowed |= {Path(found.file).stem.partition("_")[0], "typing_extensions"}
    return top not in allowed and not (found.guarded and (found.file, top) in GUARDED)


def sources() -> dict[str, str]:
    """Every file of the package, by its path in it."""
    folders = {"": ROOT / "spectral_hooks", "integrations/": ROOT / "integrations"}
    return {
        prefix + path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for prefix, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
    }


SOURCES = sources()
TREES = {file: ast.parse(source) for file, source in SOURCES.items()}
IMPORTS = [found for file, tree in TREES.items() for found in imports(file, tree)]
PRIVATE = [use for file, tree in TREES.items() for use in private_uses(file, tree)]


# -- who imports whom ---------------------------------------------------------------------------------------------------------


def test_every_folder_is_a_room() -> None:
    assert {file.split("/")[0] for file in SOURCES if "/" in file} <= STEP.keys()


def test_the_map_in_contributing_has_the_rooms_in_their_order() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"```\nspectral_hooks/\n(.*?)```", page, flags=re.DOTALL)
    assert tree is not None
    rooms = dict(re.findall(r"^    (\w+)/( \*)?", tree[1], flags=re.MULTILINE))
    assert [STEP[room] for room in rooms] == sorted(STEP[room] for room in rooms)
    assert rooms.keys() == STEP.keys() - {"integrations"}
    there = {file.split("/")[0] for file in SOURCES if "/" in file}
    assert {room for room, to_come in rooms.items() if not to_come} == there - {"integrations"}
    assert all((ROOT / folder).is_dir() for folder in re.findall(r"^(\w+)/", tree[1], flags=re.MULTILINE))


def test_nothing_imports_upwards() -> None:
    assert [found for found in IMPORTS if goes_up(found)] == []


def test_no_room_takes_a_private_name_of_another() -> None:
    assert [use for use in PRIVATE if use[1] != room_of(use[0])] == []


def test_files_of_a_room_share_no_private_names() -> None:
    assert {(file, name) for file, room, name in PRIVATE if room == room_of(file)} == set()


def test_the_core_is_written_with_torch_and_numpy_alone() -> None:
    """And each adapter with its framework."""
    assert [found for found in IMPORTS if is_foreign(found)] == []


@pytest.mark.parametrize(
    ("file", "source", "seen"),
    [
        ("linalg/gram.py", "from ..norms import lattice", "up"),
        ("linalg/gram.py", "def f():\n    from ..norms.lattice import lattice_norm", "up"),
        ("operators/conv.py", "from .. import norms", "up"),
        ("operators/conv.py", "from .. import spectral_norm", "up"),
        ("operators/conv.py", "import spectral_hooks", "up"),
        ("norms/bounds/tap_sum.py", "from ...projections.clip import clip", "up"),
        ("norms/bounds/tap_sum.py", "from ...operators.base import KernelOperator", ""),
        ("projections/clip.py", "from ..penalties import spectral", "up"),
        ("integrations/timm.py", "from spectral_hooks import hooks, as_operator", ""),
        ("__init__.py", "from .hooks import SpectralClip", ""),
        ("norms/lattice.py", "from ..linalg.gram import _rows", "private"),
        ("norms/lattice.py", "from ..linalg import gram\ngram._rows(2)", "private"),
        ("norms/lattice.py", "from .cells import _rows", ""),
        ("norms/lattice.py", "import scipy.linalg", "foreign"),
        ("norms/lattice.py", "import tqdm", "foreign"),
        ("hooks/progress.py", "import tqdm", "foreign"),
        ("hooks/progress.py", "try:\n    import tqdm\nexcept ImportError:\n    pass", ""),
        ("integrations/timm.py", "import timm", ""),
        ("integrations/timm.py", "import lightning", "foreign"),
        ("integrations/keras_mirror.py", "import keras", ""),
        ("hooks/clip.py", "import typing_extensions", "foreign"),
        ("norms/lattice.py", "import math, torch.nn, numpy as np", ""),
    ],
)
def test_what_breaks_the_order_is_seen(file: str, source: str, seen: str) -> None:
    tree = ast.parse(source)
    found = list(imports(file, tree))
    kinds = {
        "up": any(map(goes_up, found)),
        "private": any(room != room_of(file) for _, room, _ in private_uses(file, tree)),
        "foreign": any(map(is_foreign, found)),
    }
    assert {kind for kind, is_so in kinds.items() if is_so} == ({seen} if seen else set())


def test_tests_share_cases_and_observers_alone() -> None:
    """And the attacks their promises: no test module imports another."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    names = {file.stem for file in files if file.stem.startswith("test_") or file.stem == "conftest"}
    found = {
        (file.relative_to(ROOT).as_posix(), each.module[0])
        for file in files
        for each in imports(file.name, ast.parse(file.read_text(encoding="utf-8")))
        if each.module[:1] and each.module[0] in names
    }
    assert found == set()


# -- what is loaded -----------------------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """The name of a distribution, however it is spelled."""
    return name.lower().replace("_", "-")


def run(code: str, cwd: Path) -> list[str]:
    """The words that a fresh interpreter prints, which sees the installed package and not the checkout around it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_the_core_loads_no_framework(tmp_path: Path) -> None:
    """Not one of the packages that the extras install."""
    code = """
import pkgutil, sys
from importlib import import_module
import torch, numpy, torch.distributed.tensor, torch.nn.utils.parametrizations
before = set(sys.modules)
import spectral_hooks
for info in pkgutil.walk_packages(spectral_hooks.__path__, "spectral_hooks."):
    if "integrations" not in info.name and "__main__" not in info.name:
        import_module(info.name)
spectral_hooks.projections.clip(torch.nn.Linear(2, 2), 1.0)
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    loaded = set(run(code, tmp_path))
    assert "spectral_hooks" in loaded
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1].split("\n\n")[0]
    extras = {canonical(name) for name in re.findall(r'"([A-Za-z][\w-]*)>=', project)}
    frameworks = {top for top, packages in packages_distributions().items() if extras & set(map(canonical, packages))}
    # whose metadata do not tell, for Python 3.10
    frameworks |= {
        "lightning",
        "pytorch_lightning",
        "transformers",
        "accelerate",
        "timm",
        "keras",
        "matplotlib",
        "pandas",
        "peft",
    }
    assert frameworks >= {"sklearn", "pytest"}
    assert sorted(loaded & frameworks) == []


def test_integrations_is_no_top_level_name(tmp_path: Path) -> None:
    """The folder stands at the top of the repository, but is installed inside the package, and there alone."""
    code = "from importlib.util import find_spec as f; print(f('spectral_hooks.integrations') is None, f('integrations') is None)"
    assert run(code, tmp_path) == ["False", "True"]


# -- how large ----------------------------------------------------------------------------------------------------------------


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        text = function.body[0]
        lines -= (text.end_lineno or text.lineno) - text.lineno + 1
    return lines


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_no_file_is_large() -> None:
    assert {file for file, source in SOURCES.items() if len(source.splitlines()) > LARGEST_FILE} == set()


def test_no_function_is_long() -> None:
    long = {f"{file}: {each.name}" for file, tree in TREES.items() for each in functions(tree) if length(each) > LARGEST_FUNCTION}
    assert long == set()


def test_docstrings_are_not_counted() -> None:
    (function,) = functions(ast.parse('def f(\n    x,\n):\n    """One.\n\n    Two.\n    """\n    return x\n'))
    assert length(function) == 4
