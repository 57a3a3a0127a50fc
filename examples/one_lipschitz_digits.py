"""Handwritten digits with a certificate: a convolutional network of Lipschitz constant 1, beside the same one unconstrained.

    python examples/one_lipschitz_digits.py

Needs `pip install spectral_hooks scikit-learn`. The data comes with scikit-learn; nothing is downloaded. Prints one table, within
a minute on one core.

If no layer has a norm above 1 and the activations keep lengths, a change of the image by `ε` (ℓ2) changes the difference of two
scores by at most `√2 L ε`, `L = 1`. So the decision is certain within the radius `(score of the class - next score) / (√2 L)`,
with `L` the product of the norms.
"""

import argparse
import time
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import spectral_hooks as sh
from spectral_hooks.parametrizations.orthogonal import orthogonal

parser = argparse.ArgumentParser(description="Handwritten digits with certified radii.")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--quick", action="store_true", help="a fifth of the data, three epochs: not for figures")
args = parser.parse_args()

RADII = (0.125, 0.25, 0.5)
TEMPERATURE = 4.0  # scores of a network with Lipschitz constant 1 lie close together

torch.set_num_threads(1)  # for 8×8 images a second thread costs more than it brings

# -- data: 1797 images of 8×8 pixels in [0, 1] ---------------------------------------------------------------------------

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train, test = train_test_split(range(len(images)), test_size=400, stratify=labels, random_state=0)
if args.quick:
    train, test = train[::5], test[::5]


# -- the network -----------------------------------------------------------------------------------------------------------


class MaxMin(nn.Module):
    """Sorts pairs of channels (Anil, Lucas and Grosse 2019): Lipschitz constant 1, and gradients keep their length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), MaxMin(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), MaxMin(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), MaxMin(),
        nn.Flatten(), nn.Linear(256, 128), MaxMin(), nn.Linear(128, 10),
    )  # fmt: skip


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


# -- what is measured ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def lipschitz(model: nn.Module) -> float:
    """The product of the layers' operator norms, each certified for every input size."""
    return prod(float(sh.spectral_norm(sh.as_operator(layer), rtol=1e-3)) for layer in layers(model))


@torch.no_grad()
def certified_radii(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How far each image may move without a change of its right decision; negative where it is wrong."""
    scores = model(x)
    right = scores.gather(1, y[:, None]).squeeze(1)
    others = scores.scatter(1, y[:, None], float("-inf")).amax(1)
    return (right - others) / (2**0.5 * lipschitz(model))


def attacked(model: nn.Module, x: torch.Tensor, y: torch.Tensor, radius: float, steps: int) -> float:
    """Accuracy after projected gradient ascent of the loss in the ℓ2 ball around each image (Madry et al. 2018)."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(TEMPERATURE * model(x + delta), y), delta)
        delta = delta.detach() + 2.5 * radius / steps * F.normalize(gradient.flatten(1)).view_as(x)
        delta = delta.flatten(1).renorm(p=2, dim=0, maxnorm=radius).view_as(x)
    return accuracy(model, x + delta, y)


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model(x).argmax(dim=1) == y).float().mean())


# -- train twice: same seed, same everything, but for the parametrization --------------------------------------------------


def fit(model: nn.Module) -> None:
    epochs = 3 if args.quick else args.epochs
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(train)).split(64):
            chosen = torch.tensor(train)[batch]
            loss = F.cross_entropy(TEMPERATURE * model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


rows: list[tuple[Any, ...]] = []
for name in ("plain", "orthogonal"):
    torch.manual_seed(0)
    model = network()
    if name == "orthogonal":
        for layer in layers(model):
            orthogonal(layer)
    began = time.perf_counter()
    fit(model)
    seconds = time.perf_counter() - began
    x, y = images[test], labels[test]
    radii = certified_radii(model, x, y)
    certified = [float((radii > radius).float().mean()) for radius in RADII]
    under_attack = attacked(model, x, y, RADII[-1], steps=5 if args.quick else 50)
    rows.append((name, accuracy(model, x, y), lipschitz(model), *certified, under_attack, seconds))

print(f"""
                  test   Lipschitz        certified accuracy (ℓ2)     attacked
              accuracy       bound   ε = {RADII[0]:<5}  ε = {RADII[1]:<5}  ε = {RADII[2]:<5}  ε = {RADII[2]:<5}  seconds""")
for name, clean, bound, *certified, under_attack, seconds in rows:
    shares = "".join(f"{share:>10.1%}" for share in certified)
    print(f"{name:<11}{clean:>11.1%}{bound:>12.4g}{shares}{under_attack:>11.1%}{seconds:>9.1f}")
