"""Two processes over gloo on the CPU: replicas and shards agree with one process, whether the work is shared or not."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from datetime import timedelta
from functools import partial
from itertools import accumulate, cycle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import free_port, shards_on_cpu
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.hooks import base, pace
from spectral_hooks.hooks.pace import Pace

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

STEPS = 4


def network() -> nn.Module:
    """The last layer has fewer rows than there are processes, so one shard of it is empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3, 2), nn.Flatten(), nn.Linear(16, 7), nn.Linear(7, 1))


def train(model: nn.Module, hook: sh.SpectralClip) -> None:
    """The same batch everywhere, so that averaging gradients over processes changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with hook.attach(model, optimizer):
        for n in range(STEPS):
            images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(n))
            optimizer.zero_grad()
            (model(images) - 3).square().mean().backward()
            optimizer.step()


def whole(model: nn.Module) -> list[Tensor]:
    from torch.distributed.tensor import DTensor

    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def run(rank: int, port: int, kind: str, distribute: bool, projection: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = network()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                fully_shard(layer)
        fully_shard(model)
    train(model, sh.SpectralClip(0.8, distribute=distribute, projection=projection))
    weights = whole(model)
    torch.save(weights, Path(folder) / f"{rank}.pt")
    with torch.no_grad():
        next(iter(model.parameters())).mul_(float("nan"))
    # on every process, whoever owns the weight
    with pytest.raises(ValueError, match=r"0, after step 0.*NaN"):
        sh.SpectralClip(0.8, distribute=distribute, projection=projection).start(model)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "distribute", "projection"),
    [
        *(("ddp", True, each) for each in ("clip", "soft_cap")),
        *(("fsdp2", shares, "clip") for shares in (False, True)),
        ("fsdp2", False, "soft_cap"),
    ],
)
def test_two_processes_as_one(kind: str, distribute: bool, projection: str) -> None:
    if kind == "fsdp2" and not shards_on_cpu():
        pytest.skip("FSDP2 of torch 2.5 needs CUDA")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(free_port(), kind, distribute, projection, folder), nprocs=2)
        ours = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    alone = network()
    train(alone, sh.SpectralClip(0.8, projection=projection))
    for here, there, one in zip(*ours, whole(alone), strict=True):
        assert torch.equal(here, there)
        torch.testing.assert_close(here, one, rtol=1e-6, atol=1e-6)


def find_a_pace(rank: int, port: int, folder: str) -> None:
    """What acting takes differs between the processes, and the first one's is what counts."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    times = accumulate(cycle((1.0, (0.3, 40.0)[rank])))
    base.Pace, pace._SLOWEST_TRIED = partial(Pace, clock=lambda: next(times)), 1
    hook = sh.SpectralClip(1.0, every="auto")
    hook.start(nn.Linear(3, 3))
    for _ in range(10):
        hook.after_step()
    Path(folder, f"{rank}").write_text(repr(hook))
    dist.barrier()
    dist.destroy_process_group()


def test_all_processes_act_at_the_pace_that_the_first_has_found() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(find_a_pace, args=(free_port(), folder), nprocs=2)
        assert {Path(folder, f"{rank}").read_text() for rank in range(2)} == {"SpectralClip(1.0, every='auto' (3))"}


def run_until_one_dies(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=20))
    model, hook = network(), sh.SpectralClip(0.8, distribute=True)
    train(model, hook)
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    with torch.no_grad():
        model[0].weight.mul_(3)
    with pytest.raises((RuntimeError, ValueError)):
        hook.start(model)
    Path(folder, "waited").write_text(str(time.monotonic() - start))
    # leaving in an orderly way would wait for the other
    os._exit(0)


def test_a_process_that_dies_leaves_no_hang() -> None:
    """The other gets an error, at the latest after the timeout of its process group."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        port = free_port()
        processes = [context.Process(target=run_until_one_dies, args=(rank, port, folder)) for rank in (0, 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=90)
        assert [process.exitcode for process in processes] == [0, 3]
        assert float(Path(folder, "waited").read_text()) < 25


def test_sharing_alone_changes_nothing() -> None:
    """Without processes to share with."""
    model = network()
    other = copy.deepcopy(model)
    train(model, sh.SpectralClip(0.8))
    train(other, sh.SpectralClip(0.8, distribute=True))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def run_with_examples(rank: int, port: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = network()
    hook = sh.SpectralClip(0.8, distribute=True, example=torch.zeros(1, 3, 8, 8))
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
        # of other sizes along each axis: the larger count for all
        hook.example = lambda model: model[:3](torch.zeros(1, 3, 8 - 2 * rank, 6 + 2 * rank))
    else:
        from torch.distributed.fsdp import fully_shard

        hook.start(model)  # a sharded model cannot be copied
        for layer in (model[0], model[2], model[4], model[5], model):
            fully_shard(layer)
        with pytest.raises(ValueError, match=r"cannot be copied.*start the hook on the plain model before it is sharded"):
            sh.SpectralClip(0.8, example=torch.zeros(1, 3, 8, 8)).start(model)
    train(model, hook)
    torch.save((whole(model), hook.state_dict()["sizes"]), Path(folder) / f"{rank}.pt")
    hook.example = lambda model: model(torch.zeros(1, 3 + rank, 8, 8))
    if kind == "ddp":  # on every process, whoever has it
        with pytest.raises(ValueError, match=r"does not run through the model: layer 0 raised RuntimeError"):
            hook.start(model)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_examples_of_all_processes_count(kind: str) -> None:
    if kind == "fsdp2" and not shards_on_cpu():
        pytest.skip("FSDP2 of torch 2.5 needs CUDA")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_with_examples, args=(free_port(), kind, folder), nprocs=2)
        (here, sizes), (there, others) = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    assert sizes == others == {"0": ((8, 8),), "2": ((6, 6),)}
    alone = network()
    hook = sh.SpectralClip(0.8, example=torch.zeros(1, 3, 8, 8))
    if kind == "fsdp2":
        hook.start(alone)
    train(alone, hook)
    for a, b, one in zip(here, there, whole(alone), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, rtol=1e-6, atol=1e-6)
