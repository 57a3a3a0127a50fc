"""Tensor-train and group-shuffle layers: forward and backward against the plain layer, and singular values from the core.

    OMP_NUM_THREADS=1 python tests/benchmarks/tensor_train.py [--quick]

Each ratio compares medians of calls that take turns within this run, on one thread, in float32; of processor time. Machines
differ, so the ratios are what counts.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.parametrizations import remove_spectral
from spectral_hooks.parametrizations.group_shuffle import group_shuffle
from spectral_hooks.parametrizations.tensor_train import tensor_train


def in_turn(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time of each function: on a shared machine the clock on the wall counts others too."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 2):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if i > 1:
                times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(several) for name, several in times.items()}


def training_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward, to the input too, as in the middle of a network."""
    x = x.clone().requires_grad_()
    upstream = torch.randn_like(layer(x))

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(upstream)

    return run


def show(title: str, times: dict[str, float]) -> None:
    base = next(iter(times.values()))
    print(f"\n{title}")
    for name, ms in times.items():
        print(f"  {name:44s} {ms:9.2f} ms {ms / base:7.3f} x  ({base / ms:.2f} times as fast)", flush=True)


def tensor_trains(repeats: int) -> None:
    for channels, size in ((64, 32), (256, 16)):
        torch.manual_seed(0)
        layer = nn.Conv2d(channels, channels, 3, padding=1)
        train = tensor_train(layer, channels // 2)
        name = f"{channels} channels, 3×3, {size}×{size}"
        for batch, layout in ((32, torch.contiguous_format), (32, torch.channels_last)):
            x = torch.randn(batch, channels, size, size).to(memory_format=layout)
            steps = {"plain": training_step(layer, x), f"tensor train, r = {channels // 2}": training_step(train, x)}
            suffix = ", channels last" if layout is torch.channels_last else ""
            show(f"forward + backward, {name}, batch {batch}{suffix}", in_turn(steps, repeats))
        full, core = (sh.as_operator(one, size).circular(size) for one in (train.to_plain(), train))
        with torch.no_grad():
            values = {
                "NumPy FFT + SVD": lambda op=full, size=size: numpy_values(op.weight.numpy(), size),
                "plain": lambda op=full: sh.singular_values(op),
                "core": lambda op=core: sh.singular_values(op),
            }
            norms = {"plain": lambda op=full: sh.spectral_norm(op), "core": lambda op=core: sh.spectral_norm(op)}
            show(f"all singular values, circular, {name}", in_turn(values, 3))
            show(f"spectral norm, circular, {name}", in_turn(norms, 3))
            # float64, so that only the weights and frames as they are stored count
            a, b = (sh.singular_values(op.with_weight(op.weight.double())) for op in (full, core))
        print(f"  largest difference, relative to the norm: {float((a[: len(b)] - b).abs().max() / a[0]):.1e}")


def numpy_values(kernel: np.ndarray, size: int) -> np.ndarray:
    """All singular values of the circular layer (Sedghi, Gupta, Long 2019)."""
    return np.linalg.svd(np.moveaxis(np.fft.fft2(kernel, (size, size)), (2, 3), (0, 1)), compute_uv=False)


def frames(steps: int = 200) -> None:
    torch.manual_seed(0)
    train = tensor_train(nn.Conv2d(64, 64, 3, padding=1), 32)
    optimizer = torch.optim.Adam(train.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 64, 8, 8)
        (train(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
    errors = [float((q.mT @ q - torch.eye(q.shape[-1])).abs().max()) for q in (train.in_frame.detach(), train.out_frame.detach())]
    print(f"\nframes after {steps} steps of Adam without a penalty: max |QᵀQ - I| = {max(errors):.1e}")


def group_shuffles(repeats: int) -> None:
    for n, blocks, batch in ((512, 16, 32), (512, 16, 256), (512, 16, 2048)):
        torch.manual_seed(0)
        x = torch.randn(batch, n)
        orthogonal = group_shuffle(nn.Linear(n, n), blocks=blocks)
        tuned = group_shuffle(nn.Linear(n, n), blocks=blocks, fine_tune=True)
        steps = {
            "plain": training_step(nn.Linear(n, n), x),
            "group shuffle": training_step(orthogonal, x),
            "fine-tuning": training_step(tuned, x),
        }
        show(f"forward + backward, linear {n}, {blocks} blocks of {n // blocks}, batch {batch}", in_turn(steps, repeats))
    for layer, shape in ((nn.Linear(512, 512), (32, 512)), (nn.Conv2d(64, 64, 3, stride=2, padding=1), (8, 64, 16, 16))):
        tuned = group_shuffle(layer, blocks=8, fine_tune=True)
        with torch.no_grad():
            for p in tuned.parametrizations.weight[0].parameters():
                p.normal_()
            x = torch.randn(shape)
            y = tuned(x)
            difference = float((remove_spectral(tuned)(x) - y).abs().max())
        print(f"  merged - unmerged, {type(layer).__name__}: {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} thread")
    group_shuffles(30 if options.quick else 200)
    frames()
    tensor_trains(4 if options.quick else 10)


if __name__ == "__main__":
    main()
