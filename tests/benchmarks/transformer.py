"""A training step of a small GPT with all weights at the bound, without and with SpectralClip: processor time, in the same run.

    python tests/benchmarks/transformer.py [--lr 1e-3] [--steps 20] [--threads 1] [--only default]

Six layers of width 384, batch 8×256, AdamW. Every linear layer starts orthogonal, so that all singular values are at the bound.
At the end the largest norm is shown, and the least share of a layer's singular values above 0.95.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectral_hooks as sh

WIDTH, LAYERS, HEADS, LENGTH, BATCH, LETTERS = 384, 6, 6, 256, 8, 256
SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "slack=0": {"slack": 0}, "every=10": {"every": 10}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def gpt() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(LETTERS, WIDTH), *(Block() for _ in range(LAYERS)), nn.Linear(WIDTH, LETTERS))
    for layer in linear_layers(model):
        nn.init.orthogonal_(layer.weight)
    return model


def batch(generator: torch.Generator) -> Tensor:
    """Arithmetic sequences of letters, from anywhere and by any step: something to learn."""
    start, step = (torch.randint(LETTERS, (BATCH, 1), generator=generator) for _ in range(2))
    return (start + step * torch.arange(LENGTH + 1)) % LETTERS


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def share_above(layer: nn.Linear, level: float) -> float:
    """Which share of a layer's singular values is above a level."""
    return float((torch.linalg.svdvals(layer.weight.detach().double()) > level).double().mean())


def run(settings: dict[str, Any] | None, lr: float, steps: int) -> tuple[list[float], float, float]:
    """Times of steps after five others, the largest norm, and the least share of singular values above 0.95."""
    model, generator = gpt(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if settings is not None:
        sh.SpectralClip(1.0, **settings).attach(model, optimizer)
    times = []
    for _ in range(steps + 5):
        letters = batch(generator)
        start = time.process_time()
        loss = F.cross_entropy(model(letters[:, :-1]).flatten(0, 1), letters[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.process_time() - start)
    layers = linear_layers(model)
    largest = max(float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) for layer in layers)
    return times[5:], largest, min(share_above(layer, 0.95) for layer in layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=SETTINGS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"torch {torch.__version__}, {chosen.threads} threads, AdamW {chosen.lr}, mean of {chosen.steps} steps")
    print("| hook | s a step | over plain | largest norm | least share above 0.95 |\n|---|---|---|---|---|")
    plain = 0.0
    for name, settings in {"none": None, **SETTINGS}.items():
        if settings is not None and chosen.only not in (None, name):
            continue
        times, largest, share = run(settings, chosen.lr, chosen.steps)
        mean = statistics.mean(times)
        plain = plain or mean
        print(f"| {name} | {mean:.3f} | {mean / plain - 1:+.0%} | {largest:.4f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
