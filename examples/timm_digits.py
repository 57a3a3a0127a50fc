"""Handwritten digits, a small ResNet of timm: trained as it is, and with `apply_spectral`, by the same plain loop.

    python examples/timm_digits.py

Needs `pip install "spectral_hooks[timm]" scikit-learn`. The data comes with scikit-learn; nothing is downloaded.
Prints one table. Within a minute on one core.
"""

import argparse
import time
from typing import Any

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import spectral_hooks as sh
from spectral_hooks.integrations.timm import apply_spectral, remove_spectral

parser = argparse.ArgumentParser(description="Handwritten digits, timm's ResNet without and with apply_spectral.")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--quick", action="store_true", help="a tenth of the data, one epoch, few attack steps: not for figures")
args = parser.parse_args()
epochs, attack_steps = (1, 3) if args.quick else (args.epochs, 20)

RADII = (0.25, 0.5)

torch.set_num_threads(1)  # for images this small a second thread costs more than it brings

# -- data: 1797 images of 8×8 pixels in [0, 1] ---------------------------------------------------------------------------

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train, test = train_test_split(range(len(images)), test_size=400, stratify=labels, random_state=0)
if args.quick:
    train, test = train[::10], test[::10]


def network() -> nn.Module:
    """timm's resnet10t with few channels; it halves the size five times, so the images are enlarged first."""
    resnet = timm.create_model("resnet10t", in_chans=1, num_classes=10, channels=(16, 16, 32, 32), stem_width=16)
    return nn.Sequential(nn.Upsample(scale_factor=4, mode="bilinear"), resnet)


def fit(model: nn.Module) -> float:
    """Any loop, any optimizer; seconds per epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = len(train) // 128 or 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * batches)
    began = time.perf_counter()
    for _ in range(epochs):
        order = torch.tensor(train)[torch.randperm(len(train))]
        for batch in order[: 128 * batches].split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return (time.perf_counter() - began) / epochs


# -- what is measured ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def largest_norm(model: nn.Module) -> float:
    """The largest operator norm of all layers, certified for every input size."""
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return max(float(sh.spectral_norm(sh.as_operator(layer))) for layer in layers)


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model(x).argmax(dim=1) == y).float().mean())


def attack(model: nn.Module, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Projected gradient ascent of the loss in the ℓ2 ball around each image (Madry et al. 2018)."""
    delta = torch.zeros_like(x)
    for _ in range(attack_steps):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)
        delta = delta.detach() + 2.5 * radius / attack_steps * F.normalize(gradient.flatten(1)).view_as(x)
        delta = delta.flatten(1).renorm(p=2, dim=0, maxnorm=radius).view_as(x)
    return x + delta


# -- train twice: same seed, same everything, but for one line -----------------------------------------------------------

rows: list[Any] = []
for name in ("plain", "apply_spectral"):
    torch.manual_seed(0)
    model = network()
    if name == "apply_spectral":
        model = apply_spectral(model)  # norm at most 1, layer by layer, whatever the optimizer does
    seconds = fit(model)
    model = remove_spectral(model).eval()  # plain layers, plain state dict
    x, y = images[test], labels[test]
    attacked = [accuracy(model, attack(model, x, y, radius), y) for radius in RADII]
    rows.append((name, accuracy(model, x, y), largest_norm(model), *attacked, seconds))

print(f"""
                       test      largest   accuracy under ℓ2 attack     seconds
                   accuracy   layer norm       ε = {RADII[0]}     ε = {RADII[1]}   per epoch""")
for name, clean, norm, near, far, seconds in rows:
    print(f"{name:<16}{clean:>11.1%}{norm:>13.3f}{near:>15.1%}{far:>12.1%}{seconds:>12.2f}")
