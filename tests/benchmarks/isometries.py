"""Convolutions constrained or normalized in their forward: time against the plain layer in the same run, and what they keep.

    python tests/benchmarks/isometries.py [--quick]

Single thread. Medians of processor times, and of ratios to the plain layer's next call; ratios are what counts. `deviation` is
`‖AᵀA - I‖`, or `‖AAᵀ - I‖` where there are fewer outputs than inputs, by power steps on the layer itself; empty where it is not
promised.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_hooks.parametrizations.cayley import cayley
from spectral_hooks.parametrizations.clipped import clipped
from spectral_hooks.parametrizations.conv_norm import conv_norm
from spectral_hooks.parametrizations.group_shuffle import group_shuffle
from spectral_hooks.parametrizations.rescaled import rescaled
from spectral_hooks.parametrizations.skew import skew


@dataclass
class Case:
    channels: tuple[int, int]
    size: int
    batch: int
    stride: int = 1

    def __str__(self) -> str:
        shown = f"{self.channels[1]}×{self.channels[0]}×3×3" + (f"/{self.stride}" if self.stride > 1 else "")
        return f"{shown}@{self.size}, batch {self.batch}"

    def layer(self) -> nn.Conv2d:
        torch.manual_seed(0)
        return nn.Conv2d(*self.channels, 3, stride=self.stride, padding=1, bias=False)


CASES = [
    Case((32, 32), 32, 16),
    Case((64, 64), 32, 16),
    Case((64, 64), 16, 64),
    Case((128, 128), 16, 16),
    Case((64, 64), 16, 32, stride=2),
    Case((64, 64), 32, 32, stride=2),
    Case((64, 128), 16, 32, stride=2),
    Case((256, 256), 8, 32),
]


class Exponential(nn.Module):
    """The truncated exponential of the same generator, as published: 12 terms, whatever its norm."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        generator = self.weight - self.weight.transpose(0, 1).flip(2, 3)
        term = result = x
        for t in range(1, 13):
            term = F.conv2d(term, generator, padding=1) / t
            result = result + term
        return result


#: What is measured, and whether it is an isometry.
METHODS: dict[str, tuple[Callable[[nn.Conv2d], nn.Module], bool]] = {
    "skew, degree 4": (skew, True),
    "skew, degree 6": (lambda layer: skew(layer, degree=6), True),
    "group_shuffle": (lambda layer: group_shuffle(layer, blocks=2 ** ((layer.in_channels.bit_length() - 1) // 2)), True),
    "exponential, 12 terms": (Exponential, True),
    "cayley": (cayley, True),
    "conv_norm": (conv_norm, False),
    "rescaled": (rescaled, False),
    "clipped": (clipped, False),
}


def training(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and a backward, down to the input and the weight."""

    def step() -> None:
        layer.train().zero_grad()
        layer(x.detach().requires_grad_()).square().sum().backward()

    return step


def evaluation(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def call() -> None:
        layer.eval()(x)

    return call


def ratio(first: Callable[[], None], second: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Milliseconds of the processor of the first, and how many times those of the second, called right after."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for kept, call in zip(times, (first, second), strict=True):
            start = time.process_time()
            call()
            if repeat:
                kept.append(time.process_time() - start)
    return statistics.median(times[0]) * 1e3, statistics.median(ours / plain for ours, plain in zip(*times, strict=True))


def deviation(layer: nn.Module, shape: tuple[int, ...], steps: int = 30) -> float:
    """The largest `|σ² - 1|` of the layer, from below, by power steps on `(AᵀA - I)²`."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, *shape, generator=generator)
    y, pull = torch.func.vjp(layer, v)
    wide = y.numel() < v.numel()
    v = torch.randn(y.shape, generator=generator) if wide else v

    def gram(v: Tensor) -> Tensor:
        return layer(pull(v)[0]) if wide else pull(layer(v))[0]

    value = 0.0
    for _ in range(steps):
        v = v / v.norm()
        change = (gram(v) - v).detach()
        value = max(value, float(change.norm()))
        v = change
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the first two layers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with 1 thread, "
        f"Python {sys.version.split()[0]}\n"
    )
    print("| layer | method | training: ms · of plain | evaluation: ms · of plain | deviation |\n|---|---|---|---|---|")
    for case in CASES[:2] if options.quick else CASES:
        plain = case.layer()
        shape = (case.channels[0], case.size, case.size)
        x = torch.randn(case.batch, *shape)
        for name, (make, isometry) in METHODS.items():
            if make is Exponential and (case.stride > 1 or len(set(case.channels)) > 1):
                continue
            layer = make(copy.deepcopy(plain))
            shown = f"{deviation(layer, shape):.1e}" if isometry else ""
            trained = ratio(training(layer, x), training(plain, x), 7)
            evaluated = ratio(evaluation(layer, x), evaluation(plain, x), 25)
            cells = " | ".join(f"{ms:.1f} · {times:.2f}×" for ms, times in (trained, evaluated))
            print(f"| {case} | {name} | {cells} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
