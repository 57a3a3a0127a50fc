"""Lightning: real fits in which an observer of its own, by dense float64 sampling, finds every layer inside the bound."""

from __future__ import annotations

import copy
import csv
import pickle
import typing
import warnings
from collections.abc import Callable
from functools import partial
from itertools import accumulate, cycle, product
from pathlib import Path

import pytest
import torch
from counting import OPTIONS, WRONG, Counting
from torch import Tensor, nn

lightning = pytest.importorskip("lightning.pytorch")
legacy = pytest.importorskip("pytorch_lightning")

from lightning.pytorch import callbacks as pl_callbacks  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning, StochasticWeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import spectral_hooks as sh  # noqa: E402
from spectral_hooks.hooks import base, pace, progress  # noqa: E402
from spectral_hooks.hooks.pace import Pace  # noqa: E402
from spectral_hooks.integrations.lightning import HookCallback, SpectralClip  # noqa: E402
from spectral_hooks.integrations.shared import ClipOptions  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*"),
    pytest.mark.filterwarnings("ignore:.*fp16 is not supported on CPU.*"),
]

TOLERANCE = 1e-6

#: Lightning has them from 2.6 on.
EMAWeightAveraging, WeightAveraging = (getattr(pl_callbacks, f"{name}WeightAveraging", None) for name in ("EMA", ""))
averaging = pytest.mark.skipif(WeightAveraging is None, reason="this version of Lightning does not average weights")


# -- the model, and an independent observer ---------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """One layer of each kind: padding, stride and groups, batch norm, a matrix."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


class Steps:
    """A training step and an optimizer that leave the ball at every step, for the LightningModule of either namespace."""

    learning_rate = 0.5
    kind = torch.optim.SGD

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = network()
        with torch.no_grad():
            for layer in layers_of(self).values():
                layer.weight.mul_(3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0].to(self.net[0].weight.dtype)), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kind(self.parameters(), lr=self.learning_rate)


class Module(Steps, lightning.LightningModule):
    pass


class LegacyModule(Steps, legacy.LightningModule):
    pass


def data(batches: int = 4, batch_size: int = 8, same: bool = False) -> DataLoader:
    """Noise with labels; with `same`, every batch is the same one, so that order does not matter."""
    generator = torch.Generator().manual_seed(1)
    count = batch_size if same else batches * batch_size
    x = torch.randn(count, 1, 8, 8, generator=generator)
    y = torch.randint(4, (count,), generator=generator)
    if same:
        x, y = x.repeat(batches, 1, 1, 1), y.repeat(batches)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}


def sampled_norm(layer: nn.Module, points: int = 24) -> float:
    """The norm of a layer from nothing but its definition: a fine float64 frequency sampling, never above the true one.

    A stride `s` folds `s²` frequencies of the plain convolution onto one: `A A* = 1/s² Σ F F*` over them.
    """
    weight = layer.weight_orig * layer.weight_mask if hasattr(layer, "weight_orig") else layer.weight
    weight = weight.detach().double()
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(weight, 2))
    (stride, _), largest = layer.stride, 0.0
    for kernel in weight.chunk(layer.groups):
        symbol = torch.fft.fft2(kernel, s=(points * stride, points * stride))
        folded = sum(
            symbol[..., i * points : (i + 1) * points, j * points : (j + 1) * points].permute(2, 3, 0, 1)
            @ symbol[..., i * points : (i + 1) * points, j * points : (j + 1) * points].permute(2, 3, 0, 1).mH
            for i, j in product(range(stride), repeat=2)
        )
        largest = max(largest, float(torch.linalg.eigvalsh(folded).max() / stride**2) ** 0.5)
    return largest


def largest_norm(model: nn.Module) -> float:
    return max(sampled_norm(layer) for layer in layers_of(model).values())


class Watch(lightning.Callback, legacy.Callback):
    """Samples the largest norm at the start and after every step of every optimizer; listed last, after the projection."""

    def __init__(self) -> None:
        self.at_start: float | None = None
        self.norms: list[float] = []
        self.handles: list = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.at_start = largest_norm(pl_module)
        for optimizer in trainer.optimizers:
            self.handles.append(optimizer.register_step_post_hook(lambda *_: self.norms.append(largest_norm(pl_module))))

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer, pl_module, stage) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def trainer_of(*callbacks, namespace=lightning, max_epochs: int = 2, **settings):
    settings = QUIET | {"accelerator": "cpu", "devices": 1} | settings
    return namespace.Trainer(callbacks=list(callbacks), max_epochs=max_epochs, **settings)


def fit(module, *callbacks, loader: DataLoader | None = None, ckpt_path: str | None = None, **settings):
    """Train a module, its norms watched, and return the trainer and what was seen."""
    watch = Watch()
    trainer = trainer_of(*callbacks, watch, **settings)
    trainer.fit(module, loader or data(), ckpt_path=ckpt_path)
    return trainer, watch


def assert_inside(watch: Watch, steps: int, bound: float = 1.0, tolerance: float = TOLERANCE) -> None:
    assert len(watch.norms) == steps
    assert watch.at_start <= bound * (1 + tolerance)
    assert max(watch.norms) <= bound * (1 + tolerance)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def checkpoints(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def norms_in_checkpoints(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    norms = {}
    for path in sorted(folder.glob("*.ckpt")):
        module = Module().to(dtype)
        module.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
        norms[path.stem] = largest_norm(module)
    return norms


# -- every real step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("namespace", "module"), [(lightning, Module), (legacy, LegacyModule)], ids=["lightning", "legacy"])
def test_bound_holds_at_the_start_and_after_every_step_in_both_namespaces(namespace, module) -> None:
    clip, model = SpectralClip(1.0), module()
    assert largest_norm(model) > 1.5
    _, watch = fit(model, clip, namespace=namespace)
    assert_inside(watch, steps=8)
    assert watch.norms[-1] > 0.9
    assert clip.hook.step == 8
    assert largest_norm(model) <= 1 + TOLERANCE


def test_the_steps_of_these_tests_leave_the_ball_without_it() -> None:
    _, watch = fit(Module())
    assert min(watch.norms) > 1.5

    class Raw(Watch):
        """Listed first, it sees what the optimizer made of the projected weights."""

    raw = Raw()
    fit(Module(), raw, SpectralClip(1.0))
    assert min(raw.norms) > 1 + 1e-3


def test_one_projection_per_update_under_accumulation() -> None:
    clip = SpectralClip(1.0)
    trainer, watch = fit(Module(), clip, loader=data(batches=7), accumulate_grad_batches=3)
    assert_inside(watch, steps=6)
    assert clip.hook.step == trainer.global_step == 6


class TwoOptimizers(Module):
    """A step of each optimizer, the second one's graph recorded before the first one's step."""

    automatic_optimization = False

    def configure_optimizers(self):
        head = self.net[-1]
        body = [p for layer in self.net[:-1] for p in layer.parameters()]
        return torch.optim.SGD(body, lr=0.5), torch.optim.Adam(head.parameters(), lr=0.5)

    def training_step(self, batch, batch_idx) -> None:
        first, second = self.optimizers()
        features = self.net[:-1](batch[0])
        loss_of_head = nn.functional.cross_entropy(self.net[-1](features.detach()), batch[1])
        loss_of_body = features.square().mean() - 10 * features.mean()
        first.zero_grad()
        self.manual_backward(loss_of_body)
        first.step()
        second.zero_grad()
        self.manual_backward(loss_of_head)
        second.step()


def test_manual_optimization_with_two_optimizers() -> None:
    clip = SpectralClip(1.0)
    trainer, watch = fit(TwoOptimizers(), clip)
    assert_inside(watch, steps=16)
    assert clip.hook.step == trainer.global_step == 16


def test_lbfgs_is_projected_once_per_step() -> None:
    class Quasi(Module):
        learning_rate = 1.0

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=4)

    clip = SpectralClip(1.0)
    _, watch = fit(Quasi(), clip)
    assert_inside(watch, steps=8)
    assert clip.hook.step == 8


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"])
def test_stored_weights_obey_in_every_precision(precision) -> None:
    """`16-mixed` on a CPU is what Lightning makes of it, bf16-mixed; loss scaling has a test of its own."""
    model = Module()
    _, watch = fit(model, SpectralClip(1.0), precision=precision)
    assert_inside(watch, steps=8)
    assert watch.norms[-1] > 0.9
    stored = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
    assert {p.dtype for p in model.parameters()} == {stored}


def test_steps_that_loss_scaling_skips_are_not_counted() -> None:
    """float16 autocast with a gradient scaler that starts so high that the first gradients overflow."""
    clip = SpectralClip(1.0)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**24))
    _, watch = fit(Module(), clip, plugins=[plugin], loader=data(batches=16))
    assert 0 < len(watch.norms) < 32
    assert_inside(watch, steps=clip.hook.step)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 mixed precision as users run it needs a GPU")
@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_on_a_gpu(fused) -> None:
    class Fused(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=fused)

    model = Fused()
    _, watch = fit(model, SpectralClip(1.0), accelerator="gpu", precision="16-mixed", loader=data(batches=16))
    assert max(watch.norms) <= 1 + TOLERANCE
    assert largest_norm(model) <= 1 + TOLERANCE


def test_compiled_module_is_projected_under_its_plain_names() -> None:
    model, clip = Module(), SpectralClip(1.0, exclude="net.6")
    _, watch = fit(torch.compile(model, backend="eager"), clip, max_epochs=1, limit_train_batches=2)
    assert len(watch.norms) == 2
    assert max(sampled_norm(model.net[i]) for i in (0, 3)) <= 1 + TOLERANCE
    assert clip.skipped["net.6"] == "excluded"


# -- `every` and the end of a fit -------------------------------------------------------------------------------------------


def test_every_projects_at_its_pace_and_ends_inside() -> None:
    model = Module()
    _, watch = fit(model, SpectralClip(1.0, every=3), max_epochs=2)
    due = [norm for step, norm in enumerate(watch.norms, start=1) if step % 3 == 0]
    assert max(due) <= 1 + TOLERANCE
    assert watch.norms[-1] > 1 + TOLERANCE
    assert largest_norm(model) <= 1 + TOLERANCE


def test_last_checkpoint_of_a_fit_with_every_is_inside(tmp_path) -> None:
    last = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_epochs=100)
    trainer, _ = fit(Module(), SpectralClip(1.0, every=3), last, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    norms = norms_in_checkpoints(tmp_path)
    assert norms["after"] <= 1 + TOLERANCE
    # older versions write it before the training ends
    if "on_train_end" in vars(ModelCheckpoint):
        assert max(norms.values()) <= 1 + TOLERANCE


class AtValidation(lightning.Callback):
    """The largest norm at every batch of validation; listed last."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if not trainer.sanity_checking:
            self.norms.append(largest_norm(pl_module))


def ticking(training: float, acting: float) -> Callable[[], float]:
    """A clock that is read where a hook is called and where it returns, in turn."""
    times = accumulate(cycle((training, acting)))
    return lambda: next(times)


def paced(folder: Path, *callbacks: lightning.Callback, epochs: int, resume: Path | None = None) -> nn.Module:
    """Sixteen steps an epoch, validated after every fifth of it and saved after every seventh of all."""
    saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    trainer = trainer_of(*callbacks, saved, max_epochs=epochs, enable_checkpointing=True, val_check_interval=5)
    trainer.fit(model := WithMomentum(), data(batches=16, same=True), data(batches=2), ckpt_path=resume)
    return model


def test_the_pace_is_found_and_what_is_validated_or_saved_is_inside(tmp_path, monkeypatch) -> None:
    """Whatever the number is, by the clock on the wall: it stands in the checkpoints, and a resumed run goes on with it."""
    monkeypatch.setattr(pace, "_SLOWEST_TRIED", 1)  # it is not tried out for long, so that 64 steps are enough
    clip, seen = SpectralClip(1.0, every="auto", log=True), AtValidation()
    model = paced(tmp_path, clip, seen, epochs=4)
    number = clip.hook.period
    assert repr(clip) == f"SpectralClip(1.0, every='auto' ({number}), log=True)"
    assert clip.state_key == "SpectralClip(1.0, every='auto', log=True)"
    assert len(seen.norms) == 4 * 3 * 2
    assert max(seen.norms) <= 1 + TOLERANCE
    assert len(norms := norms_in_checkpoints(tmp_path)) == 9
    assert max(norms.values()) <= 1 + TOLERANCE
    assert largest_norm(model) <= 1 + TOLERANCE
    states = {n: torch.load(tmp_path / f"step={n}.ckpt", weights_only=False)["callbacks"][clip.state_key] for n in (7, 63)}
    assert "every" not in states[7]
    assert states[63]["every"] == number
    again = SpectralClip(1.0, every="auto", log=True)
    paced(tmp_path, again, epochs=4, resume=tmp_path / "step=63.ckpt")
    assert again.hook.period == number


@pytest.mark.parametrize("step", [21, 28])
def test_a_run_resumed_at_the_pace_that_was_found_equals_an_uninterrupted_one(step, tmp_path, monkeypatch) -> None:
    """By a clock for which acting takes three tenths of a step: what saving projects is in the checkpoint as it was left."""
    monkeypatch.setattr(pace, "_SLOWEST_TRIED", 1)
    monkeypatch.setattr(base, "Pace", partial(Pace, clock=ticking(1.0, 0.3)))
    clip, watch = SpectralClip(1.0, every="auto"), Watch()
    whole = paced(tmp_path, clip, watch, epochs=2)
    assert clip.hook.period == 3
    assert max(watch.norms[12:]) > 1 + TOLERANCE, "between two projections weights are outside"
    again = SpectralClip(1.0, every="auto")
    resumed = paced(tmp_path, again, epochs=2, resume=tmp_path / f"step={step}.ckpt")
    if again.hook.step > 32:
        pytest.skip("this version of Lightning trains again on the batch before the checkpoint")
    assert again.hook.period == 3
    assert same_weights(whole, resumed)


def test_a_fit_without_steps_is_no_error() -> None:
    fit(Module(), SpectralClip(1.0), max_epochs=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_compiled_module(precision) -> None:
    """Compiled as a whole: names are those of the plain model, and the weights are its own."""
    torch._dynamo.reset()
    model, clip = Module(), SpectralClip(1.0, exclude="net.6")
    _, watch = fit(torch.compile(model, backend="aot_eager"), clip, precision=precision, max_epochs=1)
    assert len(watch.norms) == 4
    assert max(sampled_norm(model.net[i]) for i in (0, 3)) <= 1 + TOLERANCE
    assert clip.skipped["net.6"] == "excluded"


# -- callbacks that change weights too --------------------------------------------------------------------------------------


def averages() -> dict:
    return {
        "ema": lambda: EMAWeightAveraging(decay=0.8),
        "mean": lambda: WeightAveraging(),
        "swa": lambda: StochasticWeightAveraging(swa_lrs=0.3, swa_epoch_start=1),
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("first", [True, False], ids=["clip-first", "clip-last"])
@pytest.mark.parametrize("average", [pytest.param("ema", marks=averaging), pytest.param("mean", marks=averaging), "swa"])
def test_averages_are_inside_in_either_order(average, first, precision, tmp_path) -> None:
    callbacks = [SpectralClip(1.0), averages()[average]()]
    model = Module()
    callbacks = callbacks if first else callbacks[::-1]
    _, watch = fit(model, *callbacks, checkpoints(tmp_path), max_epochs=3, enable_checkpointing=True, precision=precision)
    # SWA runs one more epoch, for batch norm, that ends in an empty step
    assert_inside(watch, steps=13 if average == "swa" else 12)
    assert largest_norm(model) <= 1 + TOLERANCE
    if precision == "32-true":
        norms = norms_in_checkpoints(tmp_path)
        assert len(norms) >= 12
        assert max(norms.values()) <= 1 + TOLERANCE


@averaging
@pytest.mark.parametrize("first", [True, False], ids=["clip-first", "clip-last"])
def test_average_that_never_began_leaves_a_model_inside(first) -> None:
    """It still holds the weights from before training, and makes them the model's when training ends."""
    model, callbacks = Module(), [SpectralClip(1.0), EMAWeightAveraging(update_starting_at_step=100)]
    fit(model, *(callbacks if first else callbacks[::-1]))
    assert largest_norm(model) <= 1 + TOLERANCE


@pytest.mark.parametrize("at_validation", [False, True], ids=["train-end", "validation-end"])
@pytest.mark.parametrize("first", [True, False], ids=["clip-first", "clip-last"])
def test_pruning_keeps_its_zeros_and_the_bound(first, at_validation, tmp_path) -> None:
    """Zeroing entries can raise a norm, so what pruning leaves is projected before it is saved."""
    model = Module()
    pruned = [(model.net[0], "weight"), (model.net[6], "weight")]
    pruning = ModelPruning("l1_unstructured", pruned, amount=0.3, prune_on_train_epoch_end=not at_validation)
    callbacks = [SpectralClip(1.0), pruning]
    watch = Watch()
    saved = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=not at_validation
    )
    trainer = trainer_of(*(callbacks if first else callbacks[::-1]), watch, saved, max_epochs=3, enable_checkpointing=True)
    trainer.fit(model, data(), data(batches=1))
    assert_inside(watch, steps=12)
    assert largest_norm(model) <= 1 + TOLERANCE
    zeros = [float((layer.weight == 0).float().mean()) for layer, _ in pruned]
    assert min(zeros) > 0.2
    assert model.state_dict().keys() == Module().state_dict().keys()
    norms = norms_in_checkpoints(tmp_path)
    assert len(norms) == 3
    assert max(norms.values()) <= 1 + TOLERANCE


def test_model_that_was_pruned_before_training() -> None:
    model = Module()
    for layer in layers_of(model).values():
        nn.utils.prune.l1_unstructured(layer, "weight", amount=0.5)
    _, watch = fit(model, SpectralClip(1.0))
    assert_inside(watch, steps=8)


# -- checkpoints ------------------------------------------------------------------------------------------------------------


def test_every_checkpoint_obeys_and_is_the_plain_models(tmp_path) -> None:
    plain, clipped = Module(), Module()
    identities = [id(p) for p in clipped.parameters()]
    fit(plain, max_epochs=1)
    trainer, _ = fit(clipped, SpectralClip(1.0), checkpoints(tmp_path), enable_checkpointing=True)
    norms = norms_in_checkpoints(tmp_path)
    assert len(norms) == 8
    assert max(norms.values()) <= 1 + TOLERANCE
    assert list(clipped.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in clipped.modules()] == [type(m) for m in plain.modules()]
    assert [id(p) for p in clipped.parameters()] == identities
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in clipped.modules())
    plain.load_state_dict(torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"])


class WithMomentum(Module):
    kind = torch.optim.Adam
    learning_rate = 0.1


@pytest.mark.parametrize("epochs_of", [6, 2], ids=["end-of-epoch", "inside-an-epoch"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("log", [False, True])
def test_resumed_run_equals_an_uninterrupted_one(every, epochs_of, log, tmp_path) -> None:
    """Bit for bit, from a step between two projections too: 6 steps at once, or 4 and then the rest."""
    loader = data(batches=6 // epochs_of, same=True)
    settings = {"max_epochs": epochs_of, "enable_checkpointing": True, "logger": CSVLogger(tmp_path) if log else False}
    whole = WithMomentum()
    _, seen = fit(whole, SpectralClip(1.0, every=every, log=log), checkpoints(tmp_path), loader=loader, **settings)

    resumed, clip = WithMomentum(), SpectralClip(1.0, every=every, log=log)
    trainer, watch = fit(resumed, clip, loader=loader, ckpt_path=str(tmp_path / "step=4.ckpt"), **settings)
    if trainer.global_step > 6:
        pytest.skip("this version of Lightning trains again on the batch before the checkpoint")
    assert clip.hook.step == 6
    assert watch.norms == seen.norms[4:]
    assert same_weights(whole, resumed)


def test_a_resumed_run_with_other_settings_says_so(tmp_path) -> None:
    loader, settings = data(batches=3, same=True), {"max_epochs": 2, "enable_checkpointing": True}
    fit(WithMomentum(), SpectralClip(2.0), checkpoints(tmp_path), loader=loader, **settings)
    path = str(tmp_path / "step=3.ckpt")
    changed = r"saved with SpectralClip\(2\.0\),.* goes on with SpectralClip\(0\.5\):.*from the first step on"
    with pytest.warns(UserWarning, match=changed):
        _, watch = fit(WithMomentum(), SpectralClip(0.5), loader=loader, ckpt_path=path, **settings)
    assert max(watch.at_start, *watch.norms) <= 0.5 * (1 + TOLERANCE)


def test_a_resumed_run_with_the_same_settings_or_a_callback_more_says_nothing(tmp_path) -> None:
    loader, settings = data(batches=3, same=True), {"max_epochs": 2, "enable_checkpointing": True}
    body = partial(SpectralClip, 2.0, exclude="net.6")
    fit(WithMomentum(), body(), checkpoints(tmp_path), loader=loader, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the checkpoint was saved with")
        fit(WithMomentum(), body(), SpectralClip(1.0), loader=loader, ckpt_path=str(tmp_path / "step=3.ckpt"), **settings)


@averaging
def test_resume_in_a_mixed_order_with_an_average(tmp_path) -> None:
    loader = data(batches=3, same=True)
    whole, resumed = WithMomentum(), WithMomentum()
    fit(whole, EMAWeightAveraging(decay=0.5), SpectralClip(1.0), checkpoints(tmp_path), loader=loader, enable_checkpointing=True)
    path = str(tmp_path / "step=3.ckpt")
    fit(resumed, EMAWeightAveraging(decay=0.5), SpectralClip(1.0), loader=loader, ckpt_path=path)
    assert same_weights(whole, resumed)


# -- one callback, several fits ---------------------------------------------------------------------------------------------


def hooks_of(trainer) -> int:
    return sum(len(o._optimizer_step_post_hooks) + len(o._optimizer_step_pre_hooks) for o in trainer.optimizers)


class Breaks(Module):
    """Raises in the middle of the first fit."""

    broken = False

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and not self.broken:
            self.broken = True
            raise RuntimeError("lost power")
        return super().training_step(batch, batch_idx)


def test_exception_in_the_middle_then_fit_again() -> None:
    model, clip, watch = Breaks(), SpectralClip(1.0), Watch()
    trainer = trainer_of(clip, watch)
    with pytest.raises(RuntimeError, match="lost power"):
        trainer.fit(model, data())
    assert len(watch.norms) == 2
    assert hooks_of(trainer) == 0
    watch = Watch()
    again = trainer_of(clip, watch)
    again.fit(model, data())
    assert_inside(watch, steps=8)
    assert hooks_of(again) == 0


def test_exception_then_another_model() -> None:
    clip = SpectralClip(1.0)
    with pytest.raises(RuntimeError, match="lost power"):
        fit(Breaks(), clip)
    assert_inside(fit(Module(), clip)[1], steps=8)


def test_exception_while_another_callback_handles_one() -> None:
    class Careless(lightning.Callback):
        def on_exception(self, trainer, pl_module, exception) -> None:
            raise OSError("no space left")

    clip = SpectralClip(1.0)
    with pytest.raises(OSError, match="no space left"):
        fit(Breaks(), Careless(), clip)
    assert_inside(fit(Module(), clip)[1], steps=8)


@pytest.mark.parametrize("every", [1, 3])
def test_second_fit_with_one_callback_is_like_that_of_a_new_one(every) -> None:
    used, model, expected = SpectralClip(1.0, every=every), Module(), Module()
    fit(Module(), used)
    fit(model, used)
    fit(expected, SpectralClip(1.0, every=every))
    assert same_weights(model, expected)
    assert used.hook.step == 8


def test_fit_of_the_same_trainer_continues() -> None:
    model, clip, watch = Module(), SpectralClip(1.0), Watch()
    trainer = trainer_of(clip, watch, max_epochs=1)
    trainer.fit(model, data())
    with torch.no_grad():
        model.net[0].weight.mul_(5)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data())
    assert_inside(watch, steps=8)


# -- settings, state and what it tells --------------------------------------------------------------------------------------


def test_state_key_tells_settings_apart_and_is_the_same_in_every_process() -> None:
    different = [
        SpectralClip(1.0),
        SpectralClip(2.0),
        SpectralClip(1.0, every=2),
        SpectralClip(1.0, layers="net.0"),
        SpectralClip(1.0, exclude="net.0"),
        SpectralClip(1.0, rounds=5),
        SpectralClip(1.0, layers=nn.Linear),
        SpectralClip(1.0, layers=lambda layer: True),
    ]
    keys = {clip.state_key for clip in different}
    assert len(keys) == len(different)
    assert not any(" at 0x" in key for key in keys)
    assert SpectralClip(1.0, layers=["a", nn.Linear]).state_key == SpectralClip(1.0, layers=["a", nn.Linear]).state_key


def test_two_instances_together(tmp_path) -> None:
    model = Module()
    body, head = SpectralClip(1.0, exclude="net.6"), SpectralClip(0.5, layers="net.6")
    fit(model, body, head, checkpoints(tmp_path), enable_checkpointing=True)
    assert max(sampled_norm(model.net[i]) for i in (0, 3)) <= 1 + TOLERANCE
    assert sampled_norm(model.net[0]) > 0.9
    assert sampled_norm(model.net[6]) <= 0.5 * (1 + TOLERANCE)
    states = torch.load(tmp_path / "step=8.ckpt", weights_only=False)["callbacks"]
    assert states[body.state_key]["step"] == 8
    assert states[head.state_key]["step"] == 8


def test_log_shows_the_largest_norm_before_and_how_many_were_clipped(tmp_path) -> None:
    trainer, _ = fit(
        Module(), SpectralClip(1.0, log=True), logger=CSVLogger(tmp_path, name="run"), log_every_n_steps=1, max_epochs=2
    )
    assert trainer.callback_metrics["spectral_clip/norm_before"] > 1
    assert 1 <= trainer.callback_metrics["spectral_clip/clipped"] <= 3
    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()))
    assert len(rows) == 8
    assert all(float(row["spectral_clip/norm_before"]) > 1 for row in rows)


def test_logged_norm_is_that_before_the_projection(tmp_path) -> None:
    raw = Watch()
    trainer, _ = fit(Module(), raw, SpectralClip(1.0, log=True), logger=CSVLogger(tmp_path), max_epochs=1)
    assert float(trainer.callback_metrics["spectral_clip/norm_before"]) == pytest.approx(raw.norms[-1], rel=0.02)


class ByHand(Module):
    """Accumulates the gradients of three batches by manual optimization, and logs its loss at each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx) -> None:
        self.log("loss", loss := super().training_step(batch, batch_idx))
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize(
    ("module", "every", "settings", "steps"),
    [
        (ByHand, 1, {}, [2, 5, 8]),
        (Module, 1, {"accumulate_grad_batches": 3}, [0, 1, 2]),
        (Module, 3, {}, [2, 5, 8]),
        # no sooner than the Trainer logs, and then the last one
        (Module, 3, {"log_every_n_steps": 2}, [3, 5]),
        (Module, 1, {"log_every_n_steps": 4}, [3, 7]),
    ],
)
def test_each_projection_is_logged_once(module, every, settings, steps, tmp_path) -> None:
    every_step, clip = {"log_every_n_steps": 1, "max_epochs": 1}, SpectralClip(1.0, every=every, log=True)
    trainer, _ = fit(module(), clip, logger=CSVLogger(tmp_path), loader=data(batches=9), **(every_step | settings))
    rows = [row for row in csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()) if row["spectral_clip/norm_before"]]
    assert [int(row["step"]) for row in rows] == steps
    assert all(row["spectral_clip/clipped"] for row in rows)
    values = [row["spectral_clip/norm_before"] for row in rows]
    assert len(set(values)) == len(values)
    # a callback that monitors the values finds those of the last projection, whether they were logged or not
    last = float(trainer.callback_metrics["spectral_clip/norm_before"])
    assert last > 1
    assert (last == pytest.approx(float(values[-1]))) == ("log_every_n_steps" not in settings)


def test_without_log_nothing_is_logged() -> None:
    trainer, _ = fit(Module(), SpectralClip(1.0), max_epochs=1)
    assert trainer.callback_metrics == {}


def test_skipped_layers_have_their_reasons() -> None:
    clip = SpectralClip(1.0, exclude="net.6")
    fit(Module(), clip, max_epochs=1)
    assert clip.skipped["net.6"] == "excluded"
    assert "BatchNorm2d" in clip.skipped["net.1"]
    assert set(clip.skipped) == {"net.1", "net.6"}


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda clip: pickle.loads(pickle.dumps(clip))], ids=["deepcopy", "pickle"])
def test_copies_carry_settings_and_nothing_of_the_model(copied, fitted) -> None:
    clip = SpectralClip(1.0, layers="net.[06]", every=2, log=True)
    if fitted:
        fit(Module(), clip, max_epochs=1)
    twin = copied(clip)
    assert twin.state_key == clip.state_key
    assert len(pickle.dumps(clip)) < 2000
    model = Module()
    fit(model, twin, max_epochs=1)
    assert max(sampled_norm(model.net[i]) for i in (0, 6)) <= 1 + TOLERANCE


def test_copy_made_in_the_middle_of_a_fit_is_detached() -> None:
    class Copies(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            self.copy = copy.deepcopy(trainer.callbacks[0])

    copies = Copies()
    _, watch = fit(Module(), SpectralClip(1.0), copies)
    assert_inside(watch, steps=8)
    assert copies.copy._handle is None
    fit(Module(), copies.copy)


# -- options ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_the_hook_under_its_name(name) -> None:
    option = {name: OPTIONS[name]}
    callback, core = SpectralClip(**option), sh.SpectralClip(**option)
    assert getattr(callback.hook, name) == getattr(core, name) != getattr(sh.SpectralClip(), name)
    assert repr(callback) == callback.state_key == repr(core) != repr(SpectralClip())


@pytest.mark.parametrize(("option", "error"), [*WRONG, ({"lora": "product2"}, ValueError)])
def test_options_are_checked_in_the_constructor(option, error) -> None:
    with pytest.raises(error, match=f"`?{next(iter(option))}"):
        SpectralClip(**option)


def test_checkers_know_the_same_options() -> None:
    """The names that type checkers and editors offer are those of the core."""
    assert typing.get_type_hints(ClipOptions).keys() == OPTIONS.keys() - {"max_norm", "split"}


# -- any hook ---------------------------------------------------------------------------------------------------------------


class Pulled(Module):
    """Half of the weights' squares beside the loss, by the optimizer."""

    decay = 0.0

    def configure_optimizers(self):
        weights = [layer.weight for layer in layers_of(self).values()]
        others = [p for p in self.parameters() if not any(p is weight for weight in weights)]
        groups = [{"params": weights, "weight_decay": self.decay}, {"params": others}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}], ids=str)
def test_what_a_hook_adds_to_gradients_reaches_the_optimizer(settings) -> None:
    """A hook that pulls weights to zero is the optimizer's own weight decay: after gradients are complete, and clipped."""
    pulled, decayed, plain = Pulled(), Pulled(), Pulled()
    decayed.decay = 0.2
    fit(pulled, HookCallback(hook := Counting(0.2)), **settings)
    fit(decayed, **settings)
    fit(plain, **settings)
    for one, two in zip(pulled.parameters(), decayed.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert (pulled.net[0].weight - plain.net[0].weight).abs().max() > 1e-3
    assert (
        hook.events.count("before")
        == hook.events.count("act")
        == hook.step
        == (4 if "accumulate_grad_batches" in settings else 8)
    )


def test_any_hook_gets_every_event(tmp_path) -> None:
    hook = Counting(every=3, log=True)
    callback = HookCallback(hook)
    loader, settings = data(batches=4, same=True), {"max_epochs": 2, "enable_checkpointing": True, "log_every_n_steps": 1}
    trainer, _ = fit(Module(), callback, checkpoints(tmp_path), loader=loader, logger=CSVLogger(tmp_path), **settings)
    # training ends before the last checkpoint is written, and the fit after all averages have become the model
    assert hook.events == ["begin", *["before", "before", "before", "act"] * 2, "before", "before", "finish", "finish"]
    assert float(trainer.callback_metrics["counting/step"]) == 6
    rows = [row["counting/step"] for row in csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()) if row["counting/step"]]
    assert rows == ["3.0", "6.0"]
    assert repr(callback) == "HookCallback(Counting(0.0, every=3, log=True))"
    # its state is in the checkpoints, and comes back; between two actions it does not begin again
    resumed = Counting(every=3, log=True)
    fit(Module(), HookCallback(resumed), loader=loader, ckpt_path=str(tmp_path / "step=4.ckpt"), max_epochs=2)
    assert resumed.events == hook.events
    assert resumed.step == 8


def test_a_hook_that_acts_at_every_step_is_asked_wherever_others_change_weights(tmp_path) -> None:
    hook = Counting()
    trainer = trainer_of(HookCallback(hook), checkpoints(tmp_path), max_epochs=2, enable_checkpointing=True)
    trainer.fit(Module(), data(), data(batches=1))
    # per epoch its end, the beginning and the end of validation, and 4 checkpoints; the end of training and of the fit
    assert hook.events.count("finish") == 2 * (1 + 2 + 4) + 2
    assert "net.1" in HookCallback(hook).skipped
    assert "net.1" in HookCallback(hook).report()


@pytest.mark.parametrize("shows", [True, False])
def test_a_trainer_without_bars_shows_none_of_ours(shows, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "_DELAY", 0)
    fit(Module(), SpectralClip(1.0), loader=data(batches=1), max_epochs=1, enable_progress_bar=shows)
    assert ("projecting weights" in capsys.readouterr().err) == (shows and progress.tqdm is not None)


# -- mistakes ---------------------------------------------------------------------------------------------------------------


def test_nan_weight_is_an_error_that_names_layer_and_step() -> None:
    class Diverges(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1)

    with pytest.raises(ValueError, match=r"net\.0, after step 3: .*NaN"):
        fit(Diverges(), SpectralClip(1.0))


def test_nan_weight_at_the_start_is_an_error_that_names_the_layer() -> None:
    model, clip = Module(), SpectralClip(1.0)
    with torch.no_grad():
        model.net[3].weight[0, 0, 0, 0] = float("nan")
    before = model.net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"net\.3, after step 0"):
        fit(model, clip)
    assert torch.equal(model.net[0].weight, before)
    assert_inside(fit(Module(), clip)[1], steps=8)


def test_pattern_that_matches_nothing_is_an_error_when_training_starts() -> None:
    with pytest.raises(ValueError, match="matches no layer"):
        fit(Module(), SpectralClip(1.0, layers="encoder.*"))


def test_strategy_that_trains_on_its_own_copies_is_refused() -> None:
    class DeepSpeedStrategy(SingleDeviceStrategy):
        """Known by its name, so that nobody has to install it."""

    with pytest.raises(NotImplementedError, match="ModelParallelStrategy"):
        fit(Module(), SpectralClip(1.0), strategy=DeepSpeedStrategy("cpu"))
