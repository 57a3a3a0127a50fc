"""Seconds per training step without and with SpectralClip, in the same run.

    python tests/benchmarks/training.py [--models resnet20 resnet18 vit_tiny gpt] [--steps N] [--lr X] [--threads N]

Each model is attached and trained a little first, so that the figures are those of steady training. Plain and clipped steps
alternate in blocks, and the medians of the steps are compared: machines are shared. The plain model is clipped once too, so both
start from the same weights. What the weights do decides what the clip
costs: the data are scikit-learn's digits, enlarged, and the learning rate is given.

`gpt` is the transformer of `transformer.py` under AdamW, whose linear layers start with all singular values at the bound. It is
measured from there, without a warm-up, over at most 20 steps. The share that is still at the bound at the end, in the layer with
the fewest, is shown; where less than a quarter is, the command fails, for another state was measured.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import transformer
from sklearn.datasets import load_digits
from torch import nn

import spectral_hooks as sh

#: Of the singular values of a transformer's layer, how many must be at the bound. AdamW 1e-3 leaves 37 % after 25 steps.
LEAST_SHARE = 1 / 4


class Block(nn.Module):
    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.pad = channels - before
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.pad)))


def resnet20() -> nn.Module:
    """He et al. 2016, for 32×32 images."""
    widths = [16] * 3 + [32] * 3 + [64] * 3
    blocks = [Block(before, width, 2 if before != width else 1) for before, width in zip([16, *widths], widths, strict=False)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def setting(name: str, max_norm: float) -> tuple[nn.Module, Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """The model and its data."""
    if name == "gpt":
        model = transformer.gpt()
        with torch.no_grad():
            for layer in transformer.linear_layers(model):
                layer.weight.mul_(max_norm)
        return model, letters()
    if name == "resnet20":
        return resnet20(), batches(128, 32)
    import timm

    full = {"resnet18": "resnet18", "vit_tiny": "vit_tiny_patch16_224"}[name]
    return timm.create_model(full, num_classes=10), batches(16, 224)


def batches(size: int, pixels: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of scikit-learn's digits, enlarged, as three channels, shifted a little."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randint(len(images), (size,), generator=generator)
        shift = torch.randint(-pixels // 8, pixels // 8 + 1, (2,), generator=generator).tolist()
        large = F.interpolate(images[chosen], size=pixels, mode="bilinear").roll(shift, (2, 3))
        yield large.expand(-1, 3, -1, -1).contiguous() - 0.3, labels[chosen]


def letters() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches for the transformer: letters, and those that follow."""
    generator = torch.Generator().manual_seed(0)
    while True:
        batch = transformer.batch(generator)
        yield batch[:, :-1], batch[:, 1:]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    start = time.perf_counter()
    loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


def optimizer_for(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if name == "gpt":
        return torch.optim.AdamW(model.parameters(), lr=lr / 10)
    if name == "vit_tiny":
        return torch.optim.AdamW(model.parameters(), lr=lr / 100, weight_decay=0.05)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def measure(name: str, options: argparse.Namespace) -> None:
    """The rows of one model."""
    torch.manual_seed(0)
    model, data = setting(name, options.max_norm)
    warm_up, settle, steps = (0, 5, min(options.steps, 20)) if name == "gpt" else (options.warm_up, 10, options.steps)
    optimizer = optimizer_for(name, model, options.lr)
    start = time.perf_counter()
    handle = sh.SpectralClip(options.max_norm).attach(model, optimizer)
    print(f"\n{name}: attached in {time.perf_counter() - start:.2f} s", flush=True)
    for _ in range(warm_up):
        step(model, optimizer, *next(data))
    handle.remove()
    runs: dict[int | None, tuple[nn.Module, torch.optim.Optimizer, list[float]]] = {}
    for every in (None, 1, 10):
        copied = copy.deepcopy(model)
        optimizer = optimizer_for(name, copied, options.lr)
        if every is not None:
            sh.SpectralClip(options.max_norm, every=every).attach(copied, optimizer)
        runs[every] = (copied, optimizer, [])
    for n in range(steps + settle):
        batch = next(data)
        for copied, optimizer, times in runs.values():
            seconds = step(copied, optimizer, *batch)
            if n >= settle:
                times.append(seconds)
    base = statistics.mean(runs[None][2])
    for every, (copied, _, times) in runs.items():
        what = "plain" if every is None else f"every={every}"
        mean, middle = statistics.mean(times), statistics.median(times)
        print(
            f"  {what:9} {1e3 * mean:8.1f} ms a step (median {1e3 * middle:.1f}), {100 * (mean / base - 1):+6.1f} %, "
            f"largest norm {largest_norm(copied):.3f}{at_the_bound(copied, options.max_norm) if name == 'gpt' and every else ''}",
            flush=True,
        )


@torch.no_grad()
def largest_norm(model: nn.Module) -> float:
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return max(float(sh.spectral_norm(sh.as_operator(layer), rtol=1e-2)) for layer in layers)


def at_the_bound(model: nn.Module, max_norm: float) -> str:
    """The share of singular values above 0.95 of the bound, in the linear layer with the fewest, as a text."""
    share = min(transformer.share_above(layer, 0.95 * max_norm) for layer in transformer.linear_layers(model))
    if share < LEAST_SHARE:
        raise SystemExit(f"only {share:.0%} of a layer's singular values are at the bound: this measures another state")
    return f", {share:.0%} of the singular values at the bound"


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of SpectralClip in training.")
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet18", "vit_tiny", "gpt"])
    parser.add_argument("--warm-up", type=int, default=60, help="steps with the clip before the measured ones, not of gpt")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--lr", type=float, default=0.01, help="of SGD with momentum 0.9; for AdamW a hundredth of it (vit_tiny) or a tenth (gpt)"
    )
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, Python {sys.version.split()[0]}, lr {options.lr}")
    for name in options.models:
        measure(name, options)


if __name__ == "__main__":
    main()
