"""Norms of convolutions: time and tightness of every method, against NumPy FFT + SVD and others in the same run.

    python tests/benchmarks/norms.py [--quick] [--only NAME | --models | --memory] [--picture FILE]

Times are medians of a few calls. Ratios are what counts: machines differ and are shared. Peers are used when the environment
variable SPECTRAL_HOOKS_PEERS names a folder that holds clones of `conv_norm` (Grishina et al. 2024), `lip4conv` (Delattre et al.
2023, 2024), `orthogonium` (Boissin et al. 2025) and `conv-sv` (Sedghi, Gupta, Long 2019, which needs tensorflow).
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

import spectral_hooks as sh
from spectral_hooks import bounds
from spectral_hooks.norms import estimates


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


#: A method of a peer: name, what it says of the norm, function, and whether its number is that of the circular layer or of the
#: lattice, as in `METHODS`; and which cases it takes.
Peer = tuple[str, str, Callable[[Case], float], str, Callable[[Case], bool]]


def peers() -> list[Peer]:
    """The methods of the peers that are there, on the CPU; a line for each that is not."""
    folder = os.environ.get("SPECTRAL_HOOKS_PEERS")
    if not folder:
        print("peers: none, SPECTRAL_HOOKS_PEERS is not set")
        return []
    found: list[Peer] = []

    def ungrouped(case: Case) -> bool:
        return case.groups == 1

    def plain(case: Case) -> bool:
        return case.groups == case.stride == 1

    def unstrided(case: Case) -> bool:
        return case.stride == 1

    # convolutions with kernels of 17 taps squared: at 256 channels they take minutes
    def plain_and_narrow(case: Case) -> bool:
        return plain(case) and min(case.weight.shape[:2]) <= 128

    def unstrided_and_narrow(case: Case) -> bool:
        return unstrided(case) and min(case.weight.shape[:2]) <= 128

    module = imported(folder, "conv-sv", "conv2d_singular_values")
    if module:
        values = module.SVD_Conv_Tensor_NP

        def exact(case: Case) -> float:
            return float(values(case.weight.numpy().transpose(2, 3, 0, 1), (case.size, case.size)).max())

        found.append(("conv-sv: Sedghi, Gupta, Long", "exact", exact, "circular", plain))
    module = imported(folder, "conv_norm", "bounds")
    if module:
        tensor, unfoldings = module.compute_tensor_norm, module.compute_singla_2021
        uncertified = "not certified"
        found += [
            (
                "conv_norm: tensor norm, 100 steps",
                uncertified,
                lambda c: float(tensor(c.weight, s=c.stride)),
                "lattice",
                ungrouped,
            ),
            ("conv_norm: Singla & Feizi", uncertified, lambda c: float(unfoldings(c.weight, s=c.stride)), "lattice", ungrouped),
        ]
    module = imported(folder, "lip4conv", "bounds")
    if module:
        # its method of 2023 needs a GPU
        zero = module.compute_delattre2024
        found.append(
            ("lip4conv: Delattre 2024", "bound", lambda c: float(zero(c.weight, return_time=False)), "lattice", plain_and_narrow)
        )
    module = imported(folder, "orthogonium", "orthogonium.layers.conv.singular_values")
    if module:

        def largest(case: Case, padding: str, steps: int) -> float:
            # it takes the product over groups unless told to list them
            layer = SimpleNamespace(weight=case.weight, groups=case.groups, stride=(1, 1), padding_mode=padding)
            options = {"agg_groups": False, "return_stab_rank": False, "device": "cpu", "imsize": case.size}
            return max(float(value) for value in module.get_conv_sv(layer, steps, **options))

        found += [
            ("orthogonium: Delattre 2024", "bound", lambda c: largest(c, "zeros", 4), "lattice", unstrided_and_narrow),
            ("orthogonium: Delattre 2023", "bound", lambda c: largest(c, "circular", 6), "circular", unstrided),
        ]
    return found


def imported(folder: str, name: str, module: str) -> ModuleType | None:
    """A module of a peer's clone, whose folder is on the path while it is imported; None, and a line that says why, without."""
    path = Path(folder) / name
    if not path.is_dir():
        print(f"peer {name}: skipped, there is no {path}")
        return None
    # other peers have files of the same names
    before = set(sys.modules)
    sys.path.insert(0, str(path))
    try:
        return importlib.import_module(module)
    except Exception as error:
        print(f"peer {name}: skipped, it does not import: {error}")
        return None
    finally:
        sys.path.remove(str(path))
        for new in set(sys.modules) - before:
            file = getattr(sys.modules[new], "__file__", None)
            if file and Path(file).is_relative_to(path):
                del sys.modules[new]


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
    extra = peers()
    for case in cases:
        reference = {
            "circular": rfft_norm(Case(case.name, case.weight.double(), case.size, case.stride, case.groups)),
            "lattice": float(sh.spectral_norm(case.lattice, rtol=1e-5)),
        }
        print(f"\n{case.name}: norm {reference['circular']:.6f} circular, {reference['lattice']:.6f} lattice")
        print(f"  {'method':36s} {'says':14s} {'time':>10s} {'NumPy / it':>11s} {'value / norm':>13s}")
        base = None
        for name, says, function, of in METHODS + [peer[:4] for peer in extra if peer[4](case)]:
            value, seconds = timed(function, case)
            base = base or seconds
            ratio = value / reference[of]
            rows.append((case.name, name, says, seconds, ratio))
            print(f"  {name:36s} {says:14s} {seconds * 1e3:8.2f}ms {base / seconds:10.1f}x {ratio:13.6f}", flush=True)
    return rows


def models(quick: bool) -> None:
    """All convolutions and linear layers of whole models, certified, against NumPy FFT + SVD."""
    import timm

    for name, sizes in (("resnet18", (224, 512)), ("resnet50", (224,)), ("vit_small_patch16_224", (224,))):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        places = layer_inputs(model, sizes[0])
        seconds: dict[str, float] = {}
        for place, (layer, _) in places.items():
            start = time.perf_counter()
            sh.spectral_norm(sh.as_operator(layer))
            seconds[place] = time.perf_counter() - start
        ours = sum(seconds.values())
        print(f"\n{name}: {len(places)} layers certified to 1e-3 in {ours:.1f} s; the slowest:", flush=True)
        for place in sorted(seconds, key=lambda place: -seconds[place])[:5]:
            layer = places[place][0]
            shape = "x".join(map(str, layer.weight.shape)) + ("/2" if getattr(layer, "stride", (1,)) == (2, 2) else "")
            print(f"  {seconds[place]:8.3f} s  {place} ({shape})")
        if quick:
            continue
        each = {place: numpy_time(layer) for place, (layer, shape) in places.items()}
        for size in sizes:
            numpy = sum(each[place] * frequencies(*places[place], size / sizes[0]) for place in places)
            about = f"{numpy:.1f} s (scaled from a few frequencies a layer), {numpy / ours:.1f}x ours"
            print(f"  NumPy FFT + SVD at input {size}: {about}", flush=True)


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


def frequencies(layer: torch.nn.Module, shape: tuple[int, ...], scale: float) -> int:
    """Of the circular layer, at an input size scaled so."""
    if not shape:
        return 1
    return prod(max(round(n * scale) // s, 1) for n, s in zip(shape, layer.stride, strict=True))


def numpy_time(layer: torch.nn.Module) -> float:
    """Seconds that NumPy's SVD takes for one frequency of a layer, from 16 of them, or from 4 where they are large; no FFT."""
    kernel = sh.as_operator(layer).canonical().detach().numpy()
    if kernel.ndim == 3:
        start = time.perf_counter()
        np.linalg.svd(kernel, compute_uv=False)
        return time.perf_counter() - start
    per_axis = 4 if min(kernel.shape[1:3]) <= 128 else 2
    few = np.ascontiguousarray(np.moveaxis(np.fft.fft2(kernel, (per_axis, per_axis)), (3, 4), (0, 1)))
    start = time.perf_counter()
    np.linalg.svd(few, compute_uv=False)
    return (time.perf_counter() - start) / per_axis**2


#: The largest layers of ResNet-18, ResNet-50 and ViT-small, and small ones to try the table with: shape and stride.
LARGE_LAYERS = {
    "512x512x3x3": ((512, 512, 3, 3), 1),
    "512x512x3x3/2": ((512, 512, 3, 3), 2),
    "2048x512x1x1": ((2048, 512, 1, 1), 1),
    "2048x1024x1x1/2": ((2048, 1024, 1, 1), 2),
    "1000x2048": ((1000, 2048), 1),
    "64x3x7x7/2": ((64, 3, 7, 7), 2),
}
SMALL_LAYERS = {"64x64x3x3": ((64, 64, 3, 3), 1), "100x200": ((100, 200), 1)}

OPERATOR_METHODS: dict[str, Callable[[sh.LinearOperator], torch.Tensor]] = {
    "spectral_norm": sh.spectral_norm,
    **{name: getattr(bounds, name) for name in (
        "cosine_grid", "gram_iteration", "kernel_gram", "unfolding", "tap_sum", "frobenius_grid", "absolute_sum"
    )},
    "tensor_norm": estimates.tensor_norm,
    "reshaped_norm": estimates.reshaped_norm,
    "clip": sh.projections.clip,
}  # fmt: skip


def memory(quick: bool) -> None:
    """The peak of what each method allocates, above the weight and the process as it is before, each in a process of its own."""
    layers = SMALL_LAYERS if quick else LARGE_LAYERS
    print("\nPeak memory above the weight, MiB: of the value, and of value and gradient")
    print(f"  {'method':16s}" + "".join(f"{name:>18s}" for name in layers))
    for method in OPERATOR_METHODS:
        cells = []
        for layer in layers:
            peaks = [peak_in_a_process(method, layer, gradient) for gradient in ((False,) if method == "clip" else (False, True))]
            cells.append(" / ".join(peaks))
        print(f"  {method:16s}" + "".join(f"{cell:>18s}" for cell in cells), flush=True)


def peak_in_a_process(method: str, layer: str, gradient: bool) -> str:
    command = [sys.executable, __file__, "--peak-of", method, layer, str(int(gradient))]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def peak_of(method: str, layer: str, gradient: bool) -> int:
    """MiB by which a method raises the largest resident size of this process."""
    import resource

    function = OPERATOR_METHODS[method]
    shape, stride = (LARGE_LAYERS | SMALL_LAYERS)[layer]
    torch.manual_seed(0)
    weight = (torch.randn(shape) / (3 * shape[1]) ** 0.5).requires_grad_(gradient)

    def operator(weight: torch.Tensor) -> sh.LinearOperator:
        return sh.DenseOperator(weight) if weight.ndim == 2 else sh.ConvOperator(weight, stride=stride)

    small = torch.randn(4, 4, *shape[2:]).requires_grad_(gradient)
    value = function(operator(small))  # what is loaded at the first call
    if gradient:
        value.backward()
    unit = 1 if sys.platform == "darwin" else 1024
    status = Path("/proc/self/statm")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    before = int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else peak
    value = function(operator(weight))
    if gradient:
        value.backward()
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before, 0) // 2**20


#: One for every method of the table.
MARKERS = ["o", "s", "^", "v", "D", "P", "X", "<", ">", "*", "p", "h", "H", "d", "8", "1", "2", "3", "4", "+", "x"]


def picture(rows: list[tuple[str, str, str, float, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    chosen = [name for name in dict.fromkeys(r[0] for r in rows) if "64x64" in name][:2]
    methods = list(dict.fromkeys((method, says) for name, method, says, *_ in rows if name in chosen))
    figure, axes = plt.subplots(1, len(chosen), figsize=(5.5 * len(chosen) + 3.5, 6), sharey=True, squeeze=False)
    colours = plt.get_cmap("tab20")
    for axis, name in zip(axes[0], chosen, strict=True):
        for case, method, says, seconds, ratio in rows:
            if case != name:
                continue
            i = methods.index((method, says))
            style = {"markersize": 10, "markeredgewidth": 2 if MARKERS[i % len(MARKERS)] in "1234+x" else 0.6}
            axis.plot(
                seconds * 1e3,
                ratio,
                linestyle="none",
                marker=MARKERS[i % len(MARKERS)],
                color=colours(i % 20),
                markeredgecolor=colours(i % 20) if style["markeredgewidth"] == 2 else "black",
                label=f"{method} ({says})",
                zorder=3,
                **style,
            )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="time, ms")
        axis.set_title(name, fontsize=12)
        axis.yaxis.set_major_locator(FixedLocator([0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20]))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("value / true norm (below 1: not a bound)", fontsize=11)
    entries: dict[str, object] = {}
    for axis in axes[0]:
        handles, labels = axis.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    axes[0][-1].legend(entries.values(), entries.keys(), fontsize=9, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"\npicture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the kernels with at most 128 channels, no models")
    parser.add_argument("--only", default="", help="only the kernels with this in their names, no models")
    parser.add_argument("--models", action="store_true", help="only the whole models")
    parser.add_argument("--memory", action="store_true", help="only the peak memory of every method at the largest layers")
    parser.add_argument("--peak-of", nargs=3, metavar=("METHOD", "LAYER", "GRADIENT"), help=argparse.SUPPRESS)
    parser.add_argument("--picture", default="", help="save tightness against time here")
    options = parser.parse_args()
    if options.peak_of:
        method, layer, gradient = options.peak_of
        print(peak_of(method, layer, gradient == "1"))
        return
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, NumPy {np.__version__}, Python {sys.version.split()[0]}"
    )
    if options.memory:
        memory(options.quick)
        return
    if not options.models:
        shapes = [s for s in SHAPES if not (options.quick and max(s[1][:2]) > 128 and s[4] == 1)]
        cases = [
            Case(f"{kind} {s[0]}", kernel(kind, s[1]), *s[2:])
            for s in shapes
            for kind in ("random", "trained-like")
            if not (kind == "trained-like" and s[1][1] == 1) and options.only in f"{kind} {s[0]}"
        ]
        rows = table(cases)
        if options.picture:
            picture(rows, options.picture)
    if options.models or not (options.quick or options.only):
        models(options.quick)


if __name__ == "__main__":
    main()
