"""Clipping a kernel to half its norm: time, what norm is left, and how far it moved, against NumPy in the same run.

    python tests/benchmarks/clip.py [--quick] [--matrix]

The baseline is the clip of Sedghi, Gupta and Long (2019): FFT on the grid of the input size, SVD, clip, inverse FFT, crop. It
ends above the bound. "Distance" is relative to 60 rounds of ours, which stand for the true projection and are a little farther,
so the ratios are a little too small. `--matrix`: a 4096 x 11008 linear layer against an SVD.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from norms import SHAPES, Case, kernel, numpy_blocks

import spectral_hooks as sh
from spectral_hooks.linalg.scaling import normalized
from spectral_hooks.projections.dual import clip_kernel


def numpy_clip(case: Case, bound: float) -> torch.Tensor:
    """One round, as published; strided kernels in the polyphase form."""
    blocks = numpy_blocks(case)  # (n, n, groups, rows, columns)
    u, s, vh = np.linalg.svd(blocks, full_matrices=False)
    clipped = (u * np.minimum(s, bound)[..., None, :]) @ vh
    kernel = np.fft.ifft2(np.moveaxis(clipped, (0, 1), (3, 4))).real
    taps = case.lattice.canonical().shape[3:]
    cropped = torch.from_numpy(kernel[..., : taps[0], : taps[1]].copy()).to(case.weight)
    return case.lattice.from_canonical(cropped)


def one_round(case: Case, bound: float) -> torch.Tensor:
    """Ours, without the final scaling, so that one round stands against one round."""
    op = case.lattice
    canonical, scale = normalized(op.canonical())
    clipped, _ = clip_kernel(op, canonical.float(), bound / scale, 1, stretch=False)
    return op.from_canonical(clipped.to(case.weight)) * scale


def far(case: Case, bound: float) -> torch.Tensor:
    op = case.lattice
    canonical, scale = normalized(op.canonical())
    clipped, _ = clip_kernel(op, canonical, bound / scale, 60)
    return op.from_canonical(clipped) * scale


METHODS: dict[str, Callable[[Case, float], torch.Tensor]] = {
    "NumPy FFT + SVD clip": numpy_clip,
    "one round, no promise": one_round,
    "projections.clip, 3 rounds": lambda case, bound: sh.projections.clip(case.lattice, bound),
    "projections.clip, 5 rounds": lambda case, bound: sh.projections.clip(case.lattice, bound, rounds=5),
    "projections.rescale": lambda case, bound: sh.projections.rescale(case.lattice, bound),
}


def timed(function: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    times = []
    while True:
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
        if len(times) >= 3 or sum(times) > 3:
            return statistics.median(times), result


def kernels(quick: bool) -> None:
    print("| kernel | method | time | NumPy / it | certified norm / bound | distance / true projection |")
    print("|---|---|---|---|---|---|")
    shapes = [s for s in SHAPES if s[4] == 1 and not s[0].endswith("@112") and (max(s[1][:2]) <= 128 or not quick)]
    for name, shape, size, stride, groups in shapes:
        for kind in ("random", "trained-like"):
            case = Case(f"{kind} {name}", kernel(kind, shape), size, stride, groups)
            bound = float(sh.spectral_norm(case.lattice)) / 2
            wide = max(shape[:2]) > 256
            nearest = None if wide else torch.linalg.vector_norm(far(case, bound) - case.weight)
            base = None
            for method, function in METHODS.items():
                seconds, weight = timed(lambda f=function, c=case, b=bound: f(c, b))
                base = base or seconds
                norm = float(sh.spectral_norm(case.lattice.with_weight(weight), rtol=1e-2 if wide else 2e-3))
                distance = "" if nearest is None else f"{float(torch.linalg.vector_norm(weight - case.weight) / nearest):.3f}"
                cells = (case.name, method, f"{1e3 * seconds:.1f} ms", f"{base / seconds:.1f}", f"{norm / bound:.3f}", distance)
                print(f"| {' | '.join(cells)} |", flush=True)


def matrix() -> None:
    """A large linear layer with a few singular values above the bound."""
    torch.manual_seed(0)
    weight = torch.randn(4096, 11008) / 11008**0.5
    u, v = torch.randn(4096, 4), torch.randn(11008, 4)
    weight += (u / u.norm(dim=0)) @ (v / v.norm(dim=0)).T * 2
    op = sh.DenseOperator(weight)
    start = time.perf_counter()
    exact = float(torch.linalg.svdvals(weight)[0])
    values = time.perf_counter() - start
    print(f"4096 x 11008: svdvals {values:.1f} s", flush=True)
    start = time.perf_counter()
    norm = float(sh.spectral_norm(op))
    certified = time.perf_counter() - start
    print(f"  certified {certified:.2f} s, {certified / values:.1%} of it; relative error {norm / exact - 1:.1e}", flush=True)
    start = time.perf_counter()
    inside = sh.projections.clip(op, 1.05 * norm)
    print(f"  found inside {time.perf_counter() - start:.2f} s, unchanged: {inside is op.weight}", flush=True)
    start = time.perf_counter()
    clipped = sh.projections.clip(op, 1.8)
    seconds = time.perf_counter() - start
    left = float(sh.spectral_norm(op.with_weight(clipped)))
    print(f"  clipped {seconds:.2f} s, {seconds / values:.1%} of it; norm {left:.6f}", flush=True)
    start = time.perf_counter()
    torch.linalg.svd(weight, full_matrices=False)
    print(f"  a full SVD takes {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Clipping kernels and matrices.")
    parser.add_argument("--quick", action="store_true", help="only kernels with at most 128 channels")
    parser.add_argument("--matrix", action="store_true", help="only the large matrix")
    options = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}")
    if not options.matrix:
        kernels(options.quick)
    else:
        matrix()


if __name__ == "__main__":
    main()
