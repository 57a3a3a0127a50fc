"""One linear layer at the bound: the processor time of SpectralClip's step over the textbook clip, and over the layer's own work.

    python tests/benchmarks/at_the_bound.py [--steps 20] [--rows 3072] [--columns 768] [--drift]

All singular values start at the bound, and before every step the weight moves by 1e-3 of its norm, at random or, with `--drift`,
always in the same direction. The textbook clip is a Gram matrix and its `eigh`, without a proof; the layer's own work is forward
and backward at 4096 tokens. One thread, float32.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import spectral_hooks as sh

MOVE, TOKENS = 1e-3, 4096


def textbook(weight: Tensor) -> Tensor:
    """`W - U max(1 - 1 / σ, 0) Uᵀ W`."""
    weight = weight if len(weight) <= weight.shape[1] else weight.T
    squared, u = torch.linalg.eigh(weight @ weight.T)
    over = (1 - 1 / squared.clamp(min=1e-18).sqrt()).clamp(min=0)
    return weight - u @ (over[:, None] * (u.T @ weight))


def own_work(rows: int, columns: int) -> float:
    """The median time of a forward and a backward."""
    layer, x, times = nn.Linear(columns, rows), torch.randn(TOKENS, columns), []
    for _ in range(4):
        start = time.process_time()
        layer(x).square().mean().backward()
        times.append(time.process_time() - start)
    return statistics.median(times)


def steps(rows: int, columns: int, slack: float | None, number: int, drift: bool) -> tuple[float, float, int, float, float]:
    """Mean time of a step and median of the textbook's, how many steps clipped, the largest value, the share of those near it."""
    layer = nn.Linear(columns, rows, bias=False)
    nn.init.orthogonal_(layer.weight)
    hook, ours, theirs, clips = sh.SpectralClip(1.0, slack=slack), [], [], 0
    optimizer, move = torch.optim.SGD(layer.parameters(), lr=0.0), torch.randn_like(layer.weight.detach())
    with hook.attach(layer, optimizer):
        for step in range(number + 2):
            with torch.no_grad():
                move = move if drift else torch.randn_like(move)
                layer.weight += MOVE * layer.weight.norm() / move.norm() * move
            before = time.process_time()
            textbook(layer.weight.detach())
            between = time.process_time()
            optimizer.step()  # without gradients: what counts is what the hook does after it
            if step >= 2:
                theirs.append(between - before)
                ours.append(time.process_time() - between)
                clips += hook.clipped
        values = torch.linalg.svdvals(layer.weight.detach().double())
    return statistics.mean(ours), statistics.median(theirs), clips, float(values[0]), float((values > 0.97).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=768)
    parser.add_argument("--drift", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = own_work(chosen.rows, chosen.columns)
    print(f"torch {torch.__version__}, {chosen.columns}×{chosen.rows}, one thread; forward and backward {1e3 * work:.0f} ms")
    print("| slack | textbook, ms | ours, mean, ms | ratio | of forward + backward | clips | largest | near the bound |")
    print("|---|---|---|---|---|---|---|---|")
    for slack in (0, None):
        ours, theirs, clips, top, share = steps(chosen.rows, chosen.columns, slack, chosen.steps, chosen.drift)
        print(
            f"| {'default' if slack is None else slack} | {1e3 * theirs:.1f} | {1e3 * ours:.1f} | {ours / theirs:.2f} "
            f"| {ours / work:.0%} | {clips} of {chosen.steps} | {top:.6f} | {share:.0%} |"
        )


if __name__ == "__main__":
    main()
