"""`rescaled`: forward and backward of a layer over plain, over AOL and over torch's `spectral_norm`, in the same run.

    python tests/benchmarks/rescaled.py [--calls 100] [--batch 8]

One thread, float32, medians of processor time of interleaved calls. Before every call each weight is moved a little, as by an
optimizer, which is not timed: no layer can make use of what it found before. AOL (Prach and Lampert 2022) scales columns by
`(Σ_j |WᵀW|_ij)^-½`, here written from the formula; `spectral_norm` takes one power step, and promises no bound.
`of the bound`: the norm of the layer, certified to 1e-4, over the bound; below one by what the bound exceeds the norm.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torchs

import spectral_hooks as sh

#: A layer and the shape of an input.
CASES = {
    "Linear 256": (lambda: nn.Linear(256, 256), (256,)),
    "Linear 768": (lambda: nn.Linear(768, 768), (768,)),
    "3×3, 64 → 64, at 16²": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 16, 16)),
    "3×3, 32 → 32, at 32²": (lambda: nn.Conv2d(32, 32, 3, padding=1), (32, 32, 32)),
    "3×3, 128 → 128, at 16²": (lambda: nn.Conv2d(128, 128, 3, padding=1), (128, 16, 16)),
}


class AlmostOrthogonal(nn.Module):
    """AOL of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def scaled(self, weight: Tensor) -> Tensor:
        if weight.ndim == 2:
            sums = (weight.T @ weight).abs().sum(1)
            return weight * sums.clamp(min=1e-12).rsqrt()
        turned = weight.transpose(0, 1)
        sums = F.conv2d(turned, turned, padding=weight.shape[-1] - 1).abs().sum((1, 2, 3))
        return weight * sums.clamp(min=1e-12).rsqrt()[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.scaled(self.layer.weight), self.layer.bias
        return F.linear(x, weight, bias) if weight.ndim == 2 else F.conv2d(x, weight, bias, padding=self.layer.padding)


def step(layer: nn.Module, x: Tensor) -> float:
    """Seconds of the processor, after a move that is not timed."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-4)
    layer.zero_grad()
    began = time.process_time()
    layer(x).square().mean().backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, batch {options.batch}\n")
    print("| layer | plain, ms | AOL | `spectral_norm` | `rescaled` | over AOL | over `spectral_norm` | of the bound |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (make, shape) in CASES.items():
        torch.manual_seed(0)
        plain, x = make(), torch.randn(options.batch, *shape)
        ours = sh.parametrizations.rescaled(copy.deepcopy(plain))
        layers = [plain, AlmostOrthogonal(copy.deepcopy(plain)), torchs.spectral_norm(copy.deepcopy(plain)), ours]
        times: list[list[float]] = [[] for _ in layers]
        for _ in range(options.calls + 3):
            for layer, seconds in zip(layers, times, strict=True):
                seconds.append(step(layer, x))
        milliseconds = [1e3 * statistics.median(seconds[3:]) for seconds in times]
        reached = float(sh.spectral_norm(sh.as_operator(ours), rtol=1e-4).detach())
        ratios = [f"{milliseconds[3] / peer:.2f}" for peer in milliseconds[1:3]]
        print(f"| {name} | {' | '.join([*(f'{ms:.2f}' for ms in milliseconds), *ratios])} | {reached:.4f} |", flush=True)


if __name__ == "__main__":
    main()
