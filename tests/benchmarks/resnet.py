"""Processor seconds of SpectralClip a step on timm's resnet18 under AdamW, whose every kernel is at the bound.

    python tests/benchmarks/resnet.py [--steps N] [--lr X] [--pixels N]

Prints what `attach` costs, and for every step the projection (`every=1`) and the rest of the step; then the medians of the steps
from the third on, and the largest certified norm, which must not exceed the bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import timm
import torch
import torch.nn.functional as F
from torch import nn
from training import batches

import spectral_hooks as sh


def main() -> None:
    parser = argparse.ArgumentParser(description="What convolutions at the bound cost.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pixels", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, timm {timm.__version__}, one thread, Python {sys.version.split()[0]}, lr {options.lr}")
    model = timm.create_model("resnet18", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    clip = sh.SpectralClip(1.0)
    start = time.process_time()
    clip.attach(model, optimizer)
    print(f"attach {time.process_time() - start:.1f} s", flush=True)
    times: dict[str, list[float]] = {"projection": [], "step": []}
    inner = clip.act

    def timed(*arguments: object) -> None:
        begun = time.process_time()
        inner(*arguments)  # type: ignore[arg-type]
        times["projection"].append(time.process_time() - begun)

    clip.act = timed  # type: ignore[method-assign]
    data = batches(16, options.pixels)
    for n in range(1, options.steps + 1):
        images, labels = next(data)
        begun = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        times["step"].append(time.process_time() - begun - times["projection"][-1])
        print(
            f"step {n}: projection {times['projection'][-1]:.2f} s, rest {times['step'][-1]:.2f} s, clipped {clip.clipped}",
            flush=True,
        )
    medians = {name: statistics.median(seconds[2:]) for name, seconds in times.items()}
    print(f"median from step 3 on: projection {medians['projection']:.2f} s, rest {medians['step']:.2f} s")
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    largest = max(float(sh.spectral_norm(sh.as_operator(layer), rtol=0.05)) / 1.05 for layer in layers)
    print(f"largest norm, from below: {largest:.3f}")


if __name__ == "__main__":
    main()
