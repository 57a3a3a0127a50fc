"""What each process that `test_parametrizations_distributed.py` starts does: it trains every parametrization in turn."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import shards_on_cpu
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import spectral_hooks as sh

try:
    from torch.distributed.fsdp import FSDPModule, fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import FSDPModule, fully_shard

make = sh.parametrizations
PROCESSES, STEPS = 2, 3
WAYS = ("replicas", "shards") if shards_on_cpu() else ("replicas",)
#: Samples of one update, over all processes.
BATCH = 6


def conv(padding_mode: str = "zeros") -> nn.Conv2d:
    return nn.Conv2d(3, 5, 3, padding=1, padding_mode=padding_mode)


#: Channels that two processes cannot share evenly.
KINDS: dict[str, Callable[[], nn.Module]] = {
    "orthogonal matrix": lambda: make.orthogonal(nn.Linear(7, 5)),
    "orthogonal matrix by qr": lambda: make.orthogonal(nn.Linear(5, 7), orthogonal_map="qr"),
    "orthogonal kernel": lambda: make.orthogonal(conv()),
    "orthogonal stem": lambda: make.orthogonal(nn.Conv2d(1, 5, 3, 2, padding=1), orthogonal_map="householder"),
    "skew": lambda: make.skew(conv()),
    "cayley": lambda: make.cayley(conv("circular")),
    "conv_norm": lambda: make.conv_norm(conv("circular")),
    "tensor_train": lambda: make.tensor_train(conv(), rank=(2, 3)),
    "group_shuffle": lambda: make.group_shuffle(nn.Linear(9, 9), blocks=3),
    "group_shuffle fine-tuning": lambda: make.group_shuffle(nn.Linear(7, 6), blocks=3, fine_tune=True),
    "rescaled": lambda: make.rescaled(conv(), 0.8),
    "clipped kernel": lambda: make.clipped(conv(), 0.8),
    "clipped matrix": lambda: make.clipped(nn.Linear(7, 5), 0.4),
    "banded": lambda: make.banded(nn.Linear(7, 5), 0.6, min_norm=0.5),
}


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return KINDS[name]()


def inputs(name: str, step: int) -> Tensor:
    """The samples of one update."""
    matrices = {"group_shuffle": (9,), "orthogonal matrix by qr": (5,), "orthogonal stem": (1, 6, 6)}
    kernel = name in ("orthogonal kernel", "skew", "cayley", "conv_norm", "tensor_train", "rescaled", "clipped kernel")
    shape = matrices.get(name, (3, 6, 6) if kernel else (7,))
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, name: str, rank: int = 0, processes: int = 1, parts: int = 1) -> None:
    """Some steps, every process on samples of its own, in so many parts, towards targets far from the start."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.5)
    for step in range(STEPS):
        x = inputs(name, step)[rank::processes]
        target = x.flatten(1).sum(1).reshape(-1, *[1] * (x.ndim - 1))
        optimizer.zero_grad()
        for part in range(parts):
            ((model(x[part::parts]) - target[part::parts]).square().mean() / parts).backward()
        optimizer.step()


def refusal(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def record(name: str, kind: str, rank: int) -> dict[str, Any]:
    """The whole state after training, what evaluation gives for inputs that all processes have, and what is refused."""
    if kind == "replicas":
        # all begin with the first one's parameters and buffers
        model: nn.Module = nn.parallel.DistributedDataParallel(made(name, seed=rank))
    else:
        model = made(name)
        fully_shard(model)
    train(model, name, rank, PROCESSES)
    model.eval()
    with torch.no_grad():
        # evaluation remembers what it computes
        outputs = [model(inputs(name, STEPS)) for _ in range(2)]
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    refused = []
    if isinstance(model, FSDPModule):
        refused.append(refusal(lambda: sh.remove_spectral(model)))
        model.unshard()
        refused.append(refusal(lambda: sh.remove_spectral(model)))
        model.reshard()
    again = model(inputs(name, STEPS)).detach()
    return {"state": state, "outputs": [*outputs, again], "refused": refused, "report": make.spectral_report(model)}


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    # one whose partner has died gets an error at the latest after that time
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
    )
    records: dict[Any, Any] = {(name, kind): record(name, kind, rank) for name in KINDS for kind in WAYS}
    layer, conv = nn.Linear(7, 5), nn.Conv2d(4, 4, 3, padding=1)
    fully_shard(layer)
    fully_shard(conv)
    makers = (lambda: make.orthogonal(layer), lambda: make.tensor_train(layer, 2), lambda: make.skew(conv))
    records["late"] = [refusal(maker) for maker in makers]
    records["still"] = type(layer.weight).__name__
    torch.save(records, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
