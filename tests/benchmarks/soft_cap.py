"""The coupled soft cap: what it costs, where it settles, and whether it ever lets a weight above the bound.

    python tests/benchmarks/soft_cap.py --cost
    python tests/benchmarks/soft_cap.py --settle [--steps 1000] [--rows 128] [--columns 512]
    python tests/benchmarks/soft_cap.py --long [--steps 10000] [--rows 512] [--columns 2048] [--every 20] [--only muon]

One thread. A weight is drawn to a target outside of the ball, with noise, by Muon (momentum orthogonalized by five Newton-Schulz
steps, 0.02), AdamW (1e-3) or SGD (momentum 0.9). Norms are those of LAPACK's singular values in float64, of the stored values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.projections.carried import certified_norms, moved_bounds
from spectral_hooks.projections.coupled import cap_matrices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def norm(weight: Tensor) -> float:
    """The largest singular value of the stored values."""
    return float(torch.linalg.svdvals(weight.detach().double())[0])


def orthogonalized(momentum: Tensor) -> Tensor:
    """Nearly the polar factor: five steps `(3.4445, -4.7750, 2.0315)` of Muon, by products of the smaller side."""
    wide = momentum if momentum.shape[0] <= momentum.shape[1] else momentum.T
    wide = wide / wide.norm()
    gram, factor = wide @ wide.T, torch.eye(len(wide))
    for _ in range(5):
        step = 3.4445 * torch.eye(len(wide)) - 4.7750 * gram + 2.0315 * gram @ gram
        gram, factor = step @ gram @ step, step @ factor
    found = factor @ wide
    return found if found.shape == momentum.shape else found.T


class Updates:
    """Updates of a weight that is drawn to a target outside of the ball."""

    def __init__(self, kind: str, shape: tuple[int, int], noise: float) -> None:
        generator = torch.Generator().manual_seed(1)
        target = torch.randn(shape, generator=generator)
        self.kind, self.noise, self.generator = kind, noise, generator
        self.target = 3 * target / torch.linalg.matrix_norm(target, 2)
        self.first, self.second, self.steps = torch.zeros(shape), torch.zeros(shape), 0

    def __call__(self, weight: Tensor) -> Tensor:
        """How much to add to it."""
        self.steps += 1
        entry = float(self.target.square().mean().sqrt())
        gradient = weight.float() - self.target + self.noise * entry * torch.randn(weight.shape, generator=self.generator)
        if self.kind == "muon":
            self.first = 0.95 * self.first + gradient
            return -0.02 * orthogonalized(gradient + 0.95 * self.first)
        if self.kind == "sgd":
            self.first = 0.9 * self.first + gradient
            return -2e-3 * self.first
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient.square()
        first, second = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.999**self.steps)
        return -1e-3 * (first / (second.sqrt() + 1e-8) + 0.01 * weight.float())


def trained(kind: str, shape: tuple[int, int], dtype: torch.dtype, steps: int, every: int, **settings: object) -> list[float]:
    """The norms after every so many steps under a hook."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    hook = sh.SpectralClip(1.0, **settings)
    hook.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.0))
    updates, norms = Updates(kind, shape, noise=3.0), []
    for step in range(steps):
        with torch.no_grad():
            layer.weight.copy_((layer.weight.float() + updates(layer.weight)).to(dtype))
        hook.after_step()
        if step % every == every - 1:
            norms.append(norm(layer.weight))
    return norms


def timed(functions: list[Callable[[], object]], rounds: int = 21) -> list[float]:
    """Medians of the processor times of functions that take turns, in ms."""
    times: list[list[float]] = [[] for _ in functions]
    for index in range(rounds + 1):
        for function, own in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            own += [time.process_time() - start] * bool(index)
    return [1e3 * statistics.median(own) for own in times]


def cost(number: int, rows: int, columns: int) -> str:
    """A row of the table: the four products, the bound of the update, the cap, a certificate, and ratios."""
    torch.manual_seed(0)
    weights = torch.stack([nn.init.orthogonal_(torch.empty(rows, columns)) for _ in range(number)])
    before = weights - 1e-3 * torch.randn_like(weights) / rows**0.5
    norms = torch.ones(number, dtype=torch.float64) + moved_bounds(weights, before, 1.0)

    def four() -> Tensor:
        gram = weights @ weights.mT
        squared = gram @ gram
        return squared @ gram @ weights

    parts = [four, lambda: moved_bounds(weights, before, 1.0), lambda: cap_matrices(weights, norms, 1.0)]
    products, moved, cap, proof = timed([*parts, lambda: certified_norms(weights, 1.0)])
    return (
        f"| {number} × {rows}×{columns} | {products:.1f} | {moved:.1f} | {cap:.1f} | {proof:.1f} "
        f"| {(moved + cap) / products:.2f} | {(moved + cap + proof / 8) / products:.2f} |"
    )


def costs() -> None:
    print(
        "| matrices | four products, ms | bound of the update | cap | certificate | bound and cap over four products | with it |"
    )
    print("|---|---|---|---|---|---|---|")
    for number, rows, columns in ((1, 256, 256), (8, 256, 256), (1, 768, 768), (1, 768, 3072)):
        print(cost(number, rows, columns), flush=True)


def settled(rows: int, columns: int, steps: int) -> None:
    print(f"{rows}×{columns}, {steps} steps, of the last half the mean of the norms, the least and the largest")
    print("| updates | stored | `clip` | `soft_cap` |")
    print("|---|---|---|---|")
    for kind in ("muon", "adamw", "sgd"):
        for name, dtype in DTYPES.items():
            cells = []
            for projection in ("clip", "soft_cap"):
                last = trained(kind, (rows, columns), dtype, steps, 5, projection=projection)[steps // 10 :]
                cells.append(f"{statistics.mean(last):.3f} ({min(last):.3f} to {max(last):.3f})")
            print(f"| {kind} | {name} | {' | '.join(cells)} |", flush=True)


def long(rows: int, columns: int, steps: int, every: int, only: str | None) -> None:
    for kind in ("muon", "adamw", "sgd") if only is None else (only,):
        for name, dtype in DTYPES.items():
            start = time.process_time()
            norms = trained(kind, (rows, columns), dtype, steps, every, projection="soft_cap")
            print(
                f"| {rows}×{columns} | {kind} | {name} | {steps} | {len(norms)} | {max(norms):.7f} "
                f"| {statistics.mean(norms[len(norms) // 2 :]):.3f} | {sum(x > 1 + 1e-6 for x in norms)} "
                f"| {time.process_time() - start:.0f} s |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--settle", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", choices=("muon", "adamw", "sgd"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread")
    if chosen.cost:
        costs()
    if chosen.settle:
        settled(chosen.rows, chosen.columns, chosen.steps)
    if chosen.long:
        long(chosen.rows, chosen.columns, chosen.steps, chosen.every, chosen.only)


if __name__ == "__main__":
    main()
