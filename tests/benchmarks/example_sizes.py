"""The bound at the real input size beside that of every size: what a projection costs and how much of the weights it keeps.

    python tests/benchmarks/example_sizes.py [--size 32] [--steps 4]

timm's resnet18 with 10 classes, random weights, batch 16, AdamW at 1e-3, one thread. Processor time, so that a busy machine does
not matter much. "kept": the Frobenius norm of all weights after the first clip over that before it. "at the size": the mean and
the largest norm of the convolutions with several taps at their own input size, matrix-free: how much of the bound is used.
"""

from __future__ import annotations

import argparse
import time

import timm
import torch

import spectral_hooks as sh


def measured(size: int, steps: int, sized: bool) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    images, labels = torch.randn(16, 3, size, size), torch.randint(10, (16,))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sizes = sh.SpectralClip(example=images)
    inputs = {target.name: target.sizes for target in sizes.choose(model).targets}
    clip = sh.SpectralClip(1.0, example=images if sized else None)

    def length() -> float:
        return float(torch.stack([target.layers[0].weight.norm() for target in clip.targets]).norm())

    before = float(torch.stack([model.get_submodule(name).weight.norm() for name in inputs]).norm())
    start = time.process_time()
    clip.attach(model, optimizer)
    attached = time.process_time() - start
    kept = length() / before
    norms = [
        float(sh.spectral_norm(sh.as_operator(layer, input_size=each[0])))
        for of_layer in inputs.values()
        for layer, each in of_layer.items()
    ]
    spent, plain = [], []
    act = clip.after_step

    def timed() -> None:
        start = time.process_time()
        act()
        spent.append(time.process_time() - start)

    clip.after_step = timed
    for _ in range(steps):
        start = time.process_time()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        plain.append(time.process_time() - start)
        optimizer.step()
    figures = (sum(spent) / steps, sum(plain) / steps, kept, sum(norms) / len(norms), max(norms))
    return (
        f"| {size}², {'`example=`' if sized else 'every size'} | {attached:.1f} s | {figures[0]:.2f} s | {figures[1]:.2f} s | "
        f"{figures[2]:.3f} | {figures[3]:.2f}, {figures[4]:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs="*", default=[32, 96])
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| bound | attach | projection a step | forward and backward | kept | at the size |\n|---|---|---|---|---|---|")
    for size in options.size:
        for sized in (True, False):
            print(measured(size, options.steps, sized), flush=True)


if __name__ == "__main__":
    main()
