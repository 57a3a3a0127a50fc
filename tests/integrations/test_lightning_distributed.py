"""Lightning on two processes: the same weights on every rank, and those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning.pytorch")

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch is built without gloo, the process group for CPUs", allow_module_level=True)

import distributed_lightning
import observers
from cases import shards_on_cpu
from torch import nn

#: A batch split over two processes is summed in another order.
ROUNDING = 1e-6


def launch(kind: str, folder: Path) -> list[list[dict]]:
    """Run two processes and return what each recorded."""
    script = Path(distributed_lightning.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, kind, folder]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"steps-{rank}.pt") for rank in range(2)]


def norm_of(state: dict) -> float:
    module = distributed_lightning.Module()
    module.load_state_dict(state)
    return max(observers.lattice_norm(layer) for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))


def difference(a: dict, b: dict) -> float:
    assert list(a) == list(b)
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    return distributed_lightning.train("single", tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder and the records of a run of each kind, started when first asked for."""

    @cache
    def run(kind: str) -> tuple[Path, list[list[dict]]]:
        if kind == "fsdp" and not shards_on_cpu():
            pytest.skip("FSDP2 of torch 2.5 needs CUDA")
        folder = tmp_path_factory.mktemp(kind)
        return folder, launch(kind, folder)

    return run


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tensor"])
def test_two_processes_are_as_one(kind, alone, runs) -> None:
    """Data parallel, sharded (FSDP2) and tensor parallel: equal on both ranks, and to one process up to the order of sums."""
    folder, (first, second) = runs(kind)
    assert len(first) == len(second) == len(alone) == 9
    for step in range(9):
        assert difference(first[step], second[step]) == 0
        assert difference(first[step], alone[step]) <= ROUNDING
        assert norm_of(first[step]) <= 1 + 1e-6
    saved = torch.load(folder / "epoch=0.ckpt", weights_only=False)["state_dict"]
    assert norm_of(saved) <= 1 + 1e-6
    assert difference(saved, first[4]) == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tensor"])
def test_resumed_run_equals_an_uninterrupted_one(kind, runs) -> None:
    folder, (whole, _) = runs(kind)
    for rank in range(2):
        resumed = torch.load(folder / "resumed" / f"steps-{rank}.pt")
        assert [difference(a, b) for a, b in zip(resumed, whole[4:], strict=True)] == [0] * 5
