"""What a hook knows from earlier steps: it never lets a weight outside pass, and its clips obey the bound."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.hooks import keep, watch
from spectral_hooks.hooks.watch import Job, Known, know
from spectral_hooks.weights.targets import Target, Whole

SHAPES = [(8, 6, 3, 3), (6, 8, 3), (4, 4, 2, 3, 2), (34, 34, 3, 3)]


def grid_norm(op: sh.LinearOperator, points: int = 20) -> float:
    """The norm of the lattice operator from below, by full SVDs on a grid."""
    kernel = op.canonical().double()
    axes = tuple(range(3, kernel.ndim))
    symbols = torch.fft.fftn(kernel, s=(points if len(axes) < 3 else 16,) * len(axes), dim=axes).movedim((1, 2), (-2, -1))
    return float(torch.linalg.matrix_norm(symbols, 2).amax())


def jobs(ops, known) -> list[Job]:
    return [Job(Whole(Target("", []), [op]), last) for op, last in zip(ops, known, strict=True)]


def still_inside(ops, known, max_norm: float) -> list[Known | None]:
    """What is known now of those that are proven to be inside."""
    return [job.known if job.is_inside else None for job in watch.still_inside(jobs(ops, known), max_norm)]


def keep_inside(ops, known, max_norm: float, **options) -> list[tuple[Tensor, Known | None]]:
    """The weights, and what is known of them."""
    looked = [replace(job, is_inside=False) for job in watch.still_inside(jobs(ops, known), max_norm)]
    kept = keep.keep_inside(looked, max_norm, **options)
    return [(job.op.weight if job.change is None else job.change, job.known) for job in kept]


def kernels(shape: tuple[int, ...], seed: int) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weight / grid_norm(sh.ConvOperator(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_outside_is_never_taken_for_inside(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    start = (0.9 * kernels(shape, 0)).to(dtype)
    known = know(sh.ConvOperator(start), 1.01 * grid_norm(sh.ConvOperator(start)))
    verdicts = []
    for seed in range(1, 4):
        for length in (0.0, 1e-4, 0.03, 0.09, 0.15, 0.5):
            # outwards, which is the worst direction, or anywhere
            direction = start / grid_norm(sh.ConvOperator(start)) if seed == 1 else kernels(shape, seed).to(dtype)
            op = sh.ConvOperator(start + length * direction)
            (now,) = still_inside([op], [known], 1.0)
            inside = now is not None
            verdicts.append(inside)
            if now is not None:
                assert now.norm <= 1
                assert grid_norm(sh.ConvOperator(now.weight)) <= now.norm
                assert grid_norm(op) <= 1.0
            if length <= 1e-4:
                assert inside
    assert not all(verdicts)


@pytest.mark.parametrize("bytes_at_once", [1, 1 << 26])
def test_many_layers_at_once_as_one_by_one(bytes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_BATCH_BYTES", bytes_at_once)
    torch.manual_seed(0)
    ops, known = [], []
    for i in range(12):
        shape = SHAPES[i % 2]
        weight = kernels(shape, i)
        known.append(know(sh.ConvOperator(0.9 * weight), 0.91) if i % 5 else None)
        ops.append(sh.ConvOperator(0.9 * weight + (0.02 * i) * kernels(shape, 50 + i)))
    together = [now is not None for now in still_inside(ops, known, 1.0)]
    assert together == [still_inside([op], [last], 1.0)[0] is not None for op, last in zip(ops, known, strict=True)]
    assert True in together
    assert False in together
    clips = keep_inside(ops, known, 1.0, rounds=3, slack=0.05)
    for op, last, (weight, now) in zip(ops, known, clips, strict=True):
        ((alone, then),) = keep_inside([op], [last], 1.0, rounds=3, slack=0.05)
        torch.testing.assert_close(weight, alone, rtol=0, atol=1e-6)
        assert now.norm == pytest.approx(then.norm, abs=1e-6)


def test_nan_and_another_shape_or_dtype_are_not_inside() -> None:
    weight = 0.5 * kernels((4, 4, 3, 3), 0)
    known = know(sh.ConvOperator(weight), 0.51)
    for other in (weight * float("nan"), weight * float("inf"), weight.double(), weight[:2]):
        assert still_inside([sh.ConvOperator(other)], [known], 1.0) == [None]
    assert still_inside([sh.ConvOperator(weight)], [known], 0.5) == [None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("speed", [1e-3, 0.03, 0.5])
def test_a_weight_that_pushes_outwards_stays_inside(shape: tuple[int, ...], speed: float) -> None:
    """Step after step; and never deeper than the slack, if it was at the bound."""
    generator = torch.Generator().manual_seed(0)
    weight, known, clips = 3 * kernels(shape, 1), None, 0
    for n in range(12):
        op = sh.ConvOperator(weight)
        (now,) = still_inside([op], [known], 1.0)
        if now is not None:
            known = now
        else:
            ((clipped, known),) = keep_inside([op], [known], 1.0, rounds=3, slack=0.05)
            clips += clipped is not op.weight
            weight = clipped
        norm = grid_norm(sh.ConvOperator(weight))
        assert norm <= 1.0
        assert norm >= 0.9, n
        noise = torch.randn(weight.shape, generator=generator)
        weight = weight * (1 + speed) + 0.1 * speed * noise / noise.norm()
    assert clips >= (12 if speed == 0.5 else 2)


# -- how far a weight has moved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 255, 256, 257, 100_000, 3_000_001])
def test_lengths_are_bounds_however_long_the_sum(size: int, dtype: torch.dtype) -> None:
    """Equal entries round all the same way."""
    generator = torch.Generator().manual_seed(size)
    for entries in (torch.full((1, size), 0.3), torch.rand(2, size, generator=generator), torch.full((1, size), 1e-17)):
        kernels = entries.to(dtype)[:, :, None]
        true = kernels.double().flatten(1).square().sum(1)
        bounds = watch.lengths(kernels).double().square()
        assert bool((bounds >= true * (1 + 1e-12 * (dtype == torch.float32))).all())
        assert bool((bounds <= true * (1 + 1e-4)).all())


def test_a_long_move_out_of_the_ball_is_seen() -> None:
    """A rank-one move of 16 million equal entries, whose norm a plain sum in float32 takes for 1.5 % less."""
    n, bound = 4096, 4.1
    start = torch.full((n, n), 1e-3 / n)
    last = know(sh.DenseOperator(start), 1.1e-3)
    for length, inside in ((4.09, True), (4.12186654806137, False)):
        (now,) = still_inside([sh.DenseOperator(torch.full((n, n), length / n))], [last], bound)
        assert (now is not None) == inside


SCALES = [1e-30, 1e-22, 1e-20, 1e-10, 1.0, 1e10, 1e22, 1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_bounds_of_any_size(scale: float, dtype: torch.dtype) -> None:
    """Squares of small entries vanish in float32, those of large ones overflow; what the hook sees does not depend on it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48, bias=False), nn.Conv1d(6, 8, 3, bias=False)).to(dtype)
    weights = [layer.weight for layer in model]
    starts = [torch.randn(weight.shape) for weight in weights]
    with torch.no_grad():
        for weight, start in zip(weights, starts, strict=True):
            weight.copy_(start.double() * (0.001 * scale))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    hook = sh.SpectralClip(scale)
    hook.attach(model, optimizer)
    largest, clips = 0.0, 0
    for n in range(12):
        for weight, start in zip(weights, starts, strict=True):
            weight.grad = (-(0.02 + 0.001 * n) * scale * (torch.ones(weight.shape) + 0.1 * start).double()).to(dtype)
        optimizer.step()
        clips += hook.clipped
        matrix, kernel = (weight.detach().double() / scale for weight in weights)
        norms = [float(torch.linalg.matrix_norm(matrix, 2)), grid_norm(sh.ConvOperator(kernel), points=64)]
        assert max(norms) <= 1 + 1e-6
        largest = max(largest, *norms)
    assert largest > 0.9
    assert clips > 10


# -- the geometry --------------------------------------------------------------------------------------------------------------


def edits() -> dict[str, tuple[nn.Module, dict]]:
    return {
        "stride": (nn.Conv2d(4, 6, 3, stride=2, bias=False), {"stride": (1, 1)}),
        "dilation": (nn.Conv1d(4, 6, 3, stride=2, bias=False), {"dilation": (2,)}),
        "padding mode": (nn.Conv1d(4, 6, 4, stride=3, padding=2, bias=False), {"padding_mode": "circular"}),
        "groups": (nn.Conv2d(2, 8, 3, groups=2, bias=False), {"groups": 1, "in_channels": 1}),
        "transposed": (nn.ConvTranspose1d(4, 4, 3, stride=2, bias=False), {"stride": (1,)}),
    }


@pytest.mark.parametrize("kind", edits())
def test_another_geometry_is_another_map(kind: str) -> None:
    """What was proven of a weight with one stride says nothing of it with another."""
    layer, changes = edits()[kind]
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.ones_like(layer.weight) + 0.1 * torch.randn(layer.weight.shape))
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sh.SpectralClip(1.0).attach(model, optimizer)
    for n in range(4):
        if n == 2:
            before = float(sh.spectral_norm(sh.as_operator(layer)).detach())
            for name, value in changes.items():
                setattr(layer, name, value)
            assert float(sh.spectral_norm(sh.as_operator(layer)).detach()) > 1.1 * before
        layer.weight.grad = torch.full_like(layer.weight, 1e-7)
        optimizer.step()
        assert float(sh.spectral_norm(sh.as_operator(layer)).detach()) <= 1 + 1e-6


def test_what_is_known_goes_with_its_geometry() -> None:
    op = sh.ConvOperator(0.5 * kernels((4, 4, 3, 3), 0), stride=2)
    last = know(op, 0.9)
    assert still_inside([op], [last], 1.0)[0] is not None
    assert still_inside([sh.ConvOperator(op.weight)], [last], 1.0) == [None]
    assert still_inside([op], [Known(op.weight, 0.9)], 1.0) == [None]  # of a state that was saved without
    finite = sh.ConvOperator(op.weight, stride=2, input_size=9)
    before = watch.geometry(finite)
    assert finite.out_shape  # which it keeps
    assert watch.geometry(finite) == before != last.geometry


# -- the hook ---------------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2),
        nn.Flatten(),
        nn.Linear(32, 10),
        nn.Linear(10, 10),
    )


def train(model: nn.Module, hook: sh.SpectralClip, steps: int, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """The largest norm after every step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    norms = []
    with hook.attach(model, optimizer):
        for n in range(steps):
            generator = torch.Generator().manual_seed(n)
            images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            norms.append(largest(model))
    return norms


def largest(model: nn.Module) -> float:
    layers = [layer for layer in model if isinstance(layer, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        return max(
            grid_norm(op) if isinstance(op, sh.ConvOperator) else float(torch.linalg.matrix_norm(op.weight, 2))
            for op in map(sh.as_operator, layers)
        )


@pytest.mark.parametrize("slack", [0, 0.02, 0.08])
def test_inside_after_every_step_whatever_the_slack(slack: float) -> None:
    norms = train(network(), sh.SpectralClip(1.0, slack=slack), 15)
    assert max(norms) <= 1 + 1e-6
    assert min(norms) >= 1 - slack - 0.02


def test_state_makes_a_resumed_run_equal_bit_for_bit() -> None:
    model, hook = network(), sh.SpectralClip(0.8)
    train(model, hook, 6)
    state, weights = copy.deepcopy(hook.state_dict()), copy.deepcopy(model.state_dict())
    resumed, other = network(), sh.SpectralClip(0.8)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(model, hook, 0)  # attached again: projects nothing anew
    for each, its in ((model, hook), (resumed, other)):
        its.load_state_dict(state)
        train(each, its, 5)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)

    without, lean = network(), sh.SpectralClip(0.8)
    without.load_state_dict(weights)
    lean.load_state_dict({"step": state["step"]})
    assert max(train(without, lean, 5)) <= 0.8 + 1e-6


@pytest.mark.parametrize("name", ["rescale", "polar", "band", "soft_cap"])
def test_projections_that_guarantee_the_bound(name: str) -> None:
    hook = sh.SpectralClip(0.7, projection=name)
    assert max(train(network(), hook, 4)) <= 0.7 + 1e-6
    assert f"{name} (guarantees the bound)" in repr(hook)


@pytest.mark.parametrize("name", ["hammer", "clipped_decay", "parseval"])
def test_projections_that_do_not(name: str) -> None:
    hook = sh.SpectralClip(0.7, projection=name)
    norms, free = train(network(), hook, 4), train(network(), sh.SpectralClip(1e6), 4)
    assert 0.7 < norms[-1] < free[-1], "nearer, and not there"
    assert f"{name} (does not guarantee the bound)" in repr(hook)


def test_a_projection_of_ones_own() -> None:
    calls = []

    def halved(op: sh.LinearOperator, max_norm: float) -> Tensor:
        calls.append(max_norm)
        return op.weight.detach() / 2

    model = network()
    before = model[5].weight.detach().clone()
    sh.SpectralClip(3.0, projection=halved).start(model)
    assert calls == [3.0] * 4
    assert torch.equal(model[5].weight, before / 2)
    hook = sh.SpectralClip(projection=partial(sh.projections.band, min_norm=0.5))
    assert "partial(spectral_hooks.projections.band, min_norm=0.5)" in repr(hook)
    hook.start(model)
    assert float(torch.linalg.svdvals(model[6].weight.detach()).min()) >= 0.5 - 1e-5


def test_a_schedule_moves_the_bound() -> None:
    bounds = [2.0, 1.5, 1.0, 0.5, 0.5]
    hook = sh.SpectralClip(schedule=lambda step: bounds[min(step, 4)])
    norms = train(network(), hook, 4)
    for norm, bound in zip(norms, bounds[1:], strict=True):
        assert norm <= bound + 1e-6
    assert hook.bound == 0.5
    with pytest.raises(ValueError, match="max_norm"):
        sh.SpectralClip(schedule=lambda step: -1.0).start(network())


def test_batch_norm_gains(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-4, 4, 8))
    with caplog.at_level(logging.INFO, "spectral_hooks"):
        sh.SpectralClip(0.9).start(model)
    assert [record.getMessage() for record in caplog.records] == [
        "1 batch normalizations are left alone; batch_norm='clip' bounds their gains too."
    ]
    assert float(model[1].weight.detach().abs().max()) == 4

    hook = sh.SpectralClip(0.9, batch_norm="clip")
    train(model, hook, 3)
    gain = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    assert float(gain.detach().abs().max()) <= 0.9 + 1e-6
    assert float(gain.detach().abs().max()) >= 0.5
    assert "1" not in hook.skipped
    dense = model[1].eval()(torch.eye(8)[:, :, None, None]) - model[1](torch.zeros(1, 8, 1, 1))
    assert float(torch.linalg.matrix_norm(dense.flatten(1), 2)) <= 0.9 + 1e-6

    other = network()
    with torch.no_grad():
        other[1].weight.fill_(5)
    sh.SpectralClip(batch_norm="clip", exclude="1").start(other)
    assert float(other[1].weight.max()) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"projection": "clp"}, ValueError, "`projection` must be"),
        ({"projection": 3}, ValueError, "`projection` must be"),
        ({"slack": -0.1}, ValueError, "`slack`"),
        ({"slack": 0.9}, ValueError, "`slack`"),
        ({"slack": True}, ValueError, "`slack`"),
        ({"schedule": 1.0}, TypeError, "`schedule`"),
        ({"batch_norm": "scale"}, ValueError, "`batch_norm`"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sh.SpectralClip(**arguments)
