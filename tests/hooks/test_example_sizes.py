"""`SpectralClip(example=)`: the bound holds at the recorded sizes, the constraint is looser, and recording leaves no trace."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
from collections import UserDict
from itertools import product
from typing import Any

import numpy as np
import observers
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import spectral_hooks as sh
from spectral_hooks.hooks.keep import keep_inside
from spectral_hooks.norms.proofs import certificates
from spectral_hooks.operators.covering import at_sizes

#: What a norm may exceed the bound by in float32, measured in float64.
ROUNDING = 1e-6


class Network(nn.Module):
    """Convolutions of many geometries, of which one is called twice and one never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, (2, 3), padding="same", dilation=2, groups=4)
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)
        self.point = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.5)
        self.never = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        x = self.twice(self.norm(self.stem(x * scale)))
        x = self.up(self.depthwise(self.drop(x))[..., :3])
        return self.head(self.point(self.twice(x)).mean((2, 3)))


IMAGES = torch.randn(3, 2, 9, 7, generator=torch.Generator().manual_seed(1))
SIZES = {"stem": "9×7", "twice": "10×6", "depthwise": "5×4", "up": "5×3"}


def finite_norms(layer: nn.Module, size: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """The norms at a size and at all smaller ones that torch admits."""
    found = {}
    for smaller in product(*(range(1, n + 1) for n in size)):
        try:
            found[smaller] = observers.finite_norm(layer, smaller)
        except RuntimeError:
            continue
    return found


def size_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("×")))


def loud(model: nn.Module, gain: float = 4.0) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(gain)
    return model


# -- the bound ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_bound_holds_at_the_recorded_size_and_at_all_smaller_ones(dtype: torch.dtype) -> None:
    model = loud(Network()).to(dtype)
    sh.SpectralClip(1.0, example=IMAGES).start(model)
    for name, size in SIZES.items():
        norms = finite_norms(model.get_submodule(name), size_of(size))
        assert len(norms) > 6
        assert max(norms.values()) <= 1 + ROUNDING, name
    assert observers.lattice_norm(model.never) <= 1 + ROUNDING  # was not called, so it is bounded at every size
    assert observers.matrix_norm(model.head.weight) <= 1 + ROUNDING


def test_the_constraint_is_looser() -> None:
    """More of the weight is kept, and the norm over all frequencies may exceed the bound."""
    for size in (1, 2, 4):
        torch.manual_seed(size)
        wide, everywhere = (nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False)) for _ in range(2))
        everywhere.load_state_dict(wide.state_dict())
        before = wide[0].weight.detach().clone()
        sh.SpectralClip(0.5, example=torch.randn(1, 16, size, size)).start(wide)
        sh.SpectralClip(0.5).start(everywhere)
        kept, less = (observers.finite_norm(model[0], (size, size)) for model in (wide, everywhere))
        assert less < kept <= 0.5 * (1 + ROUNDING)
        assert observers.lattice_norm(wide[0]) > 0.5 * 1.02 > observers.lattice_norm(everywhere[0])
        moved, more = (float((model[0].weight - before).norm()) for model in (wide, everywhere))
        assert moved < 0.98 * more


def test_the_bound_holds_at_every_step_of_training() -> None:
    model = loud(Network())
    optimizer = torch.optim.AdamW(model.parameters(), 0.03)
    clip = sh.SpectralClip(1.0, example=IMAGES)
    clipped = 0
    with clip.attach(model, optimizer):
        for step in range(12):
            optimizer.zero_grad()
            (model(IMAGES).square().mean() * -1).backward()
            if step == 8:  # the user replaces a weight
                model.stem.weight.data.mul_(100)
            optimizer.step()
            clipped += clip.clipped
            for name, size in SIZES.items():
                norm = observers.finite_norm(model.get_submodule(name), size_of(size))
                assert norm <= 1 + ROUNDING, (step, name)
    assert clipped > 12


def test_circular_padding_counts_every_recorded_size() -> None:
    layer = nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(layer)
    loud(model)
    clip = sh.SpectralClip(1.0, example=lambda model: [model(torch.zeros(1, 3, n)) for n in (5, 4)])
    clip.start(model)
    assert max(observers.finite_norm(layer, (n,)) for n in (4, 5)) <= 1 + ROUNDING
    assert clip.targets[0].sizes == {layer: ((4,), (5,))}


def test_tied_weights_are_bounded_in_each_use() -> None:
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, stride=2)
    second.weight = first.weight
    model = loud(nn.Sequential(first, nn.MaxPool2d(2), second))
    clip = sh.SpectralClip(1.0, example=torch.randn(1, 3, 8, 8))
    clip.start(model)
    (target,) = clip.targets
    assert target.sizes == {first: ((8, 8),), second: ((4, 4),)}
    assert max(finite_norms(first, (8, 8)).values()) <= 1 + ROUNDING
    assert max(finite_norms(second, (4, 4)).values()) <= 1 + ROUNDING
    assert "8×8, 4×4" in clip.report()


@pytest.mark.parametrize("name", ["rescale", "band", "polar"])
def test_other_projections_that_guarantee_the_bound_obey_it_too(name: str) -> None:
    model = loud(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)))
    sh.SpectralClip(1.0, example=torch.randn(1, 4, 3, 3), projection=name).start(model)
    assert max(finite_norms(model[0], (3, 3)).values()) <= 1 + ROUNDING < observers.lattice_norm(model[0])


@pytest.mark.parametrize("sizes", [(5, 4), (2, 3), (1, 1), (2, 7)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 3, 3), (1, 40, 34, 3, 3), (3, 1, 4, 3, 2), (1, 20, 70, 4)], ids=str)
def test_certificates_on_a_grid_are_those_of_its_frequencies(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Also of grids with fewer frequencies than taps."""
    sizes = sizes[: len(shape) - 3]
    kernels = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    waves = [np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(k)) / n) for n, k in zip(sizes, shape[3:], strict=True)]
    symbols = kernels.double().numpy()
    for axis, wave in enumerate(waves, start=3):
        symbols = np.moveaxis(np.tensordot(wave, symbols, (1, axis)), 0, axis)
    norms = np.linalg.norm(np.moveaxis(symbols, (1, 2), (-2, -1)), ord=2, axis=(-2, -1)).reshape(shape[0], -1).max(1)
    free = torch.zeros(len(norms), dtype=torch.float64)
    for scale in (0.5, 0.97, 0.9995, 1.0005, 1.1, 40.0):
        scaled = kernels * torch.from_numpy(scale / norms).float().reshape(-1, *(1,) * (len(shape) - 1))
        estimate, proven = certificates(scaled, free, free, sizes)
        assert (estimate <= scale * (1 + 1e-5)).all()
        assert (proven >= scale * (1 - 1e-6)).all()
        assert (proven <= max(1.11 * scale, 1)).all() if scale < 1 else (proven == float("inf")).all()


def test_layers_of_equal_shape_on_different_grids_are_told_apart() -> None:
    """What is inside on the coarse grid may be outside on the finer one."""
    from spectral_hooks.hooks.watch import Job, know
    from spectral_hooks.weights.targets import Target, Whole

    layers = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2)]
    ops = [at_sizes(layer, [size]) for layer, size in zip(layers, [(1, 1), (6, 6)], strict=True)]
    small, large = (float(sh.spectral_norm(op.with_weight(layers[0].weight.detach()))) for op in ops)
    assert small < large
    weight = layers[0].weight.detach() / (small * large) ** 0.5
    ops = [op.with_weight(weight) for op in ops]
    jobs = [Job(Whole(Target("", []), [op]), know(op, 0.9, 0.9 * weight), far=0.05) for op in ops]
    kept = keep_inside(jobs, 1.0, rounds=3, slack=0.02)
    assert kept[0].change is None
    assert kept[0].is_inside
    assert kept[1].change is not None
    assert float(sh.spectral_norm(ops[1].with_weight(kept[1].change))) <= 1 + ROUNDING


# -- no trace -------------------------------------------------------------------------------------------------------------


def everything(model: nn.Module) -> Any:
    """All that a forward or a careless copy could change."""
    tensors = [*model.parameters(), *model.buffers()]
    return (
        [(id(t), t._version, t.detach().clone().numpy().tobytes(), t.grad is None) for t in tensors],
        [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)],
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        str(np.random.get_state()),
    )


class Restless(nn.Module):
    """Draws from every generator, counts its calls, and writes a buffer in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2, momentum=None)
        self.register_buffer("calls", torch.zeros(()))
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(1)
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return self.norm(self.conv(x.mul_(noise)))


@pytest.mark.parametrize("training", [True, False])
def test_recording_leaves_no_trace(training: bool) -> None:
    model = nn.Sequential(Restless(), Network()).train(training)
    model[1].norm.eval()
    example = IMAGES.clone()
    before = everything(model)
    clip = sh.SpectralClip(1000.0, example=example)  # nothing to clip
    clip.start(model)
    assert everything(model) == before
    assert model[0].log == []
    assert torch.equal(example, IMAGES)
    assert clip.targets[0].sizes == {model[0].conv: ((9, 7),)}


def test_an_example_that_fails_leaves_no_trace_either() -> None:
    model = nn.Sequential(Restless(), nn.Flatten(), nn.Linear(5, 2))
    before = everything(model)
    with pytest.raises(ValueError, match=r"`example` of \(3, 2, 9, 7\) .* layer 2 raised RuntimeError.*labels the inputs alone"):
        sh.SpectralClip(1.0, example=IMAGES).start(model)
    assert everything(model) == before


def test_the_copy_is_gone_after_it() -> None:
    model = Network()
    sh.SpectralClip(1.0, example=IMAGES).start(model)
    gc.collect()
    assert sum(type(thing) is Network for thing in gc.get_objects()) == 1
    assert not nn.modules.module._global_forward_pre_hooks


# -- what an example is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (IMAGES, "(3, 2, 9, 7)"),
        ((IMAGES,), "((3, 2, 9, 7),)"),
        ([IMAGES, torch.tensor(2.0)], "((3, 2, 9, 7), ())"),
        ({"x": IMAGES, "scale": 2.0}, "{'x': (3, 2, 9, 7), 'scale': 2.0}"),
        (UserDict(x=IMAGES), "{'x': (3, 2, 9, 7)}"),
        (IMAGES.double(), "(3, 2, 9, 7)"),
    ],
)
def test_tensors_arguments_and_keyword_arguments(example: Any, text: str) -> None:
    clip = sh.SpectralClip(1.0, example=example)
    clip.start(Network())
    assert repr(clip) == f"SpectralClip(1.0, example={text})"
    assert "9×7" in clip.report()


def test_an_input_without_a_batch() -> None:
    clip = sh.SpectralClip(1.0, example=IMAGES[0])
    clip.start(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1)))
    assert "9×7" in clip.report()


class ChannelsLast(nn.Module):
    """A layer of a user's own, that takes `(batch, positions, channels)`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x.mT, self.weight, padding=1).mT


@sh.as_operator.register
def _(layer: ChannelsLast, input_size: Any = None) -> sh.ConvOperator:
    return sh.ConvOperator(layer.weight, padding=1, input_size=input_size)


def test_channels_that_do_not_stand_first_leave_a_layer_bounded_at_every_size() -> None:
    clip, model = sh.SpectralClip(1.0, example=torch.randn(1, 6, 2)), nn.Sequential(ChannelsLast())
    clip.start(model)
    assert "every size (none recorded)" in clip.report()
    plain = nn.Conv1d(2, 2, 3)
    plain.weight = model[0].weight
    assert observers.lattice_norm(plain) <= 1 + ROUNDING


def runs(model: nn.Module) -> None:
    model(IMAGES[:1])


def test_a_function_of_the_model() -> None:
    clip = sh.SpectralClip(1.0, example=runs)
    clip.start(Network())
    assert repr(clip).endswith("test_example_sizes.runs)")
    assert "10×6" in clip.report()


@pytest.mark.parametrize("example", [3, "images", np.zeros((1, 2, 9, 7))])
def test_what_is_no_example(example: Any) -> None:
    with pytest.raises(TypeError, match="`example` must be a tensor, a tuple of the arguments"):
        sh.SpectralClip(1.0, example=example)


def test_a_model_that_cannot_be_copied() -> None:
    class Stubborn(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("one of a kind")

    with pytest.raises(ValueError, match=r"this Stubborn cannot be copied \(TypeError: one of a kind\).*Leave `example` away"):
        sh.SpectralClip(1.0, example=IMAGES).start(Stubborn(nn.Conv2d(2, 2, 3)))


def test_a_forward_that_was_replaced_by_a_closure_of_the_model() -> None:
    """Its copy would run the model itself."""
    model = Network()
    plain = model.forward
    model.forward = lambda x: plain(x)
    before = everything(model)
    with pytest.raises(ValueError, match="calls the model itself"):
        sh.SpectralClip(1.0, example=IMAGES).start(model)
    assert everything(model) == before


def test_a_pruned_layer_after_its_forward() -> None:
    """Its weight has a graph by then, which torch does not copy."""
    model = loud(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    model(IMAGES)
    clip = sh.SpectralClip(1.0, example=torch.randn(1, 2, 3, 3))
    clip.start(model)
    kernel = (model[0].weight_orig * model[0].weight_mask).detach()
    plain = nn.Conv2d(2, 3, 3, padding=1)
    plain.weight.data = kernel
    assert max(finite_norms(plain, (3, 3)).values()) <= 1 + ROUNDING < observers.lattice_norm(plain)


def test_wrappers_are_looked_through() -> None:
    model = torch.compile(Network(), backend="eager")
    clip = sh.SpectralClip(1.0, example=IMAGES)
    clip.start(model)
    assert "10×6" in clip.report()


def test_models_of_matrices_are_not_run() -> None:
    sh.SpectralClip(1.0, example=["runs", "nothing"]).start(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1)))


# -- what it tells, and resuming ------------------------------------------------------------------------------------------


def test_the_report_has_the_sizes() -> None:
    clip = sh.SpectralClip(1.0, example=IMAGES)
    clip.start(Network())
    lines = clip.report().splitlines()
    assert lines[1].split()[-1] == "input"
    ends = {line.split()[0]: line for line in lines[2:] if line.startswith((*SIZES, "never", "point", "head"))}
    assert all(ends[name].endswith(f"  {size}") for name, size in SIZES.items())
    assert ends["never"].endswith("every size (none recorded)")
    assert ends["point"].endswith("every size")
    assert ends["head"].endswith("inside")
    plain = sh.SpectralClip(1.0)
    plain.start(Network())
    assert "input" not in plain.report()
    assert "every size" not in plain.report()


def trained(model: nn.Module, clip: sh.SpectralClip, batches: range, optimizer_state: Any = None) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    model.eval()
    with clip.attach(model, optimizer):
        for n in batches:
            optimizer.zero_grad()
            images = torch.randn(2, 2, 9, 7, generator=torch.Generator().manual_seed(n))
            (-model(images).square().mean()).backward()
            optimizer.step()
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("again", [None, IMAGES])
def test_a_resumed_run_equals_an_uninterrupted_one(again: Tensor | None) -> None:
    """Without an example of its own it keeps the sizes of the first."""
    whole, _ = trained(loud(Network()), sh.SpectralClip(1.0, example=IMAGES), range(6))
    first = sh.SpectralClip(1.0, example=IMAGES)
    model = loud(Network())
    weights, state = trained(model, first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second, model = sh.SpectralClip(1.0, example=again), Network()
    second.load_state_dict(torch.load(file, weights_only=True))
    model.load_state_dict(weights)
    resumed, _ = trained(model, second, range(3, 6), state)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert "10×6" in second.report()
    # a run that starts anew has none
    second = sh.SpectralClip(1.0)
    second.start(model)
    assert second.state_dict().keys() == {"step", "known"}


@pytest.mark.parametrize("copied", [lambda hook: pickle.loads(pickle.dumps(hook)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_copies_have_the_shapes_of_the_example(copied: Any) -> None:
    clip = sh.SpectralClip(1.0, example={"x": torch.randn(300, 2, 9, 7), "scale": torch.tensor(2)})
    clip.start(Network())
    other = copied(clip)
    assert len(pickle.dumps(other)) < 5000
    assert repr(other) == repr(clip)
    other.start(Network())
    assert other.state_dict()["sizes"] == clip.state_dict()["sizes"]


def test_sizes_of_another_model_are_refused() -> None:
    hook = sh.SpectralClip(1.0, example=torch.zeros(1, 2, 6, 6))
    hook.start(nn.Sequential(nn.Conv2d(2, 2, 3)))
    other = sh.SpectralClip(1.0)
    other.load_state_dict(hook.state_dict())
    with pytest.raises(ValueError, match=r"^layer 0: its input sizes .* 1 dimensions.*`example`"):
        other.start(nn.Sequential(nn.Conv1d(2, 2, 3)))


def test_states_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`state` must be what `state_dict\(\)` of a hook returned"):
        sh.SpectralClip(1.0).load_state_dict({"weight": torch.ones(2)})
