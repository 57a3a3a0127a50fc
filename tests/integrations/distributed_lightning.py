"""One process of those that `test_lightning_distributed.py` starts: `python distributed_lightning.py KIND FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from spectral_hooks.integrations.lightning import SpectralClip

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard

#: Samples of one update, over all processes.
BATCH = 8


def network() -> nn.Sequential:
    """No batch norm, whose statistics differ between processes; five outputs, which two processes cannot share evenly."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
        nn.Linear(12, 5),
    )


class Module(lightning.LightningModule):
    """Sharded as `kind` says, once the processes know each other."""

    def __init__(self, kind: str = "single") -> None:
        super().__init__()
        self.kind = kind
        torch.manual_seed(0)
        self.net = network()
        with torch.no_grad():
            for layer in self.net:
                if hasattr(layer, "weight"):
                    layer.weight.mul_(3)

    def configure_model(self) -> None:
        if isinstance(self.net[0].weight, DTensor):
            return
        if self.kind == "fsdp":
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if hasattr(layer, "weight"):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)
        if self.kind == "tensor":
            plan = {"5": ColwiseParallel(output_layouts=Replicate())}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Lightning cannot resume a sharded run whose optimizer has no state
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


class Record(lightning.Callback):
    """The whole weights after every step, as this process has them; listed last, after the projection."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.take(pl_module)
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.take(pl_module))

    def take(self, pl_module) -> None:
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in pl_module.state_dict().items()}
        self.steps.append({k: v.clone() for k, v in whole.items()})


def strategy_of(kind: str):
    return {
        "single": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo"),
        "tensor": lambda: ModelParallelStrategy(1, 2, save_distributed_checkpoint=False, process_group_backend="gloo"),
    }[kind]()


def train(kind: str, folder: Path, resume: Path | None = None) -> list[dict[str, Tensor]]:
    """Two epochs of four updates; every weight after every update, and one checkpoint after the first epoch."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4 * BATCH, 1, 8, 8, generator=generator)
    samples = TensorDataset(images, torch.randint(5, (4 * BATCH,), generator=generator))
    # Lightning's own sampler would shuffle
    shares = 2 if kind in ("ddp", "fsdp") else 1
    sampler = DistributedSampler(samples, shares, int(os.environ.get("RANK", 0)) % shares, shuffle=False)
    record = Record()
    saved = lightning.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1 if kind == "single" else 2,
        strategy=strategy_of(kind),
        max_epochs=2,
        use_distributed_sampler=False,
        callbacks=[SpectralClip(1.0), record, saved],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(kind), DataLoader(samples, batch_size=BATCH // shares, sampler=sampler), ckpt_path=resume)
    folder.mkdir(exist_ok=True)
    torch.save(record.steps, folder / f"steps-{trainer.global_rank}.pt")
    return record.steps


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    train(kind, folder)
    train(kind, folder / "resumed", resume=folder / "epoch=0.ckpt")
