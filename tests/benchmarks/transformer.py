"""A training step of a small GPT with all weights at the bound, without and with SpectralClip: processor time, in the same run.

    python tests/benchmarks/transformer.py [--lr 1e-3] [--steps 20] [--threads 1] [--only default]

Six layers of width 384, batch 8×256, AdamW. Every linear layer starts orthogonal, so that all singular values are at the bound.
The runs take their steps in turn, so that other work on the machine disturbs all alike. For `every=10` only the mean
tells. At the end the largest norm is shown, and the least share of a layer's singular values above 0.95.
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
#: Steps that are not counted.
FIRST = 5
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
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
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


class Run:
    """A model in training, with a hook or without."""

    def __init__(self, settings: dict[str, Any] | None, lr: float) -> None:
        self.model, self.generator = gpt(), torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.hook = None if settings is None else sh.SpectralClip(1.0, **settings)
        if self.hook is not None:
            self.hook.attach(self.model, self.optimizer)

    def step(self) -> float:
        """The processor time of a training step."""
        letters = batch(self.generator)
        start = time.process_time()
        loss = F.cross_entropy(self.model(letters[:, :-1]).flatten(0, 1), letters[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.process_time() - start

    def spectrum(self) -> tuple[float, float]:
        """The largest norm, and the least share of a layer's singular values above 0.95."""
        layers = linear_layers(self.model)
        largest = max(float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) for layer in layers)
        return largest, min(share_above(layer, 0.95) for layer in layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=SETTINGS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    names = [None, *(name for name in SETTINGS if chosen.only in (None, name))]
    runs = {name: Run(None if name is None else SETTINGS[name], chosen.lr) for name in names}
    times: dict[str | None, list[float]] = {name: [] for name in names}
    clips = dict.fromkeys(names, 0)
    for step in range(-FIRST, chosen.steps):
        for name, run in runs.items():
            seconds = run.step()
            if step >= 0:
                times[name].append(seconds)
                clips[name] += 0 if run.hook is None else run.hook.clipped
    print(f"torch {torch.__version__}, {chosen.threads} threads, AdamW {chosen.lr}, {chosen.steps} steps after {FIRST}")
    print("| hook | s a step, mean | over plain, mean | median | clips a step | largest norm | least share above 0.95 |")
    print("|---|---|---|---|---|---|---|")
    plain = times[None]
    for name, run in runs.items():
        largest, share = run.spectrum()
        mean = statistics.mean(times[name])
        middle = statistics.median(one / other for one, other in zip(times[name], plain, strict=True))
        print(
            f"| {name} | {mean:.3f} | {mean / statistics.mean(plain) - 1:+.1%} | {middle - 1:+.1%} "
            f"| {clips[name] / chosen.steps:.1f} | {largest:.4f} | {share:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
