"""Handwritten digits, a small residual network, Lightning: trained as it is, and with SpectralClip(1.0) as a callback.

    python examples/quickstart.py

Needs `pip install "spectral_hooks[lightning,plot]" scikit-learn`. The data comes with scikit-learn; nothing is downloaded.
Prints one table and saves `singular_values.png` beside this file. Within a minute on two idle cores.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import spectral_hooks as sh
from spectral_hooks.integrations.lightning import SpectralClip

parser = argparse.ArgumentParser(description="Handwritten digits without and with SpectralClip.")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--quick", action="store_true", help="a tenth of the data, few attack steps: not for figures")
parser.add_argument("--picture", default=Path(__file__).with_name("singular_values.png"), help="where to save it")
args = parser.parse_args()

MAX_NORM, RADII = 1.0, (0.25, 0.5)

torch.set_num_threads(1)  # for 8×8 images a second thread costs more than it brings
for name in ("lightning.pytorch", "pytorch_lightning"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
plt.switch_backend("Agg")  # no window needed

# -- data: 1797 images of 8×8 pixels in [0, 1] ---------------------------------------------------------------------------

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train, test = train_test_split(range(len(images)), test_size=400, stratify=labels, random_state=0)
if args.quick:
    train, test = train[::10], test[::10]


# -- a small residual network: stride, 1×1 shortcuts, batch norm ---------------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# -- what is measured ----------------------------------------------------------------------------------------------------


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}


@torch.no_grad()
def largest_norm(model: nn.Module) -> float:
    """The largest operator norm of all layers, certified for every input size."""
    return max(float(sh.spectral_norm(sh.as_operator(layer))) for layer in layers(model).values())


@torch.no_grad()
def all_singular_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of each layer as it acts here: on the input size that one forward shows, with its zero padding."""
    sizes: dict[nn.Module, torch.Size] = {}
    record = register_module_forward_pre_hook(lambda module, inputs: sizes.update({module: inputs[0].shape[2:]}))
    model(images[:1])
    record.remove()
    return {name: sh.singular_values(sh.as_operator(layer, sizes[layer] or None)) for name, layer in layers(model).items()}


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model(x).argmax(dim=1) == y).float().mean())


def attack(model: nn.Module, x: torch.Tensor, y: torch.Tensor, radius: float, steps: int) -> torch.Tensor:
    """Projected gradient ascent of the loss in the ℓ2 ball around each image (Madry et al. 2018)."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)
        delta = delta.detach() + 2.5 * radius / steps * F.normalize(gradient.flatten(1)).view_as(x)
        delta = delta.flatten(1).renorm(p=2, dim=0, maxnorm=radius).view_as(x)
    return x + delta


# -- train twice: same seed, same everything, but for the callback -------------------------------------------------------

rows, spectra = [], {}
for name, callbacks in {"plain": [], f"SpectralClip({MAX_NORM})": [SpectralClip(MAX_NORM)]}.items():
    print(name, flush=True)
    torch.manual_seed(0)
    model = Classifier()
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=128, shuffle=True, drop_last=True)
    norm_at_start = largest_norm(model)
    trainer = Trainer(
        max_epochs=args.epochs, accelerator="cpu", callbacks=callbacks,
        logger=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(model, loader)
    seconds = (time.perf_counter() - began) / args.epochs

    model.eval()
    x, y = images[test], labels[test]
    attacked = [accuracy(model, attack(model, x, y, radius, steps=5 if args.quick else 50), y) for radius in RADII]
    rows.append((name, accuracy(model, x, y), norm_at_start, largest_norm(model), *attacked, seconds))
    spectra[name] = all_singular_values(model)


# -- one table, one picture ----------------------------------------------------------------------------------------------

print(f"""
                         test   largest operator norm   accuracy under ℓ2 attack     seconds
                     accuracy     at start     at end       ε = {RADII[0]}     ε = {RADII[1]}   per epoch""")
for name, clean, start, end, near, far, seconds in rows:
    print(f"{name:<18}{clean:>11.1%}{start:>13.3f}{end:>11.3f}{near:>15.1%}{far:>12.1%}{seconds:>12.2f}")

figure, axes = plt.subplots(2, 5, figsize=(14, 6), layout="constrained", sharex=True, sharey=True)
for axis, (layer, module) in zip(axes.flat, layers(model).items(), strict=True):
    for (name, values), color in zip(spectra.items(), ("tab:gray", "tab:blue"), strict=True):
        axis.plot(torch.linspace(0, 100, len(values[layer])), values[layer], color=color, linewidth=2, label=name)
    axis.axhline(MAX_NORM, color="tab:red", linewidth=1, linestyle="--", label="bound")
    kind = "{}×{}, stride {}".format(*module.kernel_size, module.stride[0]) if isinstance(module, nn.Conv2d) else "linear"
    axis.set_title(f"{layer}\n{kind}", fontsize=11)
axes[0, 0].set_ylim(bottom=0)
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=12)
figure.supxlabel("singular values of the layer, largest to smallest, in % of their number")
figure.supylabel("singular value")
figure.savefig(args.picture, dpi=120)
print(f"\nSingular values of each layer, without and with: {args.picture}")
