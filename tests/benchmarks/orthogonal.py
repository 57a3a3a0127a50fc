"""Orthogonal and clipped layers: error after training steps, and time against peers and the plain layer in the same run.

    python tests/benchmarks/orthogonal.py [--quick]

One thread, float32; forward and backward of one batch, medians of interleaved calls in processor time. Ratios are what counts:
machines differ and are shared. Peers are used where they are there: geotorch (Lezcano-Casado 2019), if it is installed, and AOC
(Boissin et al. 2025), if the environment variable SPECTRAL_HOOKS_PEERS names a folder that holds a clone of `orthogonium`.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations as torchs

import spectral_hooks as sh
from spectral_hooks.parametrizations.clipped import clipped
from spectral_hooks.parametrizations.orthogonal import orthogonal
from spectral_hooks.parametrizations.stiefel import MAPS

parser = argparse.ArgumentParser(description="Error and time of orthogonal layers.")
parser.add_argument("--quick", action="store_true", help="few steps, few calls: not for figures")
args = parser.parse_args()

STEPS, CALLS = (5, 3) if args.quick else (200, 15)
BATCH = 32


def imported(name: str, folder: str = "") -> Any:
    """A peer's module, by a folder that is on the path while it is imported; None, and a line that says why, without."""
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except Exception as error:
        print(f"peer {name}: skipped, it does not import: {error}")
        return None
    finally:
        sys.path.remove(folder)


def aoc() -> Callable[..., nn.Module] | None:
    """The convolution of orthogonium, on the CPU."""
    folder = os.environ.get("SPECTRAL_HOOKS_PEERS")
    if not folder:
        print("peer orthogonium: skipped, SPECTRAL_HOOKS_PEERS is not set")
        return None
    module = imported("orthogonium.layers.conv.AOC.ortho_conv", str(Path(folder) / "orthogonium"))
    return module and module.AdaptiveOrthoConv2d


def medians(*calls: Callable[[], object]) -> list[float]:
    """Milliseconds of each, in turn, so that what else the machine does meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(CALLS + 2):
        for call, seconds in zip(calls, times, strict=True):
            began = time.process_time()
            call()
            seconds.append(time.process_time() - began)
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
def operator_error(layer: Any, size: int) -> float:
    """`max |σ² - 1|` of the circular operator in float64, over its singular values that are not of inputs never read."""
    weight = layer.weight.detach().double()
    op = sh.ConvOperator(weight, stride=layer.stride, dilation=layer.dilation, groups=layer.groups)
    values = sh.singular_values(op.circular(size))
    return float((values[values > 0.5] ** 2 - 1).abs().max())


def dense() -> None:
    x = torch.randn(BATCH, 512)
    print("\nLinear 512 → 512           ‖QᵀQ - I‖ float32     float64   ms, step   ratio to torch's cayley")
    layers = {name: orthogonal(nn.Linear(512, 512), orthogonal_map=name) for name in MAPS}
    peers = {f"torch {name}": torchs.orthogonal(nn.Linear(512, 512), orthogonal_map=name) for name in ("cayley", "householder")}
    if geotorch:
        peers["geotorch"] = nn.Linear(512, 512)
        geotorch.orthogonal(peers["geotorch"], "weight")
    times = medians(*(step(layer, x) for layer in [*layers.values(), *peers.values()]))
    reference = times[len(layers)]
    for (name, layer), milliseconds in zip({**layers, **peers}.items(), times, strict=True):
        single = matrix_error(train(layer, x))
        if name in layers and name != "exp":
            double = f"{matrix_error(train(orthogonal(nn.Linear(512, 512).double(), orthogonal_map=name), x.double())):.1e}"
        else:
            double = "-"
        print(f"{name:<26}{single:>21.1e}{double:>12}{milliseconds:>11.1f}{milliseconds / reference:>12.2f}")


def tall() -> None:
    print("\n30000 × 50                 ‖QᵀQ - I‖ float32   s, start    s, step")
    x = torch.randn(BATCH, 50)
    for name in MAPS:
        layer = nn.Linear(50, 30000)
        began = time.process_time()
        orthogonal(layer, orthogonal_map=name)
        start = time.process_time() - began
        (milliseconds,) = medians(step(layer, x))
        print(f"{name:<26}{matrix_error(layer):>21.1e}{start:>11.2f}{milliseconds / 1e3:>11.2f}")


def speed() -> None:
    print("\nConv2d 64 → 64, circular       ms, plain   ms   ratio   ‖AᵀA - I‖ after training")
    for size, kernel, stride in ((16, 3, 1), (32, 3, 1), (32, 3, 2), (32, 5, 1), (32, 2, 2)):
        x = torch.randn(BATCH, 64, size, size)
        settings: dict[str, Any] = {"stride": stride, "padding": (kernel - 1) // 2, "padding_mode": "circular"}
        plain = nn.Conv2d(64, 64, kernel, **settings)
        layers = {"orthogonal": orthogonal(nn.Conv2d(64, 64, kernel, **settings))}
        if orthogonium:
            layers["AOC"] = orthogonium(64, 64, kernel, **settings)
        before, *times = medians(step(plain, x), *(step(layer, x) for layer in layers.values()))
        for (name, layer), after in zip(layers.items(), times, strict=True):
            error = operator_error(train(layer, x[:4]), size)
            where = f"{kernel}×{kernel} / {stride} at {size}², {name}"
            print(f"{where:<30}{before:>10.1f}{after:>6.1f}{after / before:>7.2f}{error:>12.1e}", flush=True)
    began = time.process_time()
    orthogonal(nn.Conv2d(256, 256, 3))
    print(f"start of 256 → 256: {time.process_time() - began:.1f} s")


def clips() -> None:
    print(f"\nclipped, 3×3 kernels far above the bound, batch {BATCH} at 16²\n{'channels':<16}ms, plain   ms, clipped   ratio")
    for channels in (16, 64) if args.quick else (16, 64, 128):
        x = torch.randn(BATCH, channels, 16, 16)
        plain, made = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        with torch.no_grad():
            made.weight.mul_(3)
        before, after = medians(step(plain, x), step(clipped(made), x))
        print(f"{channels:<16}{before:>9.1f}{after:>14.1f}{after / before:>8.1f}", flush=True)


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
    geotorch, orthogonium = imported("geotorch"), aoc()
    dense()
    tall()
    speed()
    clips()
    geometries()
