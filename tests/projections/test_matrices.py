"""Laws of the clip of batches of matrices, against LAPACK's singular values in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from observers import Counter, array, clipped_matrix, matrix_norm

from spectral_hooks.projections import matrices
from spectral_hooks.projections.matrices import Clipped, clip_matrices

ALLOWED = 1 + 1e-6
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 7), (8, 8), (40, 16), (33, 130), (128, 96), (200, 300))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def kinds(rows: int, columns: int) -> Tensor:
    """Matrices of many kinds, with the bound 1 in mind."""
    noise = random(7, rows, columns, dtype=torch.float64) / max(rows, columns) ** 0.5
    u, s, vh = torch.linalg.svd(noise[0], full_matrices=False)
    deficient = u[:, :1] * 3 @ vh[:1]
    repeated = u * torch.where(torch.arange(len(s)) % 3 == 0, 1.5, 0.75) @ vh
    on_it = u @ vh * (1 + 2e-4)
    sudden = u @ vh + 100 * noise[1]
    return torch.stack([noise[0], 0.3 * noise[1], deficient, repeated, on_it, sudden, torch.zeros(rows, columns)])


def check(before: Tensor, clipped: Clipped, c: float, depth: float = 0.0) -> None:
    """Inside, proven, nearest, and bit for bit where it was inside."""
    eps = torch.finfo(before.dtype).eps
    smallest = torch.finfo(before.dtype).smallest_normal * eps
    assert clipped.weights.dtype == before.dtype
    assert clipped.weights.shape == before.shape
    for was, now, norm in zip(before, clipped.weights, clipped.norms.tolist(), strict=True):
        assert matrix_norm(now) <= norm <= c * ALLOWED
        top = matrix_norm(was)
        if top <= c:
            assert torch.equal(was, now)
        elif top > c * (1 + 2e-6):
            nearest = clipped_matrix(was, 0.0, c * (1 - depth))
            lengths = np.linalg.norm(array(was) / c), np.linalg.norm(nearest / c)
            # rounding to storage, and the room that it needs; and a clip that is computed in float32 or better
            allowed = (
                4 * max(eps, 1e-10) * (lengths[1] + min(was.shape) ** 0.5 * (1 + 2 * np.sqrt(lengths[1]))) + 4e-7 * lengths[0]
            )
            allowed += 4 * smallest / c * was.numel() ** 0.5 * min(was.shape) ** 0.5
            assert np.linalg.norm(array(now) / c - nearest / c) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clipped_matrices_are_inside_and_nearest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    before = kinds(*shape).to(dtype)
    [clipped] = clip_matrices([before], 1.0)
    check(before, clipped, 1.0)


@pytest.mark.parametrize("depth", [0.02, 0.3])
def test_depth(depth: float) -> None:
    before = kinds(48, 80).float()
    check(before, clip_matrices([before], 1.0, depth=depth)[0], 1.0, depth)


@pytest.mark.parametrize("scale", [1e-30, 3e-9, 7.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_scale(scale: float, dtype: torch.dtype) -> None:
    before = (kinds(24, 40) * scale).to(dtype)
    check(before, clip_matrices([before], scale)[0], scale)


def test_far_outside_of_a_bound_that_is_tiny_for_the_dtype() -> None:
    for dtype, c in ((torch.float32, 1e-30), (torch.float64, 1e-200), (torch.float16, 1e-3)):
        before = random(2, 12, 20, dtype=dtype)
        [clipped] = clip_matrices([before], c)
        for now, norm in zip(clipped.weights, clipped.norms.tolist(), strict=True):
            assert matrix_norm(now) <= norm <= c * ALLOWED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wide_matrix_at_the_bound(dtype: torch.dtype) -> None:
    weights = (random(1, 512, 2048) * 2 / 2048**0.5).to(dtype)
    for seed, step in ((1, 1e-3), (2, 1e-3), (3, 0.1)):
        [clipped] = clip_matrices([weights], 1.0)
        check(weights, clipped, 1.0)
        move = random(1, 512, 2048, seed=seed)
        weights = (clipped.weights.float() + move * (step * clipped.weights.float().norm() / move.norm())).to(dtype)


def test_several_batches_and_bounds_of_their_own() -> None:
    batches = [random(3, 8, 12), random(2, 20, 6, dtype=torch.float64), random(0, 4, 4)]
    bounds = [torch.tensor([0.5, 100.0, 2.0]), torch.tensor([1e-3, 7.0]), torch.zeros(0)]
    originals = [batch.clone() for batch in batches]
    for batch, original, bound, clipped in zip(batches, originals, bounds, clip_matrices(batches, bounds), strict=True):
        assert torch.equal(batch, original)
        for i, c in enumerate(bound.tolist()):
            check(batch[i : i + 1], Clipped(clipped.weights[i : i + 1], clipped.norms[i : i + 1]), c)


def test_the_norm_of_what_is_inside_is_sharp() -> None:
    before = 0.1 * kinds(30, 30)[:1].float()
    [clipped] = clip_matrices([before], 1.0)
    assert clipped.norms.item() <= 1.01 * matrix_norm(before[0])


def test_a_clip_is_idempotent() -> None:
    [once] = clip_matrices([kinds(40, 64).float()], 1.0)
    [twice] = clip_matrices([once.weights], 1.0)
    assert torch.equal(once.weights, twice.weights)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(bad: float) -> None:
    weights = random(2, 6, 9)
    weights[1, 2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        clip_matrices([weights], 1.0)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="`max_norm`"):
        clip_matrices([random(1, 2, 2)], 0.0)
    with pytest.raises(ValueError, match="`depth`"):
        clip_matrices([random(1, 2, 2)], 1.0, depth=-0.1)
    for bounds in ([torch.ones(2)], [torch.ones(1), torch.ones(1)], [torch.zeros(1)], [torch.tensor([float("nan")])]):
        with pytest.raises(ValueError, match="`max_norm`"):
            clip_matrices([random(1, 2, 2)], bounds)


def test_far_outside_the_clip_that_measures_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measuring(op: Any, c: float, original: Any = matrices.clip) -> Tensor:
        asked.append(c)
        return original(op, c)

    monkeypatch.setattr(matrices, "clip", measuring)
    u, s, vh = torch.linalg.svd(random(12, 20, dtype=torch.float64), full_matrices=False)
    far = u * torch.where(torch.arange(12) < 3, 1e9, s / s.median()) @ vh
    before = torch.cat([far[None], kinds(12, 20)])
    [clipped] = clip_matrices([before], 1.0)
    assert asked == [1.0]
    check(before, clipped, 1.0)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)], ids=str)
def test_less_precise_products_do_not_touch_the_proof(shape: tuple[int, int]) -> None:
    """Neither autocast nor what is allowed of float32 products changes what is proven."""
    before = kinds(*shape).float()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            [clipped] = clip_matrices([before], 1.0)
    finally:
        torch.set_float32_matmul_precision(precision)
    check(before, clipped, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_an_accelerator(dtype: torch.dtype) -> None:
    before = kinds(96, 200).to("cuda", dtype)
    [known] = clip_matrices([before], 1.0, depth=0.02)
    assert known.weights.is_cuda
    check(before.cpu(), Clipped(known.weights.cpu(), known.norms), 1.0, 0.02)


def counted(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any], weights: list[Tensor]) -> tuple[int, int]:
    """Torch operations, and for how many of them the host would wait."""
    counter = Counter(weights)

    def read(tensors: list[Tensor], original: Any = matrices.read) -> list[Tensor]:
        counter.waits += bool(tensors)
        values = [x.tolist() for x in original(tensors)]
        counter.waits -= sum(x.numel() for x in tensors)  # what tolist has asked for
        return [torch.tensor(x, dtype=torch.float64).reshape(y.shape) for x, y in zip(values, tensors, strict=True)]

    with monkeypatch.context() as patch:
        patch.setattr(matrices, "read", read)
        with counter:
            function()
    return counter.operations, counter.waits


def test_the_counter_sees_what_waits() -> None:
    weight = random(3)
    with Counter([weight]) as counter:
        bool((weight + 1).sum() > 0)
        weight[weight > 0]
        torch.ones(3).sum().item()
    assert counter.waits == 2


def layers(scale: float) -> list[Tensor]:
    """24 layers of 4 shapes."""
    return [
        random(6, *shape, seed=i) * scale / shape[1] ** 0.5 for i, shape in enumerate([(48, 48), (48, 160), (160, 48), (96, 32)])
    ]


def test_operations_and_readings_of_a_step_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    known = clip_matrices(layers(3.0), 1.0)
    now = [known[i].weights + 1e-3 * layer for i, layer in enumerate(layers(1.0))]
    assert all((torch.linalg.matrix_norm(x, 2) > 1).all() for x in now)

    operations, reads = counted(monkeypatch, lambda: clip_matrices(now, 1.0), now)
    assert operations <= 900
    assert reads <= 3
