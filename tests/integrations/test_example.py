"""`example=` in the frameworks: the same guarantee at the recorded size, in what training leaves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import observers
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spectral_hooks as sh

IMAGES = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3
ROUNDING = 1e-6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(36, 3)
    )


def check_bounded_at_the_size_alone(model: nn.Sequential, bound: float) -> None:
    norms = [observers.finite_norm(model[0], (6, 6)), observers.finite_norm(model[2], (6, 6))]
    assert max(norms) <= bound * (1 + ROUNDING)
    assert max(observers.lattice_norm(model[i]) for i in (0, 2)) > bound * 1.001  # else this would not see `example` being lost


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from spectral_hooks.integrations.lightning import SpectralClip

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return -self(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.5)

    def fit(module: Any, epochs: int, checkpoint: str | None = None) -> Any:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[SpectralClip(0.7, slack=0, example=IMAGES)],
        )
        trainer.fit(module, DataLoader(TensorDataset(IMAGES), batch_size=4), ckpt_path=checkpoint)
        return trainer

    straight, halfway, resumed = Module(), Module(), Module()
    fit(straight, 4)
    check_bounded_at_the_size_alone(straight.net, 0.7)
    trainer = fit(halfway, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    assert saved["SpectralClip(0.7, slack=0.0, example=(8, 2, 6, 6))"]["sizes"] == {"net.0": ((6, 6),), "net.2": ((6, 6),)}
    fit(resumed, 4, str(tmp_path / "half.ckpt"))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from spectral_hooks.integrations.transformers import SpectralClip

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            logits = self.net(pixel_values)
            return {"loss": -logits.square().mean(), "logits": logits}

    rows = [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]
    batch = transformers.default_data_collator(rows)
    clip = SpectralClip(0.7, slack=0, example=batch)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, learning_rate=0.1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
    )
    model = Model()
    transformers.Trainer(model, args, train_dataset=rows, callbacks=[clip]).train()
    check_bounded_at_the_size_alone(model.net, 0.7)
    assert repr(clip) == "SpectralClip(0.7, slack=0.0, example={'pixel_values': (8, 2, 6, 6), 'labels': (8,)})"
    assert "6×6" in clip.report()


def test_timm_and_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("timm")
    from spectral_hooks.integrations.timm import apply_spectral

    once = apply_spectral(network(), "clip", max_norm=0.3, example=IMAGES)
    check_bounded_at_the_size_alone(once, 0.3)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # another test may have set another precision
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(network())  # with a forward around its own
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    before = copy.deepcopy(model.state_dict())
    clip = sh.SpectralClip(1000.0, example=IMAGES)
    clip.start(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "6×6" in clip.report()
