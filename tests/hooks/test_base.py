"""What all hooks share: settings, events, resuming, reports; and how often a step looks at a weight."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections import Counter
from functools import partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.hooks import Hook, inside, normalizations
from spectral_hooks.operators import ConvOperator, DenseOperator
from spectral_hooks.weights import targets


class Recorder(Hook):
    """Writes down what it is told to do."""

    def __init__(self, factor: float, *, layers=None, exclude=None, every=1, split=None, lora="merged", log=False) -> None:
        super().__init__(layers=layers, exclude=exclude, every=every, split=split, lora=lora, log=log)
        self.factor = factor
        self.events: list[object] = []

    def begin(self) -> None:
        self.events.append("begin")

    def before_step(self, parameters) -> None:
        self.events.append("before")

    def act(self, targets, stepped) -> None:
        self.events.append([target.name for target in targets])

    def metrics(self) -> dict[str, float]:
        return {"recorder/events": float(len(self.events))} if self.log else {}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 4)
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float | None = None) -> None:
    if lr is not None:
        optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    model(torch.randn(2, 3, 6, 6)).square().mean().backward()
    optimizer.step()


# -- settings ---------------------------------------------------------------------------------------------------------------


def decay(step: int) -> float:
    return 1.0


SETTINGS = {
    "layers": "0",
    "exclude": [nn.Linear],
    "every": 2,
    "rounds": 5,
    "projection": "rescale",
    "slack": 0.5,
    "schedule": decay,
    "batch_norm": "clip",
    "split": {"3": 2},
    "lora": "product",
    "distribute": True,
    "log": True,
}


def test_repr_shows_what_differs_from_the_defaults_and_nothing_else() -> None:
    assert repr(sh.SpectralClip()) == repr(sh.SpectralClip(1, slack=None, projection=sh.projections.clip)) == "SpectralClip(1.0)"
    for name, value in SETTINGS.items():
        text = repr(sh.SpectralClip(2.0, **{name: value}))
        assert text.startswith(f"SpectralClip(2.0, {name}=")
        assert text.count("=") == 1
        assert " at 0x" not in text
    everything = repr(sh.SpectralClip(**SETTINGS))
    assert all(f"{name}=" in everything for name in SETTINGS)
    assert repr(Recorder(3.0, every=2)) == "Recorder(3.0, every=2)"


@pytest.mark.parametrize(
    ("projection", "shown"),
    [
        ("rescale", "spectral_hooks.projections.rescale (guarantees the bound)"),
        ("soft_cap", "spectral_hooks.projections.soft_cap (guarantees the bound)"),
        (partial(sh.projections.soft_cap, strength=0.5), "soft_cap, strength=0.5) (does not guarantee the bound)"),
        ("hammer", "spectral_hooks.projections.hammer (does not guarantee the bound)"),
        (
            partial(sh.projections.band, min_norm=0.5),
            "partial(spectral_hooks.projections.band, min_norm=0.5) (guarantees the bound)",
        ),
        (decay, f"{decay.__module__}.decay (does not guarantee the bound)"),
    ],
)
def test_repr_shows_functions_by_where_they_are_imported_from(projection, shown: str) -> None:
    assert "projection=" in repr(sh.SpectralClip(projection=projection))
    assert shown in repr(sh.SpectralClip(projection=projection))


def test_repr_is_the_same_in_another_process() -> None:
    """A checkpoint is found again by it."""
    code = """if True:
        from torch import nn
        import spectral_hooks as sh
        class Choice:
            def __call__(self, layer):
                return True
        print(sh.SpectralClip(0.5, layers=["a", nn.Linear, Choice(), lambda layer: True], split={nn.Linear: 2}, slack=0.5))"""
    shown = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    choices = "['a', torch.nn.Linear, __main__.Choice(...), __main__.<lambda>]"
    assert shown == {f"SpectralClip(0.5, layers={choices}, slack=0.5, split={{torch.nn.Linear: 2}})\n"}


def test_numpy_numbers_are_numbers() -> None:
    hook = sh.SpectralClip(np.float32(0.5), every=np.int64(2), rounds=np.int32(4), slack=np.float64(0.25), log=np.bool_(True))
    assert repr(hook) == "SpectralClip(0.5, every=2, rounds=4, slack=0.25, log=True)"
    hook = sh.SpectralClip(schedule=lambda step: np.float32(0.5), split={"3": np.int64(2)}, slack=0)
    hook.start(model := network())
    assert float(torch.linalg.matrix_norm(model[3].weight.detach()[:4].double(), 2)) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"lora": "product2"}, ValueError, "`lora` must be one of 'merged', 'product'; got 'product2'"),
        ({"split": 3}, TypeError, "`split` must map patterns to parts"),
        ({"split": {"0": 0}}, ValueError, "`split` of '0' .* got 0"),
        ({"split": {"0": "3"}}, ValueError, "`split` of '0' .* got '3'"),
        ({"split": {3: 2}}, TypeError, "`split` takes globs"),
        ({"layers": 3}, TypeError, "`layers` takes globs, layer types and predicates, or a list of them; got 3"),
        ({"exclude": ["a", 1.0]}, TypeError, r"`exclude` takes globs.*got 1\.0"),
        ({"distribute": "yes"}, ValueError, "`distribute` must be True or False; got 'yes'"),
        ({"log": None}, ValueError, "`log` must be True or False; got None"),
        ({"every": 2.0}, ValueError, r"`every` must be a positive int or 'auto'; got 2\.0"),
        ({"slack": "0"}, ValueError, "`slack`"),
    ],
)
def test_arguments_are_checked_when_they_are_given(arguments: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sh.SpectralClip(**arguments)


# -- events -----------------------------------------------------------------------------------------------------------------


def test_a_hook_of_ones_own_hears_every_event() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = Recorder(1.0, exclude="0", every=2, log=True)
    with hook.attach(model, optimizer):
        for _ in range(4):
            step(model, optimizer)
        model[3].weight.requires_grad_(False)
        for _ in range(2):
            step(model, optimizer)
        hook.rewritten()
    assert hook.events == ["begin", *["before", "before", ["1", "3", "4"]] * 2, "before", "before", ["1", "4"], ["1", "4"]]
    assert hook.step == 6
    assert hook.metrics() == {"recorder/events": 11.0}
    assert Recorder(1.0).metrics() == {}
    assert hook.skipped["3"].startswith("frozen")
    with pytest.raises(ValueError, match=r"^layer 3, after step 6: no$"), hook.naming("3"):
        raise ValueError("no")


class Pull(Hook):
    """A penalty of half the squares of all weights: it adds `factor · W` to the gradient of what is about to be stepped."""

    def __init__(self, factor: float) -> None:
        super().__init__(layers=None, exclude=None, every=1, split=None, lora="merged", log=False)
        self.factor = factor

    def before_step(self, parameters) -> None:
        for target in self.targets:
            for weight in target.parameters():
                if any(weight is p for p in parameters):
                    weight.grad.add_(weight.detach(), alpha=self.factor)


class Bare:
    """An optimizer that knows nothing of torch's hooks."""

    def __init__(self, parameters, lr: float, weight_decay: float) -> None:
        self.param_groups = [{"params": list(parameters), "lr": lr, "weight_decay": weight_decay}]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * (p.grad + group["weight_decay"] * p)


@pytest.mark.parametrize(("kind", "closure"), [(torch.optim.SGD, False), (torch.optim.SGD, True), (Bare, False)])
def test_a_penalty_is_added_once_whatever_the_number_of_optimizers(kind, closure: bool) -> None:
    """Each step is of one optimizer's parameters: the penalty is then weight decay."""
    found = []
    for factor, decay in ((0.3, 0.0), (0.0, 0.3)):
        model = network()
        parts = [model[:2], model[3], model[4]]
        optimizers = [kind([layer.weight for layer in part.modules() if hasattr(layer, "weight")], lr=0.1, weight_decay=decay)
                      for part in parts]  # fmt: skip
        with Pull(factor).attach(model, optimizers):
            for seed in range(3):
                torch.manual_seed(seed)
                model.zero_grad()
                model(torch.randn(2, 3, 6, 6)).square().mean().backward()
                for optimizer in optimizers:
                    optimizer.step(lambda: None) if closure else optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for pulled, decayed in zip(*found, strict=True):
        torch.testing.assert_close(pulled, decayed, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found[0][0], network()[0].weight)


def test_a_hook_of_ones_own_resumes_where_it_was() -> None:
    model = network()
    first = Recorder(1.0, every=3)
    first.start(model)
    for _ in range(4):
        first.after_step()
    second = pickle.loads(pickle.dumps(first))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.events.clear()
    second.start(model)
    for _ in range(2):
        second.after_step()
    assert second.events == [["0", "1", "3", "4"]], "neither at the start, which is between two, nor before step 6"


def test_messages_name_the_hook() -> None:
    model, hook = network(), Recorder(1.0)
    with pytest.warns(UserWarning, match=r"none of the 4 selected weights \(0, \.\.\.\) .* the Recorder acts now"):
        hook.attach(model, torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0))
    with pytest.raises(ValueError, match="this Recorder is attached to another model"):
        hook.attach(network(), torch.optim.SGD(model.parameters(), lr=1.0))


def test_a_handle_shows_what_it_holds() -> None:
    model = network()
    handle = sh.SpectralClip(2.0).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert repr(handle) == "Handle(SpectralClip(2.0) on Sequential, with SGD)"
    handle.remove()
    assert repr(handle) == "Handle(SpectralClip(2.0) on Sequential, removed)"


def test_metrics_of_the_clip() -> None:
    model, hook = network(), sh.SpectralClip(0.5, log=True)
    before = max(float(sh.spectral_norm(model[i]).detach()) for i in (0, 1, 3, 4))
    hook.start(model)
    assert hook.metrics() == {"spectral_clip/norm_before": pytest.approx(before, rel=0.011), "spectral_clip/clipped": 4.0}
    hook.finish()
    assert hook.metrics()["spectral_clip/clipped"] == 0.0
    assert sh.SpectralClip().metrics() == {}


# -- what a step costs ------------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often weights are gathered, looked through for NaN, and brought to their canonical form."""
    counts: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        plain = getattr(owner, name)

        @wraps(plain)
        def counting(*args, **kwargs):
            counts[name] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(targets, "full")
    count(targets, "check_finite")
    count(inside, "check_finite")
    count(ConvOperator, "canonical")
    count(DenseOperator, "canonical")
    return counts


def attached(max_norm: float, **options) -> tuple[nn.Sequential, torch.optim.Optimizer, sh.SpectralClip]:
    model, hook = network(), sh.SpectralClip(max_norm, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    hook.attach(model, optimizer)
    step(model, optimizer)
    return model, optimizer, hook


def test_a_weight_that_is_inside_is_touched_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, hook = attached(20.0)
    counts = counted(monkeypatch)
    step(model, optimizer)
    assert counts == {"full": 4, "canonical": 2}  # matrices are their own canonical form
    assert hook.clipped == 0


def test_a_weight_that_is_outside_is_gathered_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, hook = attached(0.5)
    counts = counted(monkeypatch)
    with torch.no_grad():
        for layer in (model[0], model[1], model[3], model[4]):
            layer.weight.mul_(1.5)
    hook.after_step()
    assert hook.clipped == 4
    assert counts["full"] == 4
    assert counts["check_finite"] == 0  # what is at a finite distance from a finite weight is finite


def test_a_step_with_weights_inside_passes_through_nine_files() -> None:
    """Of the package, once the first steps were timed: a hook that projects nothing is read from a few of them."""
    _, _, hook = attached(20.0)
    for _ in range(20):
        hook.after_step()
    package, files = str(Path(sh.__file__).parent), set()

    def watch(frame, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            files.add(frame.f_code.co_filename)

    sys.setprofile(watch)
    try:
        hook.after_step()
    finally:
        sys.setprofile(None)
    assert hook.clipped == 0
    assert 1 < len(files) <= 9, sorted(files)


def test_layers_of_one_shape_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed depends on the number of shapes, not of layers."""
    from spectral_hooks.hooks import watch

    calls = []
    plain = watch.lengths
    monkeypatch.setattr(watch, "lengths", lambda kernels: calls.append(len(kernels)) or plain(kernels))
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)], *[nn.Linear(6, 4), nn.Linear(4, 6)] * 2)
    hook = sh.SpectralClip(5.0)
    hook.start(model)
    hook.after_step()
    assert sorted(calls) == [1, 1, 5]


# -- what is known, and of what ---------------------------------------------------------------------------------------------


def test_what_is_known_of_one_use_says_nothing_of_two() -> None:
    """A state of a model whose layers were apart, loaded where they are tied and the second amplifies."""
    apart = nn.Sequential(nn.Conv2d(2, 2, 3, stride=3), nn.Conv2d(2, 2, 3))
    nn.init.constant_(apart[0].weight, 0.1)
    first = sh.SpectralClip(1.0)
    first.start(apart)
    tied = copy.deepcopy(apart)
    tied[1].weight = tied[0].weight
    assert float(sh.spectral_norm(tied[1]).detach()) > 1.5
    second = sh.SpectralClip(1.0)
    second.load_state_dict(first.state_dict())
    second.start(tied)
    second.after_step()
    assert float(sh.spectral_norm(tied[1]).detach()) <= 1 + 1e-6


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    with torch.no_grad():
        model[0].weight.div_(2 * torch.linalg.matrix_norm(model[0].weight, 2))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("trains", [False, True])
def test_a_base_weight_under_adapters_is_looked_at_again_once_it_was_written(trains: bool) -> None:
    model = adapted()
    layer = model.base_model.model[0]
    layer.base_layer.weight.requires_grad_(trains)
    hook = sh.SpectralClip(1.0)
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    hook.after_step()
    inside = layer.base_layer.weight.detach().clone()
    hook.after_step()
    assert torch.equal(layer.base_layer.weight, inside)
    layer.base_layer.load_state_dict({"weight": 6 * inside})
    hook.after_step()
    for matrix in (layer.base_layer.weight, sh.as_operator(layer).weight):
        assert float(torch.linalg.matrix_norm(matrix.detach().double(), 2)) <= 1 + 1e-6


def test_a_frozen_base_that_is_inside_is_not_measured_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    hook = sh.SpectralClip(1.0)
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    monkeypatch.setattr(targets.Whole, "inside", lambda *_: pytest.fail("looked at again"))
    hook.after_step()


# -- the report -------------------------------------------------------------------------------------------------------------


def whole_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 5),
            "conv": nn.Conv2d(3, 8, 3),
            "norm": nn.BatchNorm2d(8),
            "mid": nn.Linear(5, 5),
            "head": nn.Linear(5, 7),
            "rnn": nn.LSTM(2, 2),
            "gru": nn.GRU(2, 2),
        }
    )
    model["head"].weight = model["embed"].weight
    model["mid"].requires_grad_(False)
    return model


def table(report: str) -> dict[str, list[str]]:
    """The rows of a report by layer, split at two or more spaces."""
    lines = report.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.split() == ["layer", "kind", "norm", "bound", "status"]]
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 :] if "  " in line.strip()]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.filterwarnings("ignore:SpectralClip leaves")
def test_the_report_is_a_table_with_norms_bounds_and_reasons() -> None:
    model = whole_model()
    hook = sh.SpectralClip(0.9, batch_norm="clip")
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model["conv"].weight.mul_(2)
    rows = table(hook.report())
    assert list(rows) == ["conv", "mid", "head", "norm", "embed"]
    for name in ("conv", "mid", "head"):
        kind, norm, bound, *_ = rows[name]
        assert kind == type(model[name]).__name__
        assert float(norm) == pytest.approx(float(sh.spectral_norm(model[name]).detach()), rel=0.011)
        assert float(bound) == 0.9
    assert rows["conv"][3] == "outside"
    assert rows["mid"][3].startswith("frozen")
    assert rows["head"][3] in ("inside", "at the bound")
    assert rows["norm"] == ["BatchNorm2d", "0.9", "0.9", "inside"]
    assert rows["embed"] == ["Embedding", "the weight of this Embedding is bounded as that of head"]
    assert "Free for want of support" in hook.report()
    assert hook.skipped.keys() == {"mid", "embed", "rnn", "gru"}
    for name in ("rnn", "gru"):
        assert f"- {hook.skipped[name]}\n    {name}" in hook.report()


def test_the_report_says_where_a_weight_is_not_finite() -> None:
    model, hook = network(), sh.SpectralClip(1.0)
    hook.start(model)
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    assert "NaN or infinity" in table(hook.report())["3"][-1]


def test_the_report_of_a_hook_without_bounds() -> None:
    hook = Recorder(1.0, layers=["0", "3"])
    hook.start(network())
    assert hook.report().startswith("2 weights, 2 layers or weights left out.")
    assert [row[-1] for row in table(hook.report()).values()] == ["selected", "selected"]
    assert "- not among `layers`\n    1, 4" in hook.report()


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_the_report_appears_at_attach_when_the_logger_is_at_info(level: int, caplog: pytest.LogCaptureFixture) -> None:
    model, hook = network(), sh.SpectralClip(3.0)
    with caplog.at_level(level, "spectral_hooks"):
        hook.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [record.getMessage() for record in caplog.records] == [f"SpectralClip(3.0)\n{hook.report()}"] * (level == logging.INFO)


def test_gains_in_the_report_are_the_largest() -> None:
    norm = nn.BatchNorm1d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-4.0, 1.0, 2.0]))
        norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    expected: Tensor = norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
    (row,) = normalizations.rows({"bn": norm}, 1.0, {})
    assert float(row.norm) == pytest.approx(float(expected.max()), rel=1e-3)
    assert row.status == "outside"
