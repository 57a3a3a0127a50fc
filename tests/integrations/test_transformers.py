"""transformers: real runs of a small GPT-2 and a small BERT, watched by float64 SVDs of its own."""

from __future__ import annotations

import doctest
import importlib
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import observers
import pytest
import torch
from counting import OPTIONS, WRONG, Counting
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D  # noqa: E402

import spectral_hooks as sh  # noqa: E402
from spectral_hooks.hooks import pace, progress  # noqa: E402
from spectral_hooks.integrations.transformers import HookCallback, SpectralClip  # noqa: E402
from spectral_hooks.weights.selection import select  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*barrier.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]

TOLERANCE = 1e-6
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
VOCABULARY, LENGTH, WIDTH = 13, 8, 16


# -- models, data, runs -----------------------------------------------------------------------------------------------------


def gpt2(**settings) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=WIDTH, vocab_size=VOCABULARY, n_positions=LENGTH, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0, initializer_range=0.5, **settings,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=WIDTH, intermediate_size=2 * WIDTH, vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0, attention_probs_dropout_prob=0, initializer_range=0.5,
    )  # fmt: skip
    return BertForMaskedLM(config)


def data(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def largest_norm(model: nn.Module) -> float:
    return max(norm(layer.weight) for layer in layers_of(model).values())


class Watch(TrainerCallback):
    """Measures at the start and after every update; listed last, after the projection."""

    def __init__(self, measure=largest_norm) -> None:
        self.measure, self.at_start, self.norms = measure, None, []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.at_start = self.measure(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.norms.append(self.measure(model))


def trainer_of(model, folder, *callbacks, optimizers=(None, None), **settings) -> Trainer:
    defaults = {
        "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.5, "optim": "sgd",
        "lr_scheduler_type": "constant", "save_steps": 1, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "max_grad_norm": 0.0,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **(defaults | settings))
    return Trainer(model, args, train_dataset=data(), eval_dataset=data(4), callbacks=list(callbacks), optimizers=optimizers)


def train(model, folder, *callbacks, resume=None, measure=largest_norm, **settings) -> tuple[Trainer, Watch]:
    watch = Watch(measure)
    trainer = trainer_of(model, folder, *callbacks, watch, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def assert_inside(watch: Watch, updates: int = 4, bound: float = 1.0) -> None:
    assert len(watch.norms) == updates
    assert watch.at_start <= bound * (1 + TOLERANCE)
    assert max(watch.norms) <= bound * (1 + TOLERANCE)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def quiet(capsys):
    transformers.logging.set_verbosity_error()


# -- every update, every checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, bert])
def test_four_updates_four_projections_and_every_checkpoint_inside(make, tmp_path) -> None:
    clip, model = SpectralClip(1.0, log=True), make()
    identities = [id(p) for p in model.parameters()]
    assert largest_norm(model) > 1.5
    _, watch = train(model, tmp_path, clip)
    assert_inside(watch)
    assert watch.norms[-1] > 0.9
    assert clip.hook.step == 4
    assert [row["step"] for row in clip.history] == [1, 2, 3, 4]
    assert min(row["spectral_clip/norm_before"] for row in clip.history) > 1 + 1e-3, "every update left the ball"

    for step in range(1, 5):
        saved = make().from_pretrained(tmp_path / f"checkpoint-{step}")
        assert largest_norm(saved) <= 1 + TOLERANCE
    assert same_weights(saved, model)
    assert list(model.state_dict()) == list(make().state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]
    assert [id(p) for p in model.parameters()] == identities


def test_the_steps_of_these_tests_leave_the_ball_without_it(tmp_path) -> None:
    assert min(train(gpt2(), tmp_path)[1].norms) > 1.5


@pytest.mark.parametrize("make", [gpt2, bert])
def test_a_tied_weight_is_projected_once(make, tmp_path) -> None:
    """The output layer is the embedding: one weight, one projection, still tied."""
    model = make()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    expected = sh.projections.clip(sh.DenseOperator(head.weight), 1.0)
    unique = {id(layer.weight) for layer in layers_of(model).values() if norm(layer.weight) > 1}
    counts = []

    class Count(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            counts.append(clip.hook.clipped)
            torch.testing.assert_close(embedding.weight.detach(), expected.detach(), rtol=0, atol=1e-6)

    clip = SpectralClip(1.0)
    train(model, tmp_path, clip, Count(), max_steps=1, save_strategy="no")
    assert counts == [len(unique)]
    assert head.weight is embedding.weight
    assert any("Embedding" in reason for reason in clip.skipped.values())


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"optim": "adamw_torch"}, {"max_grad_norm": 1.0}, COMPILED, COMPILED | {"bf16": True}]
)
def test_other_settings(settings, tmp_path) -> None:
    assert_inside(train(gpt2(), tmp_path, SpectralClip(1.0), **({"save_strategy": "no"} | settings))[1])


def test_half_precision_weights_obey_as_stored(tmp_path) -> None:
    model = gpt2().to(torch.bfloat16)
    assert_inside(train(model, tmp_path, SpectralClip(1.0), save_strategy="no")[1])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_optimizer_of_the_users_and_none() -> None:
    """The Trainer may hand a callback no optimizer at all; the events are enough."""
    model, clip = gpt2(), SpectralClip(1.0)
    state = transformers.TrainerState()
    clip.on_train_begin(None, state, None, model=model, optimizer=None)
    assert largest_norm(model) <= 1 + TOLERANCE
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(3)
    clip.on_pre_optimizer_step(None, state, None)
    clip.on_optimizer_step(None, state, None)
    assert largest_norm(model) <= 1 + TOLERANCE


def test_every_projects_at_its_pace_and_ends_inside(tmp_path) -> None:
    model, clip = gpt2(), SpectralClip(1.0, every=3, log=True)
    _, watch = train(model, tmp_path, clip)
    assert watch.norms[2] <= 1 + TOLERANCE
    assert watch.norms[3] > 1 + TOLERANCE
    assert [row["step"] for row in clip.history] == [3]
    assert largest_norm(GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-4")) <= 1 + TOLERANCE
    assert largest_norm(model) <= 1 + TOLERANCE


def test_a_best_checkpoint_loaded_at_the_end_is_inside(tmp_path) -> None:
    """With `every` it may be one from between two projections: here the worst step, which has gone farthest outside."""
    model = gpt2()
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer, _ = train(model, tmp_path, SpectralClip(1.0, every=4), greater_is_better=True, **best)
    assert trainer.state.best_model_checkpoint != str(tmp_path / "checkpoint-4")
    assert largest_norm(GPT2LMHeadModel.from_pretrained(trainer.state.best_model_checkpoint)) > 1 + TOLERANCE
    assert largest_norm(model) <= 1 + TOLERANCE


class AtEvaluation(TrainerCallback):
    """The largest norm at every batch of evaluation, and at every checkpoint when it is written."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_prediction_step(self, args, state, control, model=None, **kwargs) -> None:
        self.norms.append(largest_norm(model))

    on_save = on_prediction_step


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_pace_is_found_and_what_is_evaluated_or_saved_is_inside(strategy, tmp_path, monkeypatch) -> None:
    """Whatever the number is, by the clock on the wall: it stands in the checkpoints, and a resumed run goes on with it."""
    monkeypatch.setattr(pace, "_SLOWEST_TRIED", 1)  # it is not tried out for long, so that 64 steps are enough
    settings = {"max_steps": 66, "eval_strategy": strategy, "save_strategy": strategy, "eval_steps": 11, "save_steps": 13}
    settings |= {
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.05,
    }
    clip, seen, model = SpectralClip(1.0, every="auto", log=True), AtEvaluation(), gpt2()
    _, watch = train(model, tmp_path, clip, seen, **settings)
    number = clip.hook.period
    assert repr(clip) == f"SpectralClip(1.0, every='auto' ({number}), log=True)"
    assert clip.history[-1]["spectral_clip/every"] == number
    assert len(seen.norms) >= 2 * 6
    assert max(seen.norms) <= 1 + TOLERANCE
    assert number == 1 or max(watch.norms) > 1 + TOLERANCE, "between two projections weights are outside"
    assert largest_norm(model) <= 1 + TOLERANCE
    assert largest_norm(GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-66")) <= 1 + TOLERANCE
    late = 65 if strategy == "steps" else 64
    (state,) = (tmp_path / f"checkpoint-{late}").glob("spectral_hooks-*.pt")
    assert torch.load(state, weights_only=True)["every"] == number
    again, resumed = SpectralClip(1.0, every="auto", log=True), gpt2()
    train(resumed, tmp_path, again, resume=str(tmp_path / f"checkpoint-{late}"), **settings)
    assert again.hook.period == number
    assert same_weights(resumed, model)


# -- resuming ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", [False, True], ids=["", "restore"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_and_keeps_the_users_callback(every, restore, tmp_path) -> None:
    """From between two projections too, and from elsewhere without slack; a predicate could not be in the Trainer's state."""

    def clip() -> SpectralClip:
        return SpectralClip(0.9, slack=0, every=every, exclude=lambda name, layer: name.endswith("mlp.c_fc"), log=True)

    settings = {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 0.1}
    whole, resumed, users = gpt2(), gpt2(), clip()
    _, seen = train(whole, tmp_path / "whole", clip(), **settings)
    path, more = str(tmp_path / "whole" / "checkpoint-3"), {"restore_callback_states_from_checkpoint": restore}
    trainer, watch = train(resumed, tmp_path / "resumed", users, resume=path, **settings, **more)
    assert same_weights(whole, resumed)
    assert watch.norms == seen.norms[3:]
    assert any(callback is users for callback in trainer.callback_handler.callbacks)
    assert users.hook.step == 5
    assert [row["step"] for row in users.history] == [step for step in (4, 5) if step % every == 0]
    assert norm(resumed.transformer.h[0].mlp.c_fc.weight) > 1
    assert norm(resumed.transformer.h[0].mlp.c_proj.weight) <= 0.9 * (1 + TOLERANCE)


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    model = transformers.ResNetForImageClassification(config)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(3)
    return model


def pictures() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"pixel_values": torch.randn(1, 12, 12), "labels": torch.tensor(i % 2)} for i in range(8)]


def train_convolutional(folder: Path, *callbacks: TrainerCallback, resume: bool | str = False) -> nn.Module:
    # Adam moves the weights so little that most steps need no clip
    settings = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 5, "gradient_accumulation_steps": 1}
    model = convolutional()
    trainer = trainer_of(model, folder, *callbacks, **settings)
    trainer.train_dataset = pictures()
    trainer.train(resume_from_checkpoint=resume)
    return model


def largest_convolution(model: nn.Module) -> float:
    return max(observers.lattice_norm(layer) for layer in model.modules() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_resumed_from_its_own_folder_equals_an_uninterrupted_one(every, tmp_path) -> None:
    """Convolutions are clipped deeper while they move, so that what is known of them counts."""

    class Stops(TrainerCallback):
        def on_save(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    whole = train_convolutional(tmp_path / "whole", SpectralClip(1.0, every=every))
    with pytest.raises(KeyboardInterrupt):
        train_convolutional(tmp_path / "parts", SpectralClip(1.0, every=every), Stops())
    assert same_weights(train_convolutional(tmp_path / "parts", SpectralClip(1.0, every=every), resume=True), whole)
    (known,) = (tmp_path / "parts" / "checkpoint-3").glob("spectral_hooks-*.pt")
    assert torch.load(known, weights_only=True)["step"] == 3
    # from elsewhere the bound holds all the same
    moved = (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "moved")
    elsewhere = train_convolutional(tmp_path / "new", SpectralClip(1.0, every=every), resume=str(moved))
    assert largest_convolution(elsewhere) <= 1 + TOLERANCE


@pytest.mark.parametrize("every", [1, 2])
def test_without_slack_a_run_resumed_from_elsewhere_equals_an_uninterrupted_one(every, tmp_path) -> None:
    """Whatever was known of its weights; and what is not known is said."""
    whole = train_convolutional(tmp_path / "whole", SpectralClip(1.0, slack=0, every=every))
    moved = (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "moved")
    clip = SpectralClip(1.0, slack=0, every=every)
    assert same_weights(train_convolutional(tmp_path / "new", clip, resume=str(moved)), whole)
    assert clip.hook.step == 5


def test_a_run_resumed_with_other_settings_counts_on_and_obeys_them(tmp_path, caplog) -> None:
    train_convolutional(tmp_path, SpectralClip(1.0))
    clip = SpectralClip(0.5)
    with caplog.at_level(logging.INFO, logger="spectral_hooks.integrations.transformers"):
        model = train_convolutional(tmp_path, clip, resume=str(tmp_path / "checkpoint-3"))
    assert "counts on from step 3" in caplog.text
    assert clip.hook.step == 5
    assert largest_convolution(model) <= 0.5 * (1 + TOLERANCE)


def test_a_training_that_an_error_has_ended_leaves_no_hook(tmp_path) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    clip, model = SpectralClip(1.0), gpt2()
    trainer = trainer_of(model, tmp_path, clip, stops := Stops(), save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stops)
    trainer.train()
    assert clip.hook.step == 4
    assert largest_norm(model) <= 1 + TOLERANCE
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_post_hooks
    assert not inner._optimizer_step_pre_hooks


def test_schedule_free_weights_are_inside_in_training_and_in_evaluation(tmp_path) -> None:
    """Those that train lie between an average, which is what evaluates, and an iterate that the optimizer keeps."""
    pytest.importorskip("schedulefree")
    model = gpt2()
    settings = {"optim": "schedule_free_adamw", "learning_rate": 3.0, "max_steps": 16}
    trainer, watch = train(model, tmp_path, SpectralClip(1.0), **settings)
    assert_inside(watch, updates=16)
    trainer.optimizer.eval()
    assert largest_norm(model) <= 1 + TOLERANCE
    for step in (1, 8, 16):
        assert largest_norm(GPT2LMHeadModel.from_pretrained(tmp_path / f"checkpoint-{step}")) <= 1 + TOLERANCE


def test_one_callback_in_two_trainings(tmp_path) -> None:
    clip, second = SpectralClip(1.0, every=3), gpt2()
    train(gpt2(), tmp_path / "a", clip, save_strategy="no")
    train(second, tmp_path / "b", clip, save_strategy="no")
    expected = gpt2()
    train(expected, tmp_path / "c", SpectralClip(1.0, every=3), save_strategy="no")
    assert same_weights(second, expected)
    assert clip.hook.step == 4


def test_two_instances_together(tmp_path) -> None:
    model = gpt2()
    callbacks = SpectralClip(1.0, exclude="lm_head"), SpectralClip(0.5, layers="lm_head")
    train(model, tmp_path, *callbacks, save_strategy="no")
    assert norm(model.lm_head.weight) <= 0.5 * (1 + TOLERANCE)
    assert 0.9 < largest_norm(model) <= 1 + TOLERANCE


# -- metrics ----------------------------------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """Stands where TensorBoard's does: before the callbacks of the user."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.seen.append(dict(logs))


def test_metrics_reach_the_reporters_the_log_history_and_the_history(tmp_path) -> None:
    clip, reporter = SpectralClip(1.0, log=True), Reporter()
    trainer = trainer_of(gpt2(), tmp_path, save_strategy="no")
    trainer.callback_handler.callbacks.insert(0, reporter)
    assert clip.add_to(trainer) is clip
    clip.add_to(trainer)
    trainer.train()
    steps = [row for row in reporter.seen if "loss" in row]
    stored = [row for row in trainer.state.log_history if "loss" in row]
    assert len(clip.history) == len(steps) == len(stored) == 4
    for ours, reported, row in zip(clip.history, steps, stored, strict=True):
        assert reported["spectral_clip/norm_before"] == row["spectral_clip/norm_before"] == ours["spectral_clip/norm_before"] > 1
        assert reported["spectral_clip/clipped"] == ours["spectral_clip/clipped"] >= 1
        assert row["step"] == ours["step"]
    assert all("spectral_clip/clipped" not in row for row in reporter.seen if "loss" not in row)


def test_the_logged_norm_is_that_before_the_projection(tmp_path) -> None:
    class Raw(Watch):
        """Measures right after the step, before what was listed later."""

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            measure = lambda *_: self.norms.append(largest_norm(kwargs["model"]))  # noqa: E731
            kwargs["optimizer"].optimizer.register_step_post_hook(measure)

        def on_optimizer_step(self, args, state, control, **kwargs) -> None:
            pass

    raw, clip = Raw(), SpectralClip(1.0, log=True)
    trainer_of(gpt2(), tmp_path, raw, clip, save_strategy="no").train()
    assert [row["spectral_clip/norm_before"] for row in clip.history] == pytest.approx(raw.norms, rel=0.02)
    assert max(raw.norms) > 1.01


def test_without_log_nothing_is_logged(tmp_path) -> None:
    clip = SpectralClip(1.0)
    trainer, _ = train(gpt2(), tmp_path, clip, save_strategy="no")
    assert clip.history == []
    assert not any(key.startswith("spectral") for row in trainer.state.log_history for key in row)


# -- fused projections ------------------------------------------------------------------------------------------------------


def blocks(layer: nn.Module, count: int) -> list[float]:
    """The norms of equal parts of a `Conv1D`'s outputs, which are its columns."""
    return [norm(part) for part in layer.weight.chunk(count, dim=1)]


@pytest.mark.parametrize(
    ("split", "count"), [(True, 3), ("heads", 6), ({"*.c_attn": 3}, 3), ({"transformer.h.?.attn.c_attn": [WIDTH] * 3}, 3)]
)
def test_each_part_of_a_fused_projection_obeys_by_itself(split, count, tmp_path) -> None:
    model, clip = gpt2(), SpectralClip(1.0, split=split)
    fused = model.transformer.h[0].attn.c_attn
    parts = [sh.projections.clip(sh.DenseOperator(part, transposed=True), 1.0) for part in fused.weight.chunk(count, dim=1)]
    expected = torch.cat(parts, dim=1)

    def at_start(model) -> float:
        largest = max(norm for block in model.transformer.h for norm in blocks(block.attn.c_attn, count))
        if clip.hook.step == 0:
            # each part is clipped as a matrix of its own
            torch.testing.assert_close(fused.weight.detach(), expected.detach(), rtol=0, atol=1e-6)
        return largest

    _, watch = train(model, tmp_path, clip, measure=at_start, save_strategy="no")
    assert_inside(watch)
    assert norm(fused.weight) > 1.1, "the whole is not bounded then"
    assert norm(model.transformer.h[0].mlp.c_fc.weight) <= 1 + TOLERANCE


def test_queries_of_one_head_keep_what_another_head_is_clipped_for() -> None:
    model = gpt2()
    fused = model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        fused.weight.mul_(0.1 / norm(fused.weight))
        fused.weight[:, : WIDTH // 2] *= 100
    rest = fused.weight[:, WIDTH // 2 :].detach().clone()
    SpectralClip(1.0, split="heads").on_train_begin(None, transformers.TrainerState(), None, model=model)
    assert norm(fused.weight[:, : WIDTH // 2]) <= 1 + TOLERANCE
    assert torch.equal(fused.weight[:, WIDTH // 2 :], rest)


def test_cross_attention_has_keys_and_values_only() -> None:
    model = gpt2(add_cross_attention=True)
    clip = SpectralClip(1.0, split=True)
    clip.on_train_begin(None, transformers.TrainerState(), None, model=model)
    for block in model.transformer.h:
        assert max(blocks(block.crossattention.c_attn, 2) + blocks(block.attn.c_attn, 3)) <= 1 + TOLERANCE
        assert norm(block.crossattention.c_attn.weight) > 1.1


@pytest.mark.skipif(not hasattr(transformers, "ModernBertConfig"), reason="transformers has ModernBERT from 4.48 on")
def test_a_fused_linear_layer() -> None:
    """ModernBERT's `Wqkv` is an `nn.Linear`: its outputs are rows."""
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ModernBertModel(config)
    fused = model.layers[0].attn.Wqkv
    with torch.no_grad():
        fused.weight.normal_()
    SpectralClip(1.0, split=True).on_train_begin(None, transformers.TrainerState(), None, model=model)
    assert [norm(part) for part in fused.weight.chunk(3)] == pytest.approx([1.0] * 3, rel=1e-5)
    assert norm(fused.weight) > 1.1


def test_split_mistakes() -> None:
    state = transformers.TrainerState()
    for split, message in [
        ({"*.c_attn": 5}, "divisor of its 48 outputs"),
        ({"*.c_attn": [16, 16]}, "sizes that sum"),
        ({"*.qkv": 3}, r"`split` pattern '\*\.qkv' matches no layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            SpectralClip(split=split).on_train_begin(None, state, None, model=gpt2())
    with pytest.raises(ValueError, match=r"`split` must be True, 'heads', None or a mapping.*got 'thirds'"):
        SpectralClip(split="thirds")
    with pytest.raises(TypeError, match="`split` must map patterns to parts"):
        SpectralClip(split=3)
    with pytest.raises(ValueError, match=r"`split` knows gpt2.*got BertForMaskedLM"):
        SpectralClip(split=True).on_train_begin(None, state, None, model=bert())


# -- LoRA -------------------------------------------------------------------------------------------------------------------


def adapted(model: nn.Module, **settings):
    peft = pytest.importorskip("peft")
    defaults = {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**(defaults | settings)))


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if hasattr(layer, "lora_A")]


def product(layer, adapter: str = "default") -> Tensor:
    a, b = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
    return layer.scaling[adapter] * b @ a


def merged_norm(model: nn.Module) -> float:
    return max(norm(layer.base_layer.weight.double().T + product(layer)) for layer in lora_layers(model))


def product_norm(model: nn.Module) -> float:
    return max(norm(product(layer)) for layer in lora_layers(model))


@pytest.mark.filterwarnings("ignore:.*frozen weights exceeded.*")
def test_lora_bounds_the_merged_weight_after_every_update(tmp_path) -> None:
    model, clip = adapted(gpt2()), SpectralClip(1.0, log=True)
    names = set(model.state_dict())
    right = lora_layers(model)[0].lora_A["default"].weight
    _, watch = train(model, tmp_path, clip, measure=merged_norm, save_strategy="no", learning_rate=2.0)
    assert_inside(watch)
    assert min(row["spectral_clip/norm_before"] for row in clip.history) > 1.01, "every update left the ball"
    assert product_norm(model) > 0.1, "there is an adapter left"
    assert lora_layers(model)[0].lora_A["default"].weight is right
    assert set(model.state_dict()) == names
    assert all(torch.linalg.matrix_rank(product(layer)) == 2 for layer in lora_layers(model))
    # the other weights are frozen, and left as they are
    plain = model.merge_and_unload()
    assert norm(plain.transformer.h[0].attn.c_attn.weight) <= 1 + TOLERANCE


def test_factors_within_one_are_not_enough_and_lora_is_never_split_apart() -> None:
    """Two factors of norm 1 on a base of norm 1: the sum is outside, and is what counts."""
    model = adapted(gpt2(), lora_alpha=2)
    for layer in lora_layers(model):
        for part in (layer.lora_A["default"], layer.lora_B["default"], layer.base_layer):
            with torch.no_grad():
                part.weight.normal_()
                part.weight.div_(norm(part.weight))
    assert merged_norm(model) > 1.1
    chosen = select(model)
    assert not any("lora_" in target.name or "base_layer" in target.name for target in chosen.targets)
    bases = [layer.base_layer.weight.detach().clone() for layer in lora_layers(model)]
    SpectralClip(1.0, layers="*.c_attn").on_train_begin(None, transformers.TrainerState(), None, model=model)
    for layer, base in zip(lora_layers(model), bases, strict=True):
        assert torch.equal(layer.base_layer.weight, base), "a base that is inside stays bit for bit"
        if layer.lora_B["default"].weight.shape[0] == 3 * WIDTH:
            assert norm(layer.base_layer.weight.T + product(layer)) <= 1 + TOLERANCE


def test_lora_product_leaves_the_base_alone(tmp_path) -> None:
    model = adapted(gpt2())
    bases = [layer.base_layer.weight.detach().clone() for layer in lora_layers(model)]
    settings = {"measure": product_norm, "save_strategy": "no", "learning_rate": 2.0}
    _, watch = train(model, tmp_path, SpectralClip(0.5, lora="product", layers=["*.c_attn", "*.c_fc"]), **settings)
    assert_inside(watch, bound=0.5)
    assert watch.norms[-1] > 0.4
    assert all(torch.equal(layer.base_layer.weight, base) for layer, base in zip(lora_layers(model), bases, strict=True))


@pytest.mark.filterwarnings("ignore:.*frozen weights exceeded.*")
def test_lora_on_a_split_projection(tmp_path) -> None:
    def largest_part(model) -> float:
        fused = (layer for layer in lora_layers(model) if layer.out_features == 3 * WIDTH)
        return max(norm(part) for layer in fused for part in (layer.base_layer.weight.double().T + product(layer)).chunk(3))

    clip = SpectralClip(1.0, split=True)
    _, watch = train(adapted(gpt2()), tmp_path, clip, measure=largest_part, save_strategy="no", learning_rate=2.0)
    assert_inside(watch)
    assert watch.norms[-1] > 0.9


def test_half_precision_adapters_obey_as_stored(tmp_path) -> None:
    model = adapted(gpt2()).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"measure": merged_norm, "save_strategy": "no", "learning_rate": 2.0}
        assert_inside(train(model, tmp_path, SpectralClip(1.0), **settings)[1])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert product_norm(model) > 0.1


def test_a_frozen_base_outside_is_projected_with_a_warning_about_checkpoints(tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"frozen weights exceeded 1\.0 by themselves.*merge_and_unload"):
        train(adapted(gpt2()), tmp_path, SpectralClip(1.0), save_strategy="no")
    inside = gpt2()
    sh.SpectralClip(1.0).start(inside)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*frozen weights.*")
        _, watch = train(adapted(inside), tmp_path, SpectralClip(1.0), measure=merged_norm, save_strategy="no")
    assert_inside(watch)


def test_lora_checkpoints_on_the_projected_base_are_inside_and_resume_exactly(tmp_path) -> None:
    peft = pytest.importorskip("peft")

    def base() -> GPT2LMHeadModel:
        model = gpt2()
        sh.SpectralClip(1.0).start(model)
        return model

    settings = {"learning_rate": 1.0, "measure": merged_norm}
    whole, resumed = adapted(base()), adapted(base())
    _, seen = train(whole, tmp_path / "whole", SpectralClip(1.0), **settings)
    for step in range(1, 5):
        saved = peft.PeftModel.from_pretrained(base(), tmp_path / "whole" / f"checkpoint-{step}")
        assert merged_norm(saved) <= 1 + TOLERANCE
    path = str(tmp_path / "whole" / "checkpoint-2")
    _, watch = train(resumed, tmp_path / "resumed", SpectralClip(1.0), resume=path, **settings)
    assert same_weights(whole, resumed)
    assert watch.norms == seen.norms[2:]


def test_a_resumed_lora_run_projects_the_same_base_again(tmp_path) -> None:
    """The checkpoint has the adapters only; the base is loaded as it was before the first run, outside."""
    whole, resumed = adapted(gpt2()), adapted(gpt2())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(whole, tmp_path / "whole", SpectralClip(1.0), learning_rate=1.0)
        path = str(tmp_path / "whole" / "checkpoint-2")
        train(resumed, tmp_path / "resumed", SpectralClip(1.0), resume=path, learning_rate=1.0)
    assert same_weights(whole, resumed)


@pytest.mark.parametrize(
    ("settings", "layer", "reason"),
    [
        ({"use_dora": True}, "transformer.h.0.attn.c_attn", r"no plain LoRA on a linear layer.*merge_and_unload"),
        ({"target_modules": ["wte"], "fan_in_fan_out": False}, "transformer.wte", "Embedding has no operator"),
    ],
    ids=["dora", "embedding"],
)
def test_other_adapters_are_skipped_with_the_reason(settings, layer, reason) -> None:
    chosen = select(adapted(gpt2(), **settings))
    assert re.search(reason, chosen.skipped[f"base_model.model.{layer}"])
    assert not any("lora_" in target.name or "base_layer" in target.name for target in chosen.targets)


# -- what is refused --------------------------------------------------------------------------------------------------------


def test_deepspeeds_optimizer_is_refused() -> None:
    """What accelerate makes of an optimizer under DeepSpeed; the wrapper itself needs no DeepSpeed."""
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    model, clip = gpt2(), SpectralClip(1.0)
    optimizer = DeepSpeedOptimizerWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    before = largest_norm(model)
    with pytest.raises(NotImplementedError, match=r"DeepSpeedOptimizerWrapper trains on copies of the weights.*Use DDP"):
        clip.on_train_begin(None, transformers.TrainerState(), None, model=model, optimizer=optimizer)
    assert largest_norm(model) == before


def test_the_old_fsdp_is_refused(tmp_path) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import FullyShardedDataParallel

    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = FullyShardedDataParallel(gpt2(), device_id=torch.device("cpu"))
        with pytest.raises(NotImplementedError, match=r"FullyShardedDataParallel trains on copies.*version"):
            SpectralClip(1.0).on_train_begin(None, transformers.TrainerState(), None, model=model)
    finally:
        destroy_process_group()


def test_a_nan_weight_is_an_error_that_names_layer_and_step(tmp_path) -> None:
    class Diverges(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
            if state.global_step == 2:
                model.transformer.h[1].mlp.c_fc.weight.grad.fill_(float("nan"))

    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc, after step 3: .*NaN"):
        train(gpt2(), tmp_path, Diverges(), SpectralClip(1.0), save_strategy="no")


# -- any hook ---------------------------------------------------------------------------------------------------------------


def test_any_hook_gets_every_event(tmp_path) -> None:
    hook, reporter = Counting(every=3, log=True), Reporter()
    callback = HookCallback(hook)
    trainer = trainer_of(gpt2(), tmp_path, max_steps=5)
    trainer.callback_handler.callbacks.insert(0, reporter)
    callback.add_to(trainer)
    trainer.train()
    # before the last checkpoint, for the last steps were not followed by an action; and when training ends
    assert hook.events == ["begin", "before", "before", "before", "act", "before", "before", "finish", "finish"]
    assert callback.history == [{"step": 3, "counting/step": 3.0}]
    assert [row.get("counting/step") for row in reporter.seen if "loss" in row] == [None, None, 3.0, 3.0, 3.0]
    assert repr(callback) == "HookCallback(Counting(0.0, every=3, log=True))"
    assert any("Embedding" in reason for reason in callback.skipped.values())
    assert "Embedding" in callback.report()
    # its state is beside the checkpoints, and comes back; between two actions it does not begin again
    resumed = HookCallback(Counting(every=3, log=True))
    trainer_of(gpt2(), tmp_path, resumed, max_steps=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.hook.events == hook.events
    # from elsewhere it counts on
    moved = (tmp_path / "checkpoint-4").rename(tmp_path / "moved")
    counted = HookCallback(Counting(every=3, log=True))
    trainer_of(gpt2(), tmp_path / "new", counted, max_steps=5).train(resume_from_checkpoint=str(moved))
    assert counted.hook.events == ["before", "finish", "finish"]
    assert counted.hook.step == 5


def test_any_hook_without_an_optimizer() -> None:
    callback, model, state = HookCallback(Counting()), gpt2(), transformers.TrainerState()
    callback.on_train_begin(None, state, None, model=model, optimizer=None)
    model(**{key: value[None] for key, value in data(1)[0].items()}).loss.backward()
    callback.on_pre_optimizer_step(None, state, None)
    callback.on_optimizer_step(None, state, None)
    assert callback.hook.events == ["begin", "before", "act"]


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_what_a_hook_adds_to_gradients_reaches_the_optimizer(settings, tmp_path) -> None:
    """A hook that pulls weights to zero is the optimizer's own weight decay: after gradients are complete, and clipped."""
    models = {"pulled": gpt2(), "decayed": gpt2(), "plain": gpt2()}
    for name, model in models.items():
        weights = {id(p): p for layer in layers_of(model).values() for p in [layer.weight]}
        others = [p for p in model.parameters() if id(p) not in weights]
        groups = [{"params": list(weights.values()), "weight_decay": 0.2 if name == "decayed" else 0.0}, {"params": others}]
        callbacks = [HookCallback(Counting(0.2))] if name == "pulled" else []
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        trainer_of(model, tmp_path / name, *callbacks, optimizers=(optimizer, None), save_strategy="no", **settings).train()
    for one, two in zip(models["pulled"].parameters(), models["decayed"].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    weight, other = (models[name].transformer.h[0].mlp.c_fc.weight for name in ("pulled", "plain"))
    assert (weight - other).abs().max() > 1e-3


@pytest.mark.parametrize("shows", [True, False])
def test_a_trainer_without_bars_shows_none_of_ours(shows, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "_DELAY", 0)
    train(gpt2(), tmp_path, SpectralClip(1.0), max_steps=1, save_strategy="no", disable_tqdm=not shows)
    assert ("projecting weights" in capsys.readouterr().err) == (shows and progress.tqdm is not None)


# -- options ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_the_hook_under_its_name(name) -> None:
    option = {name: OPTIONS[name]}
    callback, core = SpectralClip(**option), sh.SpectralClip(**option)
    assert getattr(callback.hook, name) == getattr(core, name) != getattr(sh.SpectralClip(), name)
    assert repr(callback) == repr(core) != repr(SpectralClip())


@pytest.mark.parametrize("split", [True, "heads"])
def test_the_repr_shows_a_split_by_the_model_and_stays_the_same(split) -> None:
    clip = SpectralClip(2.0, every=3, split=split)
    shown = f"SpectralClip(2.0, every=3, split={split!r})"
    assert repr(clip) == shown
    clip.on_train_begin(None, transformers.TrainerState(), None, model=gpt2())
    assert repr(clip) == shown
    assert repr(SpectralClip(split=False)) == repr(SpectralClip())


@pytest.mark.parametrize(("option", "error"), [*WRONG, ({"lora": "product2"}, ValueError), ({"split": "thirds"}, ValueError)])
def test_options_are_checked_in_the_constructor(option, error) -> None:
    with pytest.raises(error, match=f"`?{next(iter(option))}"):
        SpectralClip(**option)


def test_docstring_and_settings() -> None:
    assert doctest.testmod(importlib.import_module("spectral_hooks.integrations.transformers")).failed == 0
    assert SpectralClip().hook.max_norm == 1.0


# -- the example ------------------------------------------------------------------------------------------------------------


def test_example(tmp_path) -> None:
    command = [sys.executable, str(Path(__file__).parents[2] / "examples" / "transformers_text.py"), "--quick"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    plain, clipped = (
        next(words for line in done.stdout.splitlines() if (words := line.split())[:1] == [name] and len(words) > 1)
        for name in ("plain", "SpectralClip(1.0)")
    )
    assert plain[4] == clipped[4], "both start from the same weights"
    assert float(plain[5]) > 1
    assert 0.98 <= float(clipped[5]) <= 1
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
