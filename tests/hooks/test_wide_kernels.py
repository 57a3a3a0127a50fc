"""Wide kernels at the bound: whatever the steps are, they stay inside, by cheap clips that are as near as dear ones."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.hooks import keep, watch
from spectral_hooks.hooks.watch import Job, Known
from spectral_hooks.projections.leading import clip_leading
from spectral_hooks.weights.targets import Target, Whole

SIZE = 48
LAYERS = {
    "plain": (nn.Conv2d, (SIZE, SIZE, 3), {"padding": 1}),
    "strided": (nn.Conv2d, (SIZE, 24, 3), {"stride": 2, "padding": 1}),
    "grouped": (nn.Conv2d, (2 * SIZE, 2 * SIZE, 3), {"groups": 2}),
    "dilated": (nn.Conv2d, (SIZE, 56, 3), {"dilation": 2}),
    "transposed": (nn.ConvTranspose2d, (SIZE, 50, 2), {"stride": 1}),
    "circular": (nn.Conv2d, (60, SIZE, 3), {"padding": 1, "padding_mode": "circular"}),
    "1-D": (nn.Conv1d, (SIZE, SIZE, 5), {}),
    "3-D": (nn.Conv3d, (SIZE, SIZE, 2), {}),
}


@pytest.fixture(autouse=True)
def as_wide_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of so few channels go with the small ones, all at once; here they stand for those of hundreds."""
    monkeypatch.setattr(keep, "are_small", lambda op: False)


def norm(op: sh.LinearOperator) -> float:
    """That of the lattice operator, from below, by full SVDs in float64 on a grid which the clip does not use."""
    kernel = op.canonical().detach().double()
    axes = tuple(range(3, kernel.ndim))
    points = {1: 61, 2: 11, 3: 5}[len(axes)]
    symbols = torch.fft.fftn(kernel, s=(points,) * len(axes), dim=axes).movedim((1, 2), (-2, -1))
    return op.lattice_factor * float(torch.linalg.matrix_norm(symbols, 2).amax())


def layer(name: str) -> nn.Module:
    kind, shape, options = LAYERS[name]
    torch.manual_seed(0)
    return kind(*shape, bias=False, **options)


def kept(op: sh.LinearOperator, known: Known | None, slack: float = 0.08) -> tuple[Tensor, Known]:
    """The weight, and what is known of it."""
    (job,) = watch.still_inside([Job(Whole(Target("", []), [op]), known)], 1.0)
    if not job.is_inside:
        (job,) = keep.keep_inside([job], 1.0, rounds=3, slack=slack)
    assert job.known is not None
    return (op.weight if job.change is None else job.change), job.known


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is decomposed."""
    sizes: list[int] = []
    eigh = torch.linalg.eigh

    def counted(matrices: Tensor) -> Tensor:
        sizes.extend([matrices.shape[-1]] * matrices.shape[:-2].numel())
        return eigh(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    return sizes


def step_like(weight: Tensor, seed: int, length: float) -> Tensor:
    """An update that pushes outwards, in the same directions every time, with noise."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(weight.dtype)
    lasting = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1000), dtype=torch.float32).to(weight.dtype)
    return length * (noise / noise.norm() + lasting / lasting.norm() + 0.5 * weight / weight.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("start", [0.97, 3.0])  # clipped by few values from then on, and at first by many
def test_every_step_ends_inside(name: str, dtype: torch.dtype, start: float) -> None:
    """Whatever comes: steps, a step 100 times as large, another weight; and never much deeper than the slack."""
    module = layer(name).to(dtype)
    op, known = sh.as_operator(module), None
    weight, known = kept(op.with_weight(start * op.weight.detach() / norm(op)), None)
    for n, length in enumerate((0.3, 0.3, 0.3, 30.0, 0.3)):
        weight, known = kept(op.with_weight(weight + step_like(weight, n, length)), known)
        assert 0.85 <= norm(op.with_weight(weight)) <= 1.0 + 1e-6, n
        assert norm(op.with_weight(weight)) <= known.norm * (1 + 1e-6)
        assert weight.dtype == dtype
    replaced = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    weight, known = kept(op.with_weight(replaced), known)
    assert norm(op.with_weight(weight)) <= 1.0 + 1e-6


def at_the_bound() -> tuple[sh.KernelOperator, Known]:
    """A weight after some steps, with what is known of it."""
    op = sh.as_operator(layer("plain"))
    weight, known = kept(op.with_weight(0.97 * op.weight.detach() / norm(op)), None)
    for n in range(3):
        weight, known = kept(op.with_weight(weight + step_like(weight, n, 0.15)), known)
    return op.with_weight(weight), known


def test_what_is_known_of_the_last_clip_takes_the_place_of_decompositions(decompositions: list[int]) -> None:
    op, known = at_the_bound()
    assert known.leading is not None
    columns = known.leading.shape[-1]
    assert columns <= 0.4 * SIZE
    moved = op.with_weight(op.weight + step_like(op.weight, 9, 0.15))
    decompositions.clear()
    warm, _ = kept(moved, known)
    assert not torch.equal(warm, moved.weight)
    assert max(decompositions) < SIZE
    decompositions.clear()
    cold, now = kept(moved, known._replace(leading=None))
    assert SIZE in decompositions
    # neither is farther from the weight than a few percent beyond the other, and both are inside
    near, far = (float((clip - moved.weight).norm()) for clip in (cold, warm))
    assert far <= 1.05 * near
    assert max(norm(op.with_weight(clip)) for clip in (warm, cold)) <= 1
    assert now.leading is not None


def test_what_is_inside_and_moves_fast_is_proven_as_it_is(decompositions: list[int]) -> None:
    """With subspaces from before and without: nothing is decomposed, and the weight stays."""
    op, known = at_the_bound()
    inside = op.with_weight(op.weight * 0.5)
    decompositions.clear()
    for last in (known, known._replace(leading=None)):
        weight, now = kept(inside, last)
        assert weight is inside.weight
        assert norm(inside) <= now.norm <= 1
    assert SIZE not in decompositions


def test_the_clip_is_hardly_farther_than_that_of_all_values() -> None:
    """At the same depth, each scaled to it: by one round on the full grid, decomposed."""
    op, known = at_the_bound()
    kernel = op.with_weight(op.weight + step_like(op.weight, 9, 0.15)).canonical().detach()
    found = clip_leading(op, kernel, 0.92, known.leading)
    assert found is not None
    reference, _ = sh.projections.dual.clip_kernel(op, kernel.double(), 0.92, 1, stretch=False)
    distances = []
    for clipped in (found.kernel.double(), reference):
        scaled = clipped * min(0.94 / norm(op.with_weight(op.from_canonical(clipped))), 1)
        distances.append(float((scaled - kernel).norm()))
    assert distances[0] <= 1.05 * distances[1]


def test_slow_weights_that_are_inside_stay_as_they_are() -> None:
    op, known = at_the_bound()
    inside = op.with_weight(0.9 * op.weight)
    _, settled = kept(inside, known)
    moved = inside.with_weight(inside.weight + 1e-3 * step_like(inside.weight, 3, 1.0))
    weight, _ = kept(moved, settled._replace(age=3))
    assert weight is moved.weight


def test_a_subspace_that_has_lost_the_large_values_is_noticed(decompositions: list[int]) -> None:
    op, known = at_the_bound()
    assert known.leading is not None
    moved = op.with_weight(1.3 * op.weight)
    wrong = torch.linalg.qr(torch.randn(known.leading.shape, dtype=torch.complex64)[..., :3]).Q
    decompositions.clear()
    weight, now = kept(moved, known._replace(leading=wrong))
    assert norm(op.with_weight(weight)) <= 1
    assert SIZE in decompositions
    assert now.norm <= 1


def test_many_values_above_the_level_are_not_few() -> None:
    kernel = torch.eye(SIZE).reshape(1, SIZE, SIZE, 1, 1) * torch.ones(3, 3)
    assert clip_leading(sh.as_operator(layer("plain")), kernel, 0.5) is None


def test_leading_vectors_of_another_kernel_are_refused() -> None:
    op, known = at_the_bound()
    assert known.leading is not None
    with pytest.raises(ValueError, match="`leading`"):
        clip_leading(op, op.canonical().detach(), 0.9, known.leading[:3])


def test_a_resumed_run_goes_on_inside_with_or_without_what_is_known() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, SIZE, 3), nn.Conv2d(SIZE, SIZE, 3))
    runs = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    hook = sh.SpectralClip(1.0)
    hook.attach(model, optimizer)
    images = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))

    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        for _ in range(3):
            optimizer.zero_grad()
            (-net(images).square().mean()).backward()
            optimizer.step()
            assert norm(sh.as_operator(net[1])) <= 1 + 1e-6
        return net[1].weight.detach()

    train(model, optimizer)
    for forgetful in (False, True):
        other = copy.deepcopy(model)
        again = torch.optim.AdamW(other.parameters(), lr=2e-3)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        state = copy.deepcopy(hook.state_dict())
        if forgetful:
            state["known"] = {name: tuple(Known(*now)._replace(leading=None)) for name, now in state["known"].items()}
        resumed = sh.SpectralClip(1.0)
        resumed.load_state_dict(state)
        resumed.attach(other, again)
        runs.append(train(other, again))
    runs.append(train(model, optimizer))
    torch.testing.assert_close(runs[0], runs[2], rtol=0, atol=1e-6)
    difference = sh.as_operator(model[1]).with_weight(runs[1] - runs[2])
    assert norm(difference) <= 0.08
    model[1].load_state_dict({"weight": 5 * model[1].weight, "bias": model[1].bias})
    train(model, optimizer)


@pytest.mark.parametrize("other", [nn.Conv2d(SIZE, SIZE, 5), nn.Conv2d(SIZE, 52, 2), nn.Conv2d(SIZE, SIZE, 3, stride=2)], ids=str)
@torch.no_grad()
def test_a_run_that_is_resumed_with_another_layer_of_the_name(other: nn.Module) -> None:
    """What is known of the old one is of no use, and no error."""
    before, other, known = layer("plain"), copy.deepcopy(other), None
    for each in (before, before, other, other, other):
        weight, known = kept(sh.as_operator(each), known)
        assert norm(sh.as_operator(each).with_weight(weight)) <= 1 + 1e-6
        each.weight.copy_(weight * 1.03)
    assert known.leading is not None, "the wide way was taken"


def test_jobs_carry_the_subspaces_on() -> None:
    op, known = at_the_bound()
    job = Job(Whole(Target("", []), [op]), known)
    for now in (job.proven(0.9), job.changed(op.weight * 0.9, 0.9), replace(job, is_inside=True)):
        assert now.known is not None
        assert now.known.leading is known.leading
