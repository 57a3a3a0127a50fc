"""parametrizations.orthogonal: all singular values are 1 whatever the parameters, and what has them already is taken as it is."""

from __future__ import annotations

import copy
import io
import logging
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CONVS, FEW_CONVS, MATRICES, Case, apply_to_identity
from torch import Tensor, nn
from torch.nn.utils import prune

import spectral_hooks as sh
from spectral_hooks.parametrizations import remove_spectral, spectral_report
from spectral_hooks.parametrizations.block_conv import compose
from spectral_hooks.parametrizations.nearest_blocks import decompose
from spectral_hooks.parametrizations.orthogonal import orthogonal
from spectral_hooks.parametrizations.stiefel import (
    MAPS,
    cayley_transform,
    exponential,
    householder,
    inverse_cayley,
    origin,
    polar_factor,
    qr,
)
from spectral_hooks.weights.initializers import delta_orthogonal_, orthogonal_

EXAMPLES = Path(__file__).parents[2] / "examples"

FRAMES = [(1, 1), (5, 1), (2, 2), (7, 3), (4, 4), (3, 9, 2), (2, 3, 5, 5), (40, 36)]

#: One layer for each kind: its factors are an exit, with pairs; an entry; all of them; a matrix.
LAYERS = {
    "tall": lambda: nn.Linear(3, 5),
    "wide": lambda: nn.Linear(5, 3),
    "square": lambda: nn.Linear(4, 4),
    "kernel": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "more outputs": lambda: nn.Conv2d(3, 7, 3, padding=1),
    "stem": lambda: nn.Conv2d(2, 12, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv1d(6, 4, 4, groups=2, dilation=2),
    "patches": lambda: nn.Conv2d(3, 8, 2, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1),
}

#: No padding that repeats inputs.
GEOMETRIES = [case for case in CONVS if case.mode not in ("reflect", "replicate")]
FEW = [case for case in FEW_CONVS if case.mode not in ("reflect", "replicate")]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def made(name: str, map: str = "cayley", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return orthogonal(LAYERS[name]().to(dtype), orthogonal_map=map)


@torch.no_grad()
def shaken(layer: nn.Module, seed: int = 1, size: float = 0.7) -> nn.Module:
    """Other parameters, far from the start."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.add_(size * seeded(*parameter.shape, seed=seed + i).to(parameter))
    return layer


def inputs(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(layer, nn.Linear):
        return seeded(2, layer.in_features, dtype=dtype)
    return seeded(2, layer.in_channels, *[8] * len(layer.kernel_size), dtype=dtype)


@torch.no_grad()
def values(layer: nn.Module) -> Tensor:
    """The singular values in float64, of the circular operator for a convolution."""
    op = sh.as_operator(layer)
    op = op.with_weight(op.weight.double())
    return sh.singular_values(op if isinstance(op, sh.DenseOperator) else op.circular(8))


def error_of(frame: Tensor) -> float:
    gram = frame.mT @ frame
    return float(torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1]).to(gram), 2).max())


def apply(name: str, x: Tensor, base: Tensor | None = None) -> Tensor:
    function, based = MAPS[name]
    return function(x, base) if based else function(x)


# -- the maps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", FRAMES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_columns_are_orthonormal(name: str, shape: tuple[int, ...]) -> None:
    for size in (1e-3, 1.0, 10.0):
        base = polar_factor(seeded(*shape, seed=5))
        for start in (None, base):
            frame = apply(name, size * seeded(*shape), start)
            assert frame.shape == shape
            assert error_of(frame) <= 1e-12


@pytest.mark.parametrize("name", MAPS)
def test_columns_are_orthonormal_in_float32_and_below(name: str) -> None:
    x = seeded(96, 80, dtype=torch.float32)
    assert error_of(apply(name, x)) <= 5e-6
    with torch.autocast("cpu", torch.bfloat16):
        frame = apply(name, x)
    assert frame.dtype == torch.float32
    assert error_of(frame) <= 5e-6
    half = apply(name, x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, apply(name, x.bfloat16().float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (6, 5), (4, 1)], ids=str)
def test_cayley_and_exponential_are_what_they_are_of_the_large_skew_matrix(shape: tuple[int, int]) -> None:
    """The definition, with the `p × p` matrix that is never made."""
    x, base = seeded(*shape), polar_factor(seeded(*shape, seed=1))
    if shape[0] == shape[1]:
        skew = base @ ((x - x.T) / 2) @ base.T
    else:
        u = base.T @ x
        w = x - base @ u + base @ (u - u.T) / 4
        skew = w @ base.T - base @ w.T
    identity = torch.eye(shape[0], dtype=x.dtype)
    torch.testing.assert_close(cayley_transform(x, base), torch.linalg.solve(identity - skew / 2, (identity + skew / 2) @ base))
    torch.testing.assert_close(exponential(x, base), torch.linalg.matrix_exp(skew) @ base)


def test_householder_is_a_product_of_reflections_and_qr_that_of_gram_schmidt() -> None:
    x = seeded(6, 4)
    product = torch.eye(6, dtype=x.dtype)
    for j in range(4):
        v = torch.cat([torch.zeros(j), torch.ones(1), x[j + 1 :, j]]).to(x)
        product = product @ (torch.eye(6, dtype=x.dtype) - 2 * torch.outer(v, v) / (v @ v))
    torch.testing.assert_close(householder(x), -product[:, :4] * x.diagonal().sign())
    r = qr(x).T @ x
    torch.testing.assert_close(r, r.triu())
    assert bool((r.diagonal() > 0).all())


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (4, 4), (5, 2), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_gradients(name: str, shape: tuple[int, ...]) -> None:
    base = polar_factor(seeded(*shape, seed=1))
    assert torch.autograd.gradcheck(lambda x: apply(name, x, base), seeded(*shape).requires_grad_())
    start, _ = origin(name, base)
    assert torch.autograd.gradcheck(lambda x: apply(name, x, base), start.requires_grad_())


@pytest.mark.parametrize("shape", FRAMES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_origin_is_mapped_to_its_frame(name: str, shape: tuple[int, ...]) -> None:
    frame = polar_factor(seeded(*shape))
    for flip in (1, -1):  # square ones of both determinants
        target = frame * torch.cat([torch.tensor([flip]), torch.ones(shape[-1] - 1)]).to(frame)
        x, base = origin(name, target)
        assert x.shape == shape
        torch.testing.assert_close(apply(name, x, base), target, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 3), (6, 2), (2, 5, 4)], ids=str)
def test_inverse_of_cayley(shape: tuple[int, ...]) -> None:
    base = polar_factor(seeded(*shape, seed=1))
    for start in (None, base):
        frame = cayley_transform(seeded(*shape), start)
        torch.testing.assert_close(cayley_transform(inverse_cayley(frame, start), start), frame)


@pytest.mark.parametrize("name", ["cayley", "exp"])
def test_the_derivative_at_the_start_is_the_projection_on_the_tangent_space(name: str) -> None:
    base, x = polar_factor(seeded(6, 3, seed=1)), seeded(6, 3)
    _, derivative = torch.func.jvp(lambda z: apply(name, z, base), (torch.zeros_like(x),), (x,))
    torch.testing.assert_close(derivative, x - base @ (base.T @ x + x.T @ base) / 2)


# -- matrices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_linear_starts_at_the_nearest_and_stays_orthogonal(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    weight = layer.weight.detach().clone()
    assert orthogonal(layer, orthogonal_map=name) is layer
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(layer.weight, u @ vh)
    assert layer.parametrizations.weight[0].distance == pytest.approx(float((u @ vh - weight).norm() / weight.norm()))
    shaken(layer)
    assert float((values(layer) - 1).abs().max()) <= 1e-12
    assert layer.weight.shape == shape


@pytest.mark.parametrize("name", MAPS)
def test_training_keeps_a_matrix_orthogonal(name: str) -> None:
    layer = orthogonal(nn.Linear(96, 96), orthogonal_map=name)
    x, y = seeded(16, 96, dtype=torch.float32), seeded(16, 96, seed=1, dtype=torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert error_of(layer.weight.detach().double()) <= 5e-6


def test_a_very_tall_matrix_makes_none_of_its_height_squared() -> None:
    for name in MAPS:
        layer = orthogonal(nn.Linear(50, 30_000), orthogonal_map=name)  # 3.6 GB otherwise
        layer(torch.ones(1, 50)).sum().backward()
        assert error_of(layer.weight.detach().double()) <= 5e-6


def test_weights_without_a_unique_nearest_one() -> None:
    for weight in (torch.zeros(5, 3), torch.ones(3, 4)):
        layer = nn.Linear(*reversed(weight.shape))
        layer.weight.data.copy_(weight)
        assert float((values(orthogonal(layer)) - 1).abs().max()) <= 1e-5


# -- kernels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GEOMETRIES[::4] + FEW, ids=str)
def test_kernels_are_orthogonal_when_circular_and_inside_when_padded_with_zeros(case: Case) -> None:
    layer = shaken(orthogonal(case.layer(), orthogonal_map="qr"))
    weight = layer.weight.detach()
    assert weight.shape == case.layer().weight.shape
    if case.mode == "zeros":
        assert float(torch.linalg.matrix_norm(apply_to_identity(layer, case.in_shape), 2)) <= 1 + 1e-6
    # sizes that every stride of the cases divides
    size = 6 if 4 not in (layer.stride if isinstance(layer.stride, tuple) else ()) else 12
    if len(layer.kernel_size) < 3 or size == 6:
        found = torch.linalg.svdvals(case.operator(weight, finite=False).circular(size).to_dense())
        touched = case.operator(torch.ones_like(weight), finite=False).circular(size).to_dense() != 0
        # of what the taps meet, everything is kept on the smaller side
        rank = min(int(touched.any(0).sum()), int(touched.any(1).sum()))
        assert float((found[:rank] - 1).abs().max()) <= 1e-10
        assert float(found[rank:].abs().sum()) <= 1e-10


def test_zero_padding_loses_at_the_border() -> None:
    """As the docstring says: norm at most 1, and not orthogonal."""
    layer = shaken(orthogonal(nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)))
    found = sh.singular_values(sh.as_operator(layer, input_size=6)).detach()
    assert float(found[0]) <= 1 + 1e-6
    assert float(found[-1]) < 0.9


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_with_every_map(name: str, map: str) -> None:
    layer = shaken(made(name, map))
    assert float((values(layer) - 1).abs().max()) <= 1e-5
    layer(inputs(layer)).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
    assert any(float(p.grad.abs().max()) > 0 for n, p in layer.named_parameters() if "original" in n)


@pytest.mark.parametrize("name", ["kernel", "more outputs", "stem", "groups"])
def test_gradients_of_kernels(name: str) -> None:
    layer = shaken(made(name, dtype=torch.float64))
    free = [p.detach().clone().requires_grad_() for n, p in layer.named_parameters() if "original" in n]
    assert torch.autograd.gradcheck(layer.parametrizations.weight[0], free, fast_mode=True)


def test_training_keeps_kernels_orthogonal() -> None:
    torch.manual_seed(0)
    for stride, groups, dilation, kernel in [(1, 1, 1, 3), (2, 1, 1, 3), (1, 4, 2, 5), (2, 2, 1, 4), (1, 1, 1, 1), (2, 1, 2, 2)]:
        layer = orthogonal(nn.Conv2d(16, 16, kernel, stride, dilation=dilation, groups=groups))
        x = seeded(2, 16, 12, 12, dtype=torch.float32)
        target = torch.randn_like(layer(x)).detach()
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        before = float((layer(x) - target).square().mean().detach())
        for _ in range(200):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < before
        found = values(layer)
        assert float((found[found > 0.5] ** 2 - 1).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", [n for n in LAYERS if not n.startswith(("tall", "wide", "square"))])
def test_kernels_start_near(name: str) -> None:
    """Nearer than any of many random orthogonal ones; the distance is what is reported."""
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    weight = layer.weight.detach().clone()
    orthogonal(layer)
    distance = float((layer.weight.detach() - weight).norm() / weight.norm())
    assert layer.parametrizations.weight[0].distance == pytest.approx(distance, rel=1e-6)
    others = [
        float((shaken(copy.deepcopy(layer), seed, 2.0).weight.detach() - weight).norm() / weight.norm()) for seed in range(20)
    ]
    assert distance < min(others)


#: Layers whose nearest product is searched for: with an exit, an entry, both, and none of the axes alike.
SEARCHED = {
    "square": lambda: nn.Conv2d(6, 6, 3),
    "more outputs": lambda: nn.Conv2d(4, 7, (2, 4)),
    "more inputs": lambda: nn.Conv1d(9, 4, 6),
    "strided": lambda: nn.Conv2d(4, 12, 4, 2),
    "stem": lambda: nn.Conv2d(2, 15, 5, 2),
    "groups": lambda: nn.Conv2d(8, 8, 3, groups=2),
    "volume": lambda: nn.Conv3d(3, 3, 2),
}


@pytest.mark.parametrize("name", SEARCHED)
def test_no_single_factor_could_bring_a_start_much_nearer(name: str) -> None:
    """The product is affine in each projector: its gradient, autograd's through `compose`, tells what the best one would gain."""
    torch.manual_seed(0)
    parametrization = orthogonal(SEARCHED[name]().double()).parametrizations.weight[0]
    blocks, weight = parametrization.blocks, SEARCHED[name]().double().weight.detach()
    parts = decompose(blocks, weight)
    reached = float((compose(blocks, parts) * weight).sum())
    assert reached > 0
    for factor in parts:
        # frames as wide as they are high, so that the identity is one of them and `P` is what it stands for
        wide = {"frames": F.pad(parts["frames"], [0, blocks.middle - blocks.middle // 2])}
        for place in range(len(blocks.axes)) if factor == "frames" else (...,):
            varied = {key: part.clone() for key, part in (parts | wide).items()}
            if factor == "frames":
                varied[factor][:, place] = torch.eye(blocks.middle)
            varied[factor].requires_grad_()
            (slope,) = torch.autograd.grad((compose(blocks, varied) * weight).sum(), varied[factor])
            now = parts[factor][:, place] if factor == "frames" else parts[factor]
            if factor == "frames":
                slope = slope[:, place] / 2
                best = torch.linalg.eigvalsh(slope)[:, -(blocks.middle // 2) :].sum()
                has = torch.einsum("gij,gik,gjk->", slope, now, now)
            else:
                best, has = torch.linalg.svdvals(slope).sum(), (slope * now).sum()
            assert float(best - has) <= 5e-3 * reached


def test_a_kernel_with_one_tap_starts_as_it_is() -> None:
    for size, channels in ((3, (4, 4)), (5, (3, 3)), (3, (2, 6)), (3, (6, 2))):
        layer = nn.Conv2d(*channels, size, dtype=torch.float64)
        delta_orthogonal_(layer, generator=torch.Generator().manual_seed(0))
        weight = layer.weight.detach().clone()
        torch.testing.assert_close(orthogonal(layer).weight, weight)


# -- assigning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW, ids=str)
def test_feasible_kernels_come_back(case: Case) -> None:
    for dtype in (torch.float64, torch.float32):
        weight = shaken(orthogonal(case.layer(dtype), orthogonal_map="qr")).weight.detach().clone()
        layer = orthogonal(case.layer(dtype))
        layer.weight = weight
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-5)
        assert layer.parametrizations.weight[0].distance <= 1e-5


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("name", LAYERS)
def test_feasible_weights_come_back_by_every_map(name: str, map: str) -> None:
    weight = shaken(made(name, "qr")).weight.detach().clone()
    layer = made(name, map)
    layer.weight = weight
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-5)


STEMS = {
    "resnet": lambda: nn.Conv2d(3, 64, 7, 2),
    "patches of 4": lambda: nn.Conv2d(3, 16, 4, 4),
    "more outputs than a patch": lambda: nn.Conv2d(3, 96, 4, 4),
    "mobilenet": lambda: nn.Conv2d(3, 32, 3, 2),
    "outputs that strides do not divide": lambda: nn.Conv2d(3, 30, 3, 2),
    "overlapping patches": lambda: nn.Conv2d(3, 64, 7, 4),
    "one channel": lambda: nn.Conv1d(1, 8, 5, 2),
    "more middle channels than taps": lambda: nn.Conv1d(1, 24, 3, 2),
    "axes unlike": lambda: nn.Conv2d(2, 31, (5, 3), (2, 3)),
    "groups": lambda: nn.Conv2d(4, 48, 4, 2, groups=2, dilation=3),
    "volumes": lambda: nn.Conv3d(1, 20, 3, 2),
    "transposed": lambda: nn.ConvTranspose2d(32, 3, 4, 2, padding=1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", STEMS)
def test_feasible_stems_come_back(name: str, dtype: torch.dtype) -> None:
    """Exit, pairs and entry are told apart, wherever the layer itself stands."""
    one, other = (orthogonal_(STEMS[name]().to(dtype), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    layer = orthogonal(one)
    for weight in (other.weight, shaken(copy.deepcopy(layer)).weight):
        layer.weight = weight.detach().clone()
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-5)
        assert layer.parametrizations.weight[0].distance <= 1e-5


def test_a_stem_that_is_a_window_of_its_kernel_comes_back() -> None:
    """The Gram matrix has then the rank of the inputs alone; rounding of float32 must not fill the rest."""
    weight = torch.zeros(24, 3, 4, 4)
    weight[:, :, 1:3, 1:3] = polar_factor(seeded(24, 12)).float().reshape(24, 3, 2, 2)
    layer = orthogonal(nn.Conv2d(3, 24, 4, 2))
    layer.weight = weight
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-6)


def test_a_stem_in_half_precision_comes_back_to_its_rounding() -> None:
    layer = made("stem", dtype=torch.bfloat16)
    weight = shaken(made("stem", "qr")).weight.detach().bfloat16()
    layer.weight = weight
    assert layer.parametrizations.weight[0].distance <= 5e-3


def test_a_tap_in_an_even_kernel_is_in_another_component() -> None:
    """As documented: it is moved to an orthogonal kernel, and by how much is told."""
    layer = delta_orthogonal_(nn.Conv2d(4, 4, 2))
    weight = layer.weight.detach().clone()
    orthogonal(layer)
    distance = float((layer.weight.detach() - weight).norm() / weight.norm())
    assert distance > 0.5
    assert layer.parametrizations.weight[0].distance == pytest.approx(distance, rel=1e-5)
    assert float((values(layer) - 1).abs().max()) <= 1e-5


@pytest.mark.parametrize("shape", [(32, 3, 3, 2), (16, 1, 4, 2)], ids=str)
def test_few_outputs_with_a_stride_come_near_and_say_how_far(shape: tuple[int, ...]) -> None:
    """As documented: they do not determine the projectors."""
    weight = orthogonal_(nn.Conv2d(*shape), generator=torch.Generator().manual_seed(0)).weight.detach().clone()
    layer = orthogonal(nn.Conv2d(*shape))
    layer.weight = weight
    distance = float((layer.weight.detach() - weight).norm() / weight.norm())
    assert distance <= 0.03
    assert layer.parametrizations.weight[0].distance == pytest.approx(distance, rel=1e-3)
    assert float((values(layer) - 1).abs().max()) <= 1e-5


def test_infeasible_weights_go_to_the_nearest_and_say_how_far(caplog: pytest.LogCaptureFixture) -> None:
    layer, weight = made("tall", dtype=torch.float64), seeded(5, 3)
    with caplog.at_level(logging.INFO, logger="spectral_hooks"):
        layer.weight = weight
    torch.testing.assert_close(layer.weight, polar_factor(weight))
    distance = float((polar_factor(weight) - weight).norm() / weight.norm())
    assert layer.parametrizations.weight[0].distance == pytest.approx(distance)
    assert f"{distance:.2g}" in caplog.text


# -- a layer like any other -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("name", ["wide", "kernel", "more outputs"])
def test_checkpoints(name: str, map: str) -> None:
    layer, other = shaken(made(name, map)), made(name, map)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for key, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    assert torch.equal(other.weight, layer.weight)
    # a plain one too, into any map
    plain = remove_spectral(copy.deepcopy(layer)).state_dict()
    assert set(plain) == {"weight", "bias"}
    fresh = made(name, map)
    fresh.load_state_dict(plain)
    torch.testing.assert_close(fresh.weight, layer.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_baking_and_copies(name: str) -> None:
    layer = shaken(made(name))
    x = inputs(layer)
    expected = layer(x).detach()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    kind = type(LAYERS[name]())
    assert isinstance(remove_spectral(layer), kind)
    assert type(layer) is kind
    assert torch.equal(layer(x), expected)
    assert torch.equal(twin(x), expected), "the copy is untouched"
    assert torch.equal(remove_spectral(layer)(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_changes_nothing_and_is_the_same_in_evaluation(name: str) -> None:
    layer = made(name)
    before = copy.deepcopy(layer.state_dict())
    first = layer(inputs(layer))
    second = layer.eval()(inputs(layer))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert list(layer.state_dict()) == list(before)


@pytest.mark.parametrize("name", ["square", "kernel", "stem"])
def test_half_precision_and_autocast(name: str) -> None:
    layer = made(name, dtype=torch.bfloat16)
    assert {t.dtype for t in layer.state_dict().values()} == {torch.bfloat16}
    assert layer(inputs(layer, torch.bfloat16)).dtype == torch.bfloat16
    # built in float32: only the entries of the result are rounded
    assert float((values(layer) - 1).abs().max()) <= 0.01
    single = shaken(made(name))
    weight = single.weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(single.weight, weight)


@pytest.mark.parametrize("name", ["wide", "kernel"])
def test_compiles_as_one_graph(name: str) -> None:
    layer = shaken(made(name))
    x = inputs(layer)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_on_the_meta_device(name: str) -> None:
    """What is made there holds the state of a real one afterwards."""
    real = shaken(made(name))
    layer = orthogonal(LAYERS[name]().to("meta"))
    assert layer.weight.shape == real.weight.shape
    layer.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(layer.weight, real.weight)


def test_another_call_takes_over_and_the_report_tells() -> None:
    layer = shaken(made("kernel"))
    weight = layer.weight.detach().clone()
    orthogonal(layer, orthogonal_map="qr")
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-5)
    assert len(layer.parametrizations.weight) == 1
    report = spectral_report(nn.Sequential(layer, made("wide")))
    assert report == {
        "0": "OrthogonalKernel(max_norm=1.0, orthogonal_map='qr'; all singular values for circular padding, a bound for zero "
        "padding)",
        "1": "Orthogonal(max_norm=1.0)",
    }


def test_in_a_model_of_timm() -> None:
    pytest.importorskip("timm")
    from spectral_hooks.integrations.timm import apply_spectral

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 3))
    model = apply_spectral(model, orthogonal, layers=["0", "4"], orthogonal_map="qr")
    assert spectral_report(model).keys() == {"0", "2", "4"}
    assert spectral_report(model)["2"].startswith("none")
    assert model(torch.ones(1, 3, 8, 8)).shape == (1, 3)
    for i in (0, 4):
        assert float((values(model[i]) - 1).abs().max()) <= 1e-5


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="`orthogonal_map` must be one of cayley, qr, exp, householder; got 'polar'"):
        orthogonal(nn.Linear(2, 2), orthogonal_map="polar")
    with pytest.raises(TypeError, match="ReLU"):
        orthogonal(nn.ReLU())
    with pytest.raises(ValueError, match="reflect padding repeats"):
        orthogonal(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    pruned = prune.l1_unstructured(nn.Linear(3, 3), "weight", 2)
    with pytest.raises(ValueError, match="prune"):
        orthogonal(pruned)
    for layer in (nn.Linear(2, 2), nn.Conv1d(2, 2, 3)):
        layer.weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            orthogonal(layer)
        assert isinstance(layer.weight, nn.Parameter)


def test_depthwise_without_freedom_is_told(caplog: pytest.LogCaptureFixture) -> None:
    layer = orthogonal(nn.Conv2d(4, 4, 3, padding=1, groups=4))
    assert "± a shift" in caplog.text
    torch.testing.assert_close(layer.weight.abs().flatten(1).sum(1), torch.ones(4))


def test_nearest_of_any_shape() -> None:
    for shape in MATRICES:
        frame = polar_factor(seeded(*shape))
        assert error_of(frame if shape[0] >= shape[1] else frame.mT) <= 1e-12
    assert prod(polar_factor(seeded(2, 0, 3)).shape) == 0


# -- the example -----------------------------------------------------------------------------------------------------------


def test_the_example(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, str(EXAMPLES / "one_lipschitz_digits.py"), "--quick"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("plain", "orthogonal"))}
    assert float(rows["plain"][1]) > 1
    assert float(rows["orthogonal"][1]) == pytest.approx(1, abs=5e-3)
    for row in rows.values():
        accuracy, _, *certified, attacked, _ = (float(value.rstrip("%")) for value in row)
        assert accuracy >= certified[0] >= certified[-1]
        assert attacked >= certified[-1], "an attack cannot break what is certified"
    assert not list(tmp_path.iterdir())
