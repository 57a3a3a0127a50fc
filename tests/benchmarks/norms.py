"""Norms of convolutions: time and tightness of every method, against NumPy FFT + SVD and others in the same run.

    python tests/benchmarks/norms.py [--quick] [--models] [--picture FILE]

Times are medians of a few calls. Ratios are what counts: machines differ and are shared. Peers are used when the environment
variable SPECTRAL_HOOKS_PEERS names a folder that holds clones of `conv_norm` (Grishina et al. 2024) and `lip4conv` (Delattre et
al. 2023, 2024).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import spectral_hooks as sh
from spectral_hooks import bounds, estimates


@dataclass
class Case:
    name: str
    weight: torch.Tensor
    size: int
    stride: int = 1
    groups: int = 1

    @property
    def lattice(self) -> sh.ConvOperator:
        return sh.ConvOperator(self.weight, stride=self.stride, groups=self.groups, padding=self.weight.shape[-1] // 2)

    @property
    def circular(self) -> sh.ConvOperator:
        return self.lattice.circular(self.size)


def kernel(kind: str, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Gaussian, or like a trained one: singular values that fall like a power, taps that fall off from the centre."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) / (shape[1] * shape[2] * shape[3]) ** 0.5
    if kind == "random" or shape[1] == 1:
        return weight
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    weight = ((u * torch.arange(1, len(s) + 1) ** -0.5) @ vh).reshape(shape)
    taps = torch.hann_window(shape[2] + 2, periodic=False)[1:-1]
    return weight * taps[:, None] * taps


SHAPES = [
    ("64x64x3x3@32", (64, 64, 3, 3), 32, 1, 1),
    ("256x256x3x3@16", (256, 256, 3, 3), 16, 1, 1),
    ("512x512x3x3@7", (512, 512, 3, 3), 7, 1, 1),
    ("64x3x7x7@112", (64, 3, 7, 7), 112, 1, 1),
    ("depthwise 256x1x3x3@14", (256, 1, 3, 3), 14, 1, 256),
    ("128x64x3x3/2@56", (128, 64, 3, 3), 56, 2, 1),
    ("64x64x3x3@112", (64, 64, 3, 3), 112, 1, 1),
]


def numpy_blocks(case: Case) -> np.ndarray:
    """The frequency blocks of the circular layer (Sedghi, Gupta, Long 2019; strided: one input channel for each phase)."""
    kernel = case.circular.canonical().numpy()  # (groups, rows, columns, k, k)
    rows = case.size // case.stride
    return np.moveaxis(np.fft.fft2(kernel, (rows, rows)), (3, 4), (0, 1))


def numpy_norm(case: Case) -> float:
    return float(np.linalg.svd(numpy_blocks(case), compute_uv=False).max())


def rfft_norm(case: Case) -> float:
    rows = case.size // case.stride
    blocks = torch.fft.rfft2(case.circular.canonical(), (rows, rows)).movedim((3, 4), (0, 1))
    return float(torch.linalg.svdvals(blocks).max())


def peers() -> dict[str, Callable[[Case], float]]:
    """Peers that take a plain stride-1 kernel on the CPU."""
    folder = os.environ.get("SPECTRAL_HOOKS_PEERS")
    found: dict[str, Callable[[Case], float]] = {}
    if not folder:
        return found
    conv_norm, lip4conv = _module(folder, "conv_norm"), _module(folder, "lip4conv")
    if conv_norm:
        found["conv_norm: tensor norm, 100 steps"] = lambda c: float(conv_norm.compute_tensor_norm(c.weight, s=c.stride))
        found["conv_norm: Singla & Feizi"] = lambda c: float(conv_norm.compute_singla_2021(c.weight, s=c.stride))
    if lip4conv:
        found["lip4conv: Delattre 2024"] = lambda c: float(lip4conv.compute_delattre2024(c.weight, return_time=False))
    return found


def _module(folder: str, name: str):
    path = Path(folder) / name / "bounds.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"peer_{name}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        print(f"peer {name} does not import: {error}")
        return None
    return module


#: name, what it says of the norm, function, and whether its number is that of the circular layer or of the lattice
METHODS: list[tuple[str, str, Callable[[Case], float], str]] = [
    ("NumPy FFT + SVD", "exact", numpy_norm, "circular"),
    ("torch rfft2 + svdvals", "exact", rfft_norm, "circular"),
    ("spectral_norm(circular)", "exact", lambda c: float(sh.spectral_norm(c.circular)), "circular"),
    ("100 power iterations", "estimate", lambda c: float(estimates.power_iteration(c.circular, steps=100)), "circular"),
    ("spectral_norm(lattice), 1e-3", "certified", lambda c: float(sh.spectral_norm(c.lattice)), "lattice"),
    ("bounds.cosine_grid", "certified", lambda c: float(bounds.cosine_grid(c.lattice)), "lattice"),
    ("bounds.gram_iteration", "certified", lambda c: float(bounds.gram_iteration(c.lattice)), "lattice"),
    ("bounds.kernel_gram", "certified", lambda c: float(bounds.kernel_gram(c.lattice)), "lattice"),
    ("bounds.unfolding", "certified", lambda c: float(bounds.unfolding(c.lattice)), "lattice"),
    ("bounds.tap_sum", "certified", lambda c: float(bounds.tap_sum(c.lattice)), "lattice"),
    ("bounds.frobenius_grid", "certified", lambda c: float(bounds.frobenius_grid(c.lattice)), "lattice"),
    ("bounds.absolute_sum", "certified", lambda c: float(bounds.absolute_sum(c.lattice)), "lattice"),
    (
        "estimates.tensor_norm, 100 steps",
        "estimate",
        lambda c: float(estimates.tensor_norm(c.lattice, steps=100, starts=1)),
        "lattice",
    ),
    ("estimates.reshaped_norm", "estimate", lambda c: float(estimates.reshaped_norm(c.lattice)), "lattice"),
]


def timed(function: Callable[[Case], float], case: Case) -> tuple[float, float]:
    """Value and median time: of five calls, or of fewer when they are slow."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < 3:
        start = time.perf_counter()
        value = function(case)
        times.append(time.perf_counter() - start)
    return value, statistics.median(times)


def table(cases: list[Case]) -> list[tuple[str, str, str, float, float]]:
    rows = []
    extra = [(name, "not certified", function, "lattice") for name, function in peers().items()]
    for case in cases:
        reference = {
            "circular": rfft_norm(Case(case.name, case.weight.double(), case.size, case.stride, case.groups)),
            "lattice": float(sh.spectral_norm(case.lattice, rtol=1e-5)),
        }
        print(f"\n{case.name}: norm {reference['circular']:.6f} circular, {reference['lattice']:.6f} lattice")
        print(f"  {'method':36s} {'says':14s} {'time':>10s} {'NumPy / it':>11s} {'value / norm':>13s}")
        base = None
        for name, says, function, of in METHODS + extra:
            if name.startswith(("lip4conv", "conv_norm")) and (case.groups > 1 or (case.stride > 1 and "lip4conv" in name)):
                continue
            value, seconds = timed(function, case)
            base = base or seconds
            ratio = value / reference[of]
            rows.append((case.name, name, says, seconds, ratio))
            print(f"  {name:36s} {says:14s} {seconds * 1e3:8.2f}ms {base / seconds:10.1f}x {ratio:13.6f}", flush=True)
    return rows


def models(quick: bool) -> None:
    """All convolutions and linear layers of whole models, certified, against NumPy FFT + SVD at two input sizes."""
    import timm

    for name, size in (("resnet18", 224), ("resnet50", 224), ("vit_small_patch16_224", 224)):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        places = layer_inputs(model, size)
        start = time.perf_counter()
        for layer, _ in places.values():
            sh.spectral_norm(sh.as_operator(layer))
        ours = time.perf_counter() - start
        print(f"\n{name}: {len(places)} layers certified to 1e-3 in {ours:.1f} s", flush=True)
        if name == "resnet18" and not quick:
            for scale in (1, 512 / 224):
                numpy = sum(numpy_time(layer, shape, scale) for layer, shape in places.values())
                print(
                    f"  NumPy FFT + SVD at input {round(size * scale)}: {numpy:.1f} s (scaled from 16 frequencies a layer), "
                    f"{numpy / ours:.1f}x ours"
                )


def layer_inputs(model: torch.nn.Module, size: int) -> dict[str, tuple[torch.nn.Module, tuple[int, ...]]]:
    """Each convolution and linear layer with the spatial size of its input."""
    found: dict[str, tuple[torch.nn.Module, tuple[int, ...]]] = {}

    def note(name: str):
        def hook(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = (layer, tuple(inputs[0].shape[2:]) if isinstance(layer, torch.nn.Conv2d) else ())

        return hook

    handles = [
        m.register_forward_pre_hook(note(n)) for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return found


def numpy_time(layer: torch.nn.Module, shape: tuple[int, ...], scale: float) -> float:
    """Seconds that NumPy FFT + SVD takes for a layer, from its FFT and the SVD of 16 of its frequencies."""
    kernel = sh.as_operator(layer).canonical().detach().numpy()
    if not shape:
        start = time.perf_counter()
        np.linalg.svd(kernel, compute_uv=False)
        return time.perf_counter() - start
    rows = [max(round(n * scale) // s, 1) for n, s in zip(shape, layer.stride, strict=True)]
    frequencies = rows[0] * rows[1]
    few = np.ascontiguousarray(np.moveaxis(np.fft.fft2(kernel, (4, 4)), (3, 4), (0, 1)))
    start = time.perf_counter()
    np.linalg.svd(few, compute_uv=False)
    return (time.perf_counter() - start) / 16 * frequencies


def picture(rows: list[tuple[str, str, str, float, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in dict.fromkeys(r[0] for r in rows) if "64x64" in name][:2]
    figure, axes = plt.subplots(1, len(names), figsize=(6.5 * len(names), 5), sharey=True, squeeze=False)
    marks = {"exact": "o", "certified": "s", "estimate": "^", "not certified": "x"}
    for axis, chosen in zip(axes[0], names, strict=True):
        for i, (_, method, says, seconds, ratio) in enumerate(r for r in rows if r[0] == chosen):
            axis.plot(seconds * 1e3, ratio, marks[says], color=plt.get_cmap("tab20")(i), label=f"{method} ({says})", markersize=8)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="time, ms", title=chosen)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("value / true norm (below 1: not a bound)")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"\npicture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the kernels with at most 128 channels, no models")
    parser.add_argument("--models", action="store_true", help="only the whole models")
    parser.add_argument("--picture", default="", help="save tightness against time here")
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, NumPy {np.__version__}, Python {sys.version.split()[0]}"
    )
    if not options.models:
        shapes = [s for s in SHAPES if not (options.quick and max(s[1][:2]) > 128 and s[4] == 1)]
        cases = [
            Case(f"{kind} {s[0]}", kernel(kind, s[1]), *s[2:])
            for s in shapes
            for kind in ("random", "trained-like")
            if not (kind == "trained-like" and s[1][1] == 1)
        ]
        rows = table(cases)
        if options.picture:
            picture(rows, options.picture)
    if not options.quick or options.models:
        models(options.quick)


if __name__ == "__main__":
    main()
