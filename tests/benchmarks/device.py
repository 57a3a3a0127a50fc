"""What the library takes on an accelerator, in one table: time, torch operations, and how often the host waits.

    python tests/benchmarks/device.py [--device cuda] [--repeats 5] [--model resnet50]
    python tests/benchmarks/device.py --device cpu --small     # tries the command where there is no accelerator

Matrices of 1024², 4096² and 4096×16384, alone and 24 together (of the largest shape only one), and a network of timm's, with
float32 and bfloat16 weights. "at the bound": every singular value at it, and the weight has moved by 1e-3 of its norm; "inside":
the same at a hundredth of the bound. Times are on the clock, the device waited for before and after: the median, and the longest,
for weights are clipped at one step and rest at others. What the host waits for is counted by torch's profiler, in one call more:
synchronizing calls of the CUDA runtime, or, where there are none to count, readings of single values.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import spectral_hooks as sh
from spectral_hooks.norms import at_most

LARGE, SMALL = [(1024, 1024), (4096, 4096), (4096, 16384)], [(64, 64), (96, 96), (64, 256)]
MANY, MOVE = 24, 1e-3
#: Calls in which the host waits for the device.
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
#: Readings of one value, of which those of a CUDA device are among these calls too.
READS = {"aten::_local_scalar_dense"}


class Cost(NamedTuple):
    """Of one call: the median and the longest time, and what was counted in one more."""

    seconds: float
    longest: float
    operations: int
    waits: int


def settled(device: torch.device) -> float:
    """The time, when the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def counted(function: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Torch operations, those inside others not counted, and waits of the host."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    settled(device)
    with profile(activities=activities) as found:
        function()
    events = found.events() or []
    waits, reads = (sum(event.name in names for event in events) for names in (WAITS, READS))
    operations = sum(is_operation(event) and not is_operation(event.cpu_parent) for event in events)
    return operations, max(waits, reads)


def is_operation(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def cost(prepare: Callable[[], object], function: Callable[[], object], device: torch.device, repeats: int) -> Cost:
    """The median of some calls after one that is not counted; each is prepared for outside of what is measured."""
    times = []
    for n in range(repeats + 1):
        prepare()
        start = settled(device)
        function()
        seconds = settled(device) - start
        if n:
            times.append(seconds)
    _, own = counted(lambda: None, device)  # the profiler waits too
    prepare()
    operations, waits = counted(function, device)
    return Cost(statistics.median(times), max(times), operations, max(waits - own, 0))


def at_the_bound(shape: tuple[int, int], count: int, dtype: torch.dtype, device: torch.device) -> nn.ModuleList:
    """Linear layers of which every singular value is 1."""
    torch.manual_seed(0)
    made = nn.ModuleList()
    for _ in range(count):
        layer = nn.Linear(shape[1], shape[0], bias=False, device=device)
        nn.init.orthogonal_(layer.weight)
        made.append(layer.to(dtype))
    return made


@torch.no_grad()
def move_(layers: nn.Module, size: float = MOVE) -> None:
    """Every weight by this part of its Frobenius norm, at random."""
    for layer in layers.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            move = torch.randn_like(layer.weight)
            layer.weight += size * layer.weight.norm() / move.norm() * move


@torch.no_grad()
def textbook(weight: Tensor) -> Tensor:
    """The clip by a singular value decomposition."""
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return ((u * s.clamp(max=1)) @ vh).to(weight)


def hooked(layers: nn.Module, name: str, **settings: object) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Attaching to layers that are outside, and a step after that."""
    hook = sh.SpectralClip(**settings)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)
    outside = [p.detach() * 1.5 for p in layers.parameters()]

    def attach() -> None:
        hook.attach(layers, optimizer).remove()

    def restore() -> None:
        with torch.no_grad():
            for p, value in zip(layers.parameters(), outside, strict=True):
                p.copy_(value)

    yield f"attach from 1.5 times that, {name}", restore, attach
    hook.attach(layers, optimizer)
    yield f"step, {name}", partial(move_, layers), optimizer.step
    hook.handle.remove()  # type: ignore[union-attr]


def matrix_rows(shape: tuple[int, int], count: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple]:
    """What is done to matrices: its name, what prepares for it, and the call."""
    layers = at_the_bound(shape, count, dtype, device)
    if count == 1:
        op = sh.as_operator(layers[0])
        x = torch.randn(4096, shape[1], device=device, dtype=dtype)

        def nothing() -> None:
            pass

        yield "forward and backward, 4096 tokens", nothing, lambda: layers[0](x).square().mean().backward()
        layers.zero_grad()
        yield "textbook clip (SVD)", partial(move_, layers), lambda: textbook(layers[0].weight)
        yield "projections.clip", nothing, lambda: sh.projections.clip(op, 1.0)
        yield "projections.soft_cap", nothing, lambda: sh.projections.soft_cap(op, 1.0)
        yield "proof: at_most", nothing, lambda: at_most(op, 1.2)
        yield "spectral_norm", nothing, lambda: sh.spectral_norm(op)
    yield from hooked(at_the_bound(shape, count, dtype, device), "at the bound", max_norm=1.0)
    yield from hooked(at_the_bound(shape, count, dtype, device), "at the bound, slack=0", max_norm=1.0, slack=0)
    yield from hooked(at_the_bound(shape, count, dtype, device), "soft_cap", max_norm=1.0, projection="soft_cap")
    yield from hooked(at_the_bound(shape, count, dtype, device), "inside", max_norm=100.0)


def network_rows(name: str, small: bool, dtype: torch.dtype, device: torch.device) -> Iterator[tuple]:
    """The same of a network, and its training step without the hook."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(device, dtype)
    images = torch.randn(2 if small else 64, *model.default_cfg["input_size"], device=device, dtype=dtype)
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()

    yield "training step, plain", lambda: None, train
    hook = sh.SpectralClip(1.0)
    yield "attach", lambda: move_(model, 0.1), lambda: hook.attach(model, optimizer).remove()
    hook.attach(model, optimizer)
    yield "training step, every=1", lambda: None, train
    yield "projection alone, moved by 1e-3", partial(move_, model), hook.after_step


def show(what: str, shape: str, dtype: torch.dtype, found: Cost | str) -> None:
    name = str(dtype).removeprefix("torch.")
    if isinstance(found, Cost):
        times = f"{1e3 * found.seconds:.2f} | {1e3 * found.longest:.2f}"
        print(f"| {what} | {shape} | {name} | {times} | {found.operations} | {found.waits} |", flush=True)
    else:
        print(f"| {what} | {shape} | {name} | {found} | | | |", flush=True)


def rows(chosen: argparse.Namespace) -> Iterator[tuple[str, torch.dtype, Iterator[tuple]]]:
    """Every shape in every dtype."""
    device = torch.device(chosen.device)
    shapes = SMALL if chosen.small else LARGE
    many = 3 if chosen.small else MANY
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            for count in (1, many) if shape != shapes[-1] else (1,):
                label = f"{shape[0]}×{shape[1]}" + (f", {count} of them" if count > 1 else "")
                yield label, dtype, matrix_rows(shape, count, dtype, device)
        yield chosen.model, dtype, network_rows(chosen.model, chosen.small, dtype, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes and a small network: to try the command itself")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="of timm's; resnet50, or test_vit with --small")
    chosen = parser.parse_args()
    chosen.model = chosen.model or ("test_vit" if chosen.small else "resnet50")
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing is measured. To try the command: --device cpu --small")
        return
    where = torch.cuda.get_device_name(chosen.device) if chosen.device.startswith("cuda") else chosen.device
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {where}, medians of {chosen.repeats}\n")
    print("| what | shape | weights | ms | longest | torch operations | waits of the host |\n|---|---|---|---|---|---|---|")
    for label, dtype, parts in rows(chosen):
        for what, prepare, function in parts:
            try:
                found: Cost | str = cost(prepare, function, torch.device(chosen.device), chosen.repeats)
            except (NotImplementedError, RuntimeError) as error:  # a row that fails leaves the others
                found = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
            show(what, label, dtype, found)


if __name__ == "__main__":
    main()
