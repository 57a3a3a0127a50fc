"""Small kernels in the hook: inside after every step in every geometry, all of one shape at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from observers import Counter, lattice_norm
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.hooks import keep_small

ALLOWED = 1 + 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def geometries() -> dict[str, nn.Module]:
    """Layers by name; two of each are in a model."""
    return {
        "plain": nn.Conv2d(6, 8, 3, padding=1, bias=False),
        "one channel": nn.Conv2d(1, 12, 3, bias=False),
        "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        "dilated": nn.Conv2d(3, 4, 3, stride=2, dilation=3, bias=False),
        "transposed": nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1, bias=False),
        "grouped": nn.Conv2d(12, 18, 3, groups=3, bias=False),
        "depthwise": nn.Conv2d(4, 4, 3, groups=4, bias=False),
        "oblong": nn.Conv2d(4, 6, (1, 5), bias=False),
        "circular": nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular", bias=False),
        "1-D": nn.Conv1d(7, 9, 4, stride=3, bias=False),
        "3-D": nn.Conv3d(2, 3, 2, bias=False),
    }


def attached(layers: list[nn.Module], **settings: Any) -> tuple[sh.SpectralClip, list[nn.Module]]:
    model = nn.ModuleList(layers)
    hook = sh.SpectralClip(1.0, **settings)
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    return hook, list(model)


@torch.no_grad()
def push(layers: list[nn.Module], size: float, seed: int) -> None:
    """Outwards, and anywhere."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        weight = layer.weight
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_((weight.double() * (1 + size) + size * noise / noise.norm()).to(weight.dtype))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in geometries()] + [("plain", dtype) for dtype in DTYPES[1:]] + [("strided", torch.bfloat16)],
    ids=str,
)
def test_inside_after_every_step_and_no_deeper_than_the_slack(kind: str, dtype: torch.dtype) -> None:
    """For steps of all sizes, some 100 times larger, and weights that were replaced."""
    torch.manual_seed(0)
    layers = [copy.deepcopy(geometries()[kind]).to(dtype) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.weight)
    hook, layers = attached(layers)
    clips = 0
    for seed, size in enumerate((0.05, 0.1, 5.0, 0.1, 0.02, 0.02)):
        if seed == 4:
            with torch.no_grad():
                layers[0].weight.normal_()
        push(layers, size, seed)
        before = [layer.weight.detach().clone() for layer in layers]
        hook.after_step()
        clips += hook.clipped
        for layer, was in zip(layers, before, strict=True):
            now = lattice_norm(layer)
            assert now <= ALLOWED
            if not torch.equal(layer.weight, was):
                assert now >= 1 - 0.08 - 0.015 - 4 * torch.finfo(dtype).eps
    assert clips >= 4


def test_the_clip_is_near_the_nearest() -> None:
    """Nearer than scaling, and not many times as far as clipping every symbol and cropping to the taps, which is not inside."""
    torch.manual_seed(0)
    hook, layers = attached([nn.Conv2d(16, 16, 3, bias=False) for _ in range(3)])
    for seed in range(6):
        push(layers, 0.1, seed)
        before = [layer.weight.detach().double() for layer in layers]
        hook.after_step()
        assert hook.clipped == 3
        for layer, was in zip(layers, before, strict=True):
            symbols = torch.fft.fftn(was, s=(24, 24), dim=(2, 3)).permute(2, 3, 0, 1)
            u, s, vh = torch.linalg.svd(symbols, full_matrices=False)
            cropped = torch.fft.ifftn((u * s.clamp(max=0.92)[..., None, :]) @ vh, dim=(0, 1)).real.permute(2, 3, 0, 1)[
                :, :, :3, :3
            ]
            moved = torch.linalg.vector_norm(layer.weight.detach().double() - was)
            assert moved <= 4.0 * torch.linalg.vector_norm(cropped - was)
            scaled = was * (0.92 / float(s.max()))
            assert moved < torch.linalg.vector_norm(scaled - was)


@pytest.mark.parametrize("slack", [None, 0])
def test_a_layer_does_not_depend_on_the_others(slack: float | None) -> None:
    """Beyond rounding; without slack not at all."""
    torch.manual_seed(0)
    start = [nn.Conv2d(6, 8, 3, bias=False) for _ in range(5)]
    results = []
    for number in (5, 2):
        hook, layers = attached([copy.deepcopy(layer) for layer in start[:number]], slack=slack)
        for seed in range(5):
            for i, layer in enumerate(layers):
                push([layer], 0.02 * (i + 1), 10 * seed + i)
            hook.after_step()
        results.append(layers)
    for one, other in zip(*results, strict=False):
        torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=0 if slack == 0 else 1e-5)


def test_most_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left to those who measure one by one is the exception."""
    left = []

    def counted(jobs: Any, *others: Any, original: Any = keep_small.kept_small) -> Any:
        found = original(jobs, *others)
        left.extend(job is None for job in found)
        return found

    monkeypatch.setattr("spectral_hooks.hooks.keep.kept_small", counted)
    torch.manual_seed(0)
    hook, layers = attached([copy.deepcopy(layer) for layer in geometries().values()])
    for seed in range(12):
        push(layers, 0.05, seed)
        hook.after_step()
    assert len(left) > 60
    assert sum(left) <= 0.1 * len(left)


@pytest.mark.parametrize("kind", ["plain", "strided", "depthwise"])
def test_more_layers_of_one_shape_are_hardly_more_operations(kind: str) -> None:
    """The weights are read, copied and written one by one, and nothing else is: six times as many take less than twice."""

    def cost(number: int) -> tuple[int, int]:
        torch.manual_seed(0)
        layer = geometries()[kind]
        hook, layers = attached([copy.deepcopy(layer) for _ in range(number)])
        weights: list[Tensor] = [layer.weight for layer in layers]
        operations, waits = [], []
        for _ in range(4):
            push(layers, 0.1, 0)
            counter = Counter(weights)
            with counter:
                hook.after_step()
            assert hook.clipped == number
            operations.append(counter.operations)
            waits.append(counter.waits)
        return operations[-1], waits[-1]

    (few, few_waits), (many, many_waits) = cost(2), cost(12)
    assert many_waits <= few_waits + 8  # some need one more level of a proof
    assert many <= 2 * few
