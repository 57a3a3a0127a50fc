"""Matrices at the bound, a step: the processor time of the clip over that of the textbook, in the same run, one thread, float32.

    python tests/benchmarks/matrices.py [--steps 20] [--slack 0.02]

The textbook: `G = W Wᵀ`, `eigh`, `W - U max(1 - c / σ, 0) Uᵀ W`, without a proof. A step is a random move of 1e-3 of the weight,
Frobenius. `exact`: every step clipped to the bound and proven. `slack`: every step proven, and where that fails,
what is above clipped that much deeper. Before and after, the matrix is checked to
have many singular values at the bound, and none above. The last row: 24 layers of 4 shapes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_hooks.projections.few import block_for, clip_few
from spectral_hooks.projections.matrices import clip_matrices

SHAPES = ((256, 256), (768, 768), (768, 3072))
LAYERS = ((96, 96), (96, 384), (384, 96), (192, 64))
STEP = 1e-3


class Operations(TorchDispatchMode):
    """Counts torch operations."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.number += 1
        return func(*args, **(kwargs or {}))


def textbook(weight: Tensor, c: float) -> Tensor:
    """The nearest matrix of norm `c`, about; on the smaller side."""
    if weight.shape[-2] > weight.shape[-1]:
        return textbook(weight.mT, c).mT
    squared, u = torch.linalg.eigh(weight @ weight.mT)
    sigma = squared.clamp(min=0).sqrt()
    over = torch.where(sigma > c, 1 - c / sigma, 0.0)
    return weight - (u * over.unsqueeze(-2)) @ (u.mT @ weight)


def textbooks(batches: list[Tensor]) -> list[Tensor]:
    """Of all at the bound 1."""
    return [textbook(batch, 1.0) for batch in batches]


class Hook:
    """What a training hook does with these batches after every step, at the bound 1."""

    def __init__(self, batches: list[Tensor], slack: float) -> None:
        self.slack, self.clips, self.first = slack, 0, True
        self.known = clip_matrices(batches, 1.0)
        self.above = [[0] * len(x) for x in batches]

    def step(self, batches: list[Tensor]) -> list[Tensor]:
        """Each batch, inside."""
        if not self.slack or self.first:
            self.first = False
            return [x.weights for x in clip_matrices(batches, 1.0, depth=self.slack)]
        numbers = [[block_for(k) for k in above] for above in self.above]
        numbers = [[n if 4 * n <= min(x.shape[1:]) else 0 for n in some] for some, x in zip(numbers, batches, strict=True)]
        outside = [[k > 0 for k in above] for above in self.above]
        results = []
        found = clip_few(batches, 1.0, depth=self.slack, numbers=numbers, outside=outside)
        for i, (batch, few) in enumerate(zip(batches, found, strict=True)):
            self.above[i] = list(few.above)
            self.clips += sum(weight is not None for weight in few.weights)
            now = torch.stack([was if weight is None else weight for was, weight in zip(batch, few.weights, strict=True)])
            left = [j for j, proven in enumerate(few.proven) if not proven]
            if left:
                self.clips += len(left)
                now[left] = clip_matrices([batch[left]], 1.0, depth=self.slack)[0].weights
            results.append(now)
        return results


def moves(batches: list[Tensor]) -> list[Tensor]:
    """After a random step."""
    steps = [torch.randn_like(x) for x in batches]
    norm = torch.linalg.matrix_norm
    lengths = (norm(x, keepdim=True) / norm(s, keepdim=True) for x, s in zip(batches, steps, strict=True))
    return [x + STEP * length * s for x, s, length in zip(batches, steps, lengths, strict=True)]


def plateau(batches: list[Tensor], slack: float) -> tuple[float, float]:
    """The share of singular values within two slacks, or 1e-3, of the bound; and the largest."""
    values = [torch.linalg.svdvals(x.double()) for x in batches]
    near = sum(int((v > 1 - max(2 * slack, 1e-3)).sum()) for v in values) / sum(v.numel() for v in values)
    return near, max(float(v.max()) for v in values)


def seconds(function: Callable[[list[Tensor]], list[Tensor]], batches: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Processor time, and what it returned."""
    start = time.process_time()
    result = function(batches)
    return time.process_time() - start, result


def row(name: str, batches: list[Tensor], slack: float, steps: int) -> str:
    """Means for the slack, as its steps are of two kinds; medians else."""
    Hook(batches, slack).step(moves(batches))  # warms up
    hook = Hook(batches, slack)
    now = [x.weights for x in hook.known]
    start, _ = plateau(now, slack)
    times: list[tuple[float, float]] = []
    for _ in range(steps):
        now = moves(now)
        before, _ = seconds(textbooks, now)
        took, now = seconds(hook.step, now)
        times.append((took, before))
    clips = hook.clips
    with Operations() as counter:
        now = hook.step(moves(now))
    end, top = plateau(now, slack)
    assert top <= 1 + 1e-6, f"{name}: {top}"
    assert min(start, end) > 0.1, f"{name}: not at the bound ({start:.2f}, {end:.2f})"
    ours, base = zip(*times, strict=True)
    # with a slack the steps are of two kinds, and the first, which has no room, is a clip
    ratio = statistics.fmean(ours) / statistics.median(base) if slack else statistics.median(a / b for a, b in times)
    cells = [
        name,
        f"slack {slack:g}" if slack else "exact",
        f"{1e3 * statistics.median(base):.1f}",
        f"{1e3 * statistics.fmean(ours):.1f}",
        f"{ratio:.2f}",
        str(clips) if slack else "all",
        str(counter.number),
        f"{100 * start:.0f} %, {100 * end:.0f} %",
        f"{top - 1:+.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def at_bound(count: int, rows: int, columns: int) -> Tensor:
    """Random matrices of which about half of the singular values are to be clipped at 1."""
    noise = torch.randn(count, rows, columns)
    return noise / torch.linalg.svdvals(noise).median(dim=-1).values[:, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--slack", type=float, default=0.02)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread; processor time in ms")
    print("| matrix | clip | textbook | ours, mean | ratio | clips | operations, last step | at the bound | largest - 1 |")
    print("|---|---|---|---|---|---|---|---|---|")
    cases = [(f"{r}×{c}", [at_bound(1, r, c)]) for r, c in SHAPES]
    cases.append(("24 layers of 4 shapes", [at_bound(6, r, c) for r, c in LAYERS]))
    for name, batches in cases:
        for slack in (0.0, arguments.slack):
            print(row(name, batches, slack, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
