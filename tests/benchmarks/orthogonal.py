"""Orthogonal layers: error after training steps, and time against torch's own and against the plain layer in the same run.

    python tests/benchmarks/orthogonal.py [--quick]

One thread, float32; forward and backward of one batch, medians of interleaved calls. Ratios are what counts: machines differ and
are shared.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations as torchs

import spectral_hooks as sh
from spectral_hooks.parametrizations.orthogonal import orthogonal
from spectral_hooks.parametrizations.stiefel import MAPS

parser = argparse.ArgumentParser(description="Error and time of orthogonal layers.")
parser.add_argument("--quick", action="store_true", help="few steps, few calls: not for figures")
args = parser.parse_args()

STEPS, CALLS = (5, 3) if args.quick else (200, 15)
BATCH = 32


def medians(*calls: Callable[[], object]) -> list[float]:
    """Milliseconds of each, in turn, so that what else the machine does meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(CALLS + 2):
        for call, seconds in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return [1e3 * statistics.median(seconds[2:]) for seconds in times]


def step(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def forward_and_backward() -> None:
        layer.zero_grad()
        layer(x).square().mean().backward()

    return forward_and_backward


def train(layer: nn.Module, x: torch.Tensor, lr: float = 1e-2) -> nn.Module:
    """Some steps of Adam towards a random target."""
    target = torch.randn_like(layer(x)).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    return layer


@torch.no_grad()
def matrix_error(layer: nn.Module) -> float:
    """`‖QᵀQ - I‖₂` in float64."""
    q = layer.weight.double()
    q = q if q.shape[0] >= q.shape[1] else q.T
    return float(torch.linalg.matrix_norm(q.T @ q - torch.eye(q.shape[1], dtype=q.dtype), 2))


@torch.no_grad()
def operator_error(layer: nn.Module, size: int) -> float:
    """`max |σ² - 1|` of the circular operator in float64, over its singular values that are not of inputs never read."""
    op = sh.as_operator(layer)
    values = sh.singular_values(op.with_weight(op.weight.double()).circular(size))
    return float((values[values > 0.5] ** 2 - 1).abs().max())


def dense() -> None:
    x = torch.randn(BATCH, 512)
    print("\nLinear 512 → 512           ‖QᵀQ - I‖ float32     float64   ms, step   ratio to torch's cayley")
    layers = {name: orthogonal(nn.Linear(512, 512), name) for name in MAPS}
    peers = {f"torch {name}": torchs.orthogonal(nn.Linear(512, 512), orthogonal_map=name) for name in ("cayley", "householder")}
    times = medians(*(step(layer, x) for layer in [*layers.values(), *peers.values()]))
    reference = times[len(layers)]
    for (name, layer), milliseconds in zip({**layers, **peers}.items(), times, strict=True):
        single = matrix_error(train(layer, x))
        if name in layers and name != "exp":
            double = f"{matrix_error(train(orthogonal(nn.Linear(512, 512).double(), name), x.double())):.1e}"
        else:
            double = "-"
        print(f"{name:<26}{single:>21.1e}{double:>12}{milliseconds:>11.1f}{milliseconds / reference:>12.2f}")


def tall() -> None:
    print("\n30000 × 50                 ‖QᵀQ - I‖ float32   s, start    s, step")
    x = torch.randn(BATCH, 50)
    for name in MAPS:
        layer = nn.Linear(50, 30000)
        began = time.perf_counter()
        orthogonal(layer, name)
        start = time.perf_counter() - began
        (milliseconds,) = medians(step(layer, x))
        print(f"{name:<26}{matrix_error(layer):>21.1e}{start:>11.2f}{milliseconds / 1e3:>11.2f}")


def speed() -> None:
    print("\nConv2d 64 → 64, 3×3        ms, plain   ms, orthogonal   ratio")
    for size in (16, 32):
        x = torch.randn(BATCH, 64, size, size)
        plain, made = nn.Conv2d(64, 64, 3, padding=1), orthogonal(nn.Conv2d(64, 64, 3, padding=1))
        before, after = medians(step(plain, x), step(made, x))
        print(f"{f'batch {BATCH} at {size}²':<26}{before:>10.1f}{after:>17.1f}{after / before:>8.2f}")
    began = time.perf_counter()
    orthogonal(nn.Conv2d(256, 256, 3))
    print(f"start of 256 → 256: {time.perf_counter() - began:.1f} s")


def geometries() -> None:
    print("\nConv2d 64 → 64, ‖AᵀA - I‖ of the circular operator after training; the worst of dilations 1, 2 and groups 1, 2, 4")
    print("stride  " + "".join(f"{f'kernel {k}':>12}" for k in range(1, 6)))
    channels = 16 if args.quick else 64
    for stride in (1, 2):
        errors = []
        for kernel in range(1, 6):
            worst = 0.0
            for dilation, groups in itertools.product((1, 2), (1, 2, 4)):
                torch.manual_seed(0)
                layer = nn.Conv2d(channels, channels, kernel, stride, dilation=dilation, groups=groups)
                layer = train(orthogonal(layer), torch.randn(4, channels, 12, 12))
                worst = max(worst, operator_error(layer, 12))
            errors.append(worst)
        print(f"{stride:>6}  " + "".join(f"{error:>12.1e}" for error in errors), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense()
    tall()
    speed()
    geometries()
