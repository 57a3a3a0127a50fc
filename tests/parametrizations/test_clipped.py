"""`clipped` and `banded`: singular values moved into a band, with gradients."""

from __future__ import annotations

import copy
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import CONVS, FEW_CONVS, MATRICES, Case, apply_to_identity, traces_copies
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import spectral_hooks as sh
from spectral_hooks.parametrizations.clipped import Clipped, banded, clipped
from spectral_hooks.parametrizations.differentiable import ExcessWithGradient, banded_values
from spectral_hooks.parametrizations.differentiable import excess as differentiable_excess
from spectral_hooks.parametrizations.remove import remove_spectral

COPYING = ("reflect", "replicate")
ON_LATTICE = [case for case in FEW_CONVS if case.mode not in COPYING][::2]
#: Layers whose weight is a matrix, and one of every other kind.
EXACT = {
    "matrix": lambda: nn.Linear(7, 5),
    "tall": lambda: nn.Linear(4, 9),
    "1×1": lambda: nn.Conv2d(6, 4, 1),
    "patches": lambda: nn.Conv2d(2, 9, 3, stride=3),
    "grouped patches": lambda: nn.Conv2d(4, 6, 2, stride=2, groups=2),
    "transposed patches": lambda: nn.ConvTranspose2d(5, 2, 2, stride=2),
}
KERNELS = {
    "3×3": lambda: nn.Conv2d(2, 3, 3, padding=1),
    "stride": lambda: nn.Conv2d(2, 5, 3, stride=2, padding=1),
    "1-D": lambda: nn.Conv1d(3, 4, 5),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
}
WAYS = {**EXACT, **KERNELS}


def made(name: str, dtype: torch.dtype = torch.float64, gain: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    layer = WAYS[name]().to(dtype)
    with torch.no_grad():
        layer.weight.mul_(gain)
    return layer


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def norm(layer: nn.Module) -> float:
    """Certified, of the stored values: at most 1e-6 too high."""
    op = sh.as_operator(layer)
    return float(sh.spectral_norm(op.with_weight(op.weight.detach().double()), rtol=1e-6))


def matrices(layer: nn.Module) -> Tensor:
    """The matrices of a layer of `EXACT`, one for each group."""
    op = sh.as_operator(layer)
    kernel = op.with_weight(op.weight.detach().double()).canonical()
    return kernel.reshape(kernel.shape[:3])


def excess(x: Tensor, level: float) -> tuple[Tensor, float]:
    """What a clip takes away, however far outside."""
    taken, peak = differentiable_excess(x, level)
    return x - banded_values(x, 0.0, level) if taken is None else taken, peak


# -- the function and its gradient ------------------------------------------------------------------------------------------

BANDS = [(0.0, 1.0), (0.0, 100.0), (1.0, 2.0), (1.0, 1.0), (0.5, 100.0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 5, 3), (2, 3, 5), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_moves_singular_values_into_the_band(dtype: torch.dtype, shape: tuple[int, ...], band: tuple[float, float]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    u, s, vh = torch.linalg.svd(x.detach(), full_matrices=False)
    y = banded_values(x, *band)
    assert torch.allclose(y, (u * s.clamp(*band).unsqueeze(-2)) @ vh, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: banded_values(x, *band), (x,))


@pytest.mark.parametrize("band", [(0.0, 1.0), (0.0, 3.0), (0.5, 1.0), (1.2, 1.4), (1.0, 3.0)], ids=str)
@pytest.mark.parametrize("values", [(2, 2, 2, 2), (0.8, 0.8, 0.8, 0.8), (2, 2, 0.8, 0.8), (1.1, 1.1 + 1e-13, 1.1, 0.7)], ids=str)
def test_gradient_where_singular_values_coincide(band: tuple[float, float], values: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64)).Q for n in (4, 6))
    x = ((u * torch.tensor(values, dtype=torch.float64)) @ v.T)[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: banded_values(x, *band), (x,))


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_where_singular_values_vanish(rank: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, rank, dtype=torch.float64) @ torch.randn(rank, 5, dtype=torch.float64))[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: banded_values(x, 0.0, 1.0), (x,))
    banded_values(x, 0.5, 1.0).sum().backward()
    assert bool(x.grad.isfinite().all()), "the polar factor has no derivative here, but no NaN either"


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 5, 3), (2, 3, 5), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("level", [0.01, 0.5, 1.0, 2.0, 100.0])
def test_excess_by_gram_matrices_is_that_of_the_svd(dtype: torch.dtype, shape: tuple[int, ...], level: float) -> None:
    """Far above the level, by the SVD itself."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    u, s, vh = torch.linalg.svd(x.detach(), full_matrices=False)
    y, peak = excess(x, level)
    assert torch.allclose(y, (u * (s - level).clamp(min=0).unsqueeze(-2)) @ vh, atol=1e-12)
    assert peak == pytest.approx(float(s.max())) or min(peak, float(s.max())) > 30 * level
    assert torch.autograd.gradcheck(lambda x: excess(x, level)[0], (x,))


@pytest.mark.parametrize("level", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(
    "values", [(2, 2, 2, 2), (2, 2, 0.8, 0.8), (1.1, 1.1 + 1e-13, 1.1, 0.7), (2, 0.5, 0, 0), (0, 0, 0, 0)], ids=str
)
def test_gradient_of_the_excess_where_singular_values_coincide_or_vanish(values: tuple[float, ...], level: float) -> None:
    if level in values:
        level += 0.1  # there it has a kink
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64)).Q for n in (4, 6))
    x = ((u * torch.tensor(values, dtype=torch.float64)) @ v.T)[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ExcessWithGradient.apply(x / level)[0] * level, (x,))


def test_excess_in_float32_is_as_close_as_its_squares_allow() -> None:
    torch.manual_seed(0)
    for gain in (1.0, 5.0, 25.0, 1e4):
        x = gain * torch.randn(8, 16, 16, dtype=torch.complex128) / 8
        exact, _ = excess(x, 0.5)
        found, _ = excess(x.to(torch.complex64), 0.5)
        assert float((found - exact).abs().max()) <= 1e-6 * max(gain, 1)
        clip = torch.linalg.svdvals(x.to(torch.complex64) - found)
        assert float(clip.max()) <= 0.5 * (1 + 1e-4 * max(1, gain / 100))


def test_gradient_has_no_gradient() -> None:
    """Rather than a wrong one."""
    x = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(banded_values(x, 0.0, 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("max_norm", [0.3, 100.0])
def test_gradcheck_of_kernels(name: str, max_norm: float) -> None:
    parametrization = clipped(made(name), max_norm).parametrizations.weight[0]
    weight = made(name).weight.detach().requires_grad_()
    value = parametrization(weight).detach()
    direction = torch.randn_like(weight)
    # a descent along it does not shorten the weight: then the gradient is exact
    direction -= value * ((direction * value).sum() / value.square().sum() + 0.1)
    assert torch.autograd.gradcheck(lambda w: (parametrization(w) * direction).sum(), (weight,), fast_mode=True)
    assert torch.equal(value, weight) == (max_norm == 100.0)


# -- the guarantees ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ON_LATTICE, ids=str)
def test_norm_is_inside_for_every_geometry(case: Case) -> None:
    layer = clipped(case.layer(), 0.7)
    for gain in (1e-3, 1.0, 1e3):
        with torch.no_grad():
            original(layer).copy_(case.layer(seed=1).weight * gain)
        assert float(torch.linalg.matrix_norm(apply_to_identity(layer, case.in_shape), 2)) <= 0.7 * (1 + 1e-12)
        bracket = float(sh.spectral_norm(sh.as_operator(layer), rtol=1e-5).detach())
        assert bracket / (1 + 1e-5) <= 0.7 * (1 + 1e-9)


@pytest.mark.parametrize("case", [case for case in FEW_CONVS if case.mode in COPYING][::2], ids=str)
def test_padding_that_repeats_inputs_needs_the_input_size(case: Case) -> None:
    layer = case.layer()
    with pytest.raises(ValueError, match="`input_size`"):
        clipped(layer)
    assert not parametrize.is_parametrized(layer)
    with torch.no_grad():
        layer.weight.mul_(100)
    clipped(layer, 0.7, input_size=case.size)
    assert 0.1 < float(torch.linalg.matrix_norm(apply_to_identity(layer, case.in_shape), 2)) <= 0.7 * (1 + 1e-12)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stored_values_obey_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    for gain in (30, 1e4):
        layer = clipped(made(name, dtype, gain), 0.5)
        assert layer.weight.dtype == dtype
        assert 0.5 * (0.9 if dtype == torch.bfloat16 else 0.996) <= norm(layer) <= 0.5 * (1 + 1.1e-6)


@pytest.mark.parametrize("name", ["3×3", "matrix"])
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_scales_that_squares_do_not_survive(name: str, size: float) -> None:
    layer = clipped(made(name, torch.float32, 5 * size), 0.5 * size)
    reference = clipped(made(name, torch.float32, 5), 0.5)
    torch.testing.assert_close(layer.weight / size, reference.weight, rtol=1e-4, atol=1e-5)
    (layer.weight / size).sum().backward()
    (reference.weight).sum().backward()
    torch.testing.assert_close(original(layer).grad * size, original(reference).grad, rtol=1e-3, atol=1e-3)
    layer = clipped(made(name, torch.float32, 1e25), 0.5)
    assert 0.49 <= norm(layer) <= 0.5 * (1 + 1.1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_exact_for_matrices(name: str) -> None:
    layer = made(name, gain=3)
    u, s, vh = torch.linalg.svd(matrices(layer), full_matrices=False)
    low, high = s.quantile(0.3).item(), s.quantile(0.7).item()
    assert torch.allclose(matrices(clipped(copy.deepcopy(layer), high)), (u * s.clamp(max=high).unsqueeze(-2)) @ vh, atol=1e-13)
    assert torch.allclose(matrices(banded(layer, high, min_norm=low)), (u * s.clamp(low, high).unsqueeze(-2)) @ vh, atol=1e-13)


def test_kernels_of_many_taps_go_through_fourier_transforms_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def result() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        layer = clipped(nn.Conv2d(2, 3, 11, dtype=torch.float64)).eval()
        with torch.no_grad():
            original(layer).mul_(3)
        (layer.weight * torch.randn_like(layer.weight)).sum().backward()
        return layer.weight.detach(), original(layer).grad

    transformed = result()
    monkeypatch.setattr("spectral_hooks.projections.frequencies._FEW_TAPS", 1000)
    for one, other in zip(transformed, result(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", KERNELS)
def test_nearer_than_scaling_and_not_far_from_the_projection(name: str) -> None:
    layer = made(name, gain=3)
    op, weight = sh.as_operator(layer), layer.weight.detach()
    reference, scaled = (float((f(op, 1.0) - weight).detach().norm()) for f in (sh.projections.clip, sh.projections.rescale))
    distance = float((clipped(layer, 1.0).weight - weight).detach().norm())
    assert 0.95 * reference <= distance <= min(1.2 * reference, scaled)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_banded_keeps_every_singular_value_in_the_band(name: str, dtype: torch.dtype) -> None:
    slack = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for gain in (0.01, 1, 1e4):
        for low, high in ((0.5, 1.5), (1, 1), (0, 0.2)):
            values = torch.linalg.svdvals(matrices(banded(made(name, dtype, gain), high, min_norm=low)))
            assert low * (1 - slack) <= float(values.min())
            assert float(values.max()) <= high * (1 + slack)


def test_banded_on_the_inputs_of_a_layer() -> None:
    layer = banded(made("patches", gain=5), 0.8, min_norm=0.5)
    values = torch.linalg.svdvals(apply_to_identity(layer, (2, 6, 3)))
    assert float(values.min()) >= 0.5 - 1e-12
    assert float(values.max()) <= 0.8 + 1e-12


@pytest.mark.parametrize(("function", "name"), [(clipped, "3×3"), (clipped, "matrix"), (banded, "matrix")])
def test_training_keeps_it(function, name: str) -> None:
    layer = function(made(name, torch.float32))
    before = original(layer).detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.randn(4, 2, 5, 5) if name == "3×3" else torch.randn(4, 7)
    for _ in range(200):
        optimizer.zero_grad()
        layer(x).square().mean().mul(-1).backward()
        optimizer.step()
    assert float((original(layer) - before).detach().norm()) > float(before.norm())
    assert 0.97 < norm(layer) <= 1 + (1.1e-6 if function is clipped else 1e-5)
    if function is banded:
        assert float(torch.linalg.svdvals(matrices(layer)).min()) >= 1 - 1e-5


# -- assigning, saving, copying -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_feasible_weights_come_back(name: str, dtype: torch.dtype) -> None:
    layer = clipped(made(name, dtype), 0.7)
    for gain in (0.5, 30):
        # what the library's own projection leaves, however close to the bound
        feasible = sh.projections.clip(sh.as_operator(made(name, dtype, gain)), 0.7).detach()
        layer.weight = feasible
        assert float((layer.weight - feasible).detach().norm()) <= 1e-5 * float(feasible.norm())
    layer.weight = 0.9 * feasible
    assert torch.equal(layer.weight, 0.9 * feasible)


@pytest.mark.parametrize("name", WAYS)
def test_infeasible_weights_go_to_their_clip(name: str) -> None:
    layer, weight = clipped(made(name), 0.7), made(name, gain=50).weight.detach()
    layer.weight = weight
    assert torch.equal(original(layer), weight)
    assert torch.equal(layer.weight, clipped(made(name, gain=50), 0.7).weight)
    with torch.no_grad():
        original(layer).zero_()
    assert bool(weight.any()), "what is assigned is copied"


@pytest.mark.parametrize("name", EXACT)
def test_banded_feasible_weights_come_back(name: str) -> None:
    layer, feasible = banded(made(name), 1.5, min_norm=0.5), banded(made(name, gain=2), 1.5, min_norm=0.5).weight.detach()
    layer.weight = feasible
    assert torch.allclose(layer.weight, feasible, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("function", "name"), [(clipped, "3×3"), (clipped, "matrix"), (banded, "patches")])
def test_registers_like_the_others(function, name: str) -> None:
    layer = made(name, gain=1.5)
    parameter, kind = layer.weight, type(layer)
    assert function(layer) is layer
    assert isinstance(layer, kind)
    assert original(layer) is parameter
    assert not list(layer.buffers())
    assert sorted(layer.state_dict()) == ["bias", "parametrizations.weight.original"]
    twin = function(made(name))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin.weight, layer.weight)
    twin.load_state_dict(made(name, gain=4).state_dict())
    assert torch.equal(original(twin), made(name, gain=4).weight)
    value = layer.weight.detach().clone()
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        original(copied).mul_(-3)
    assert torch.equal(layer.weight, value)
    assert not torch.equal(copied.weight, value)
    remove_spectral(layer)
    assert type(layer) is kind
    assert torch.equal(layer.weight, value)


def test_names_in_a_report() -> None:
    assert repr(clipped(made("3×3"), 0.5).parametrizations.weight[0]) == "Clipped(max_norm=0.5)"
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    assert repr(clipped(layer, 0.5, input_size=6).parametrizations.weight[0]) == "Clipped(max_norm=0.5, input_size=(6, 6))"
    assert repr(banded(made("matrix"), min_norm=0.0).parametrizations.weight[0]) == "Clipped(max_norm=1.0)"
    assert repr(banded(made("matrix"), 2, min_norm=0.5).parametrizations.weight[0]) == "Clipped(max_norm=2.0, min_norm=0.5)"


@pytest.mark.parametrize("name", ["3×3", "matrix"])
def test_evaluation_remembers_until_the_weight_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = clipped(made(name, gain=5)).eval()
    trained = layer.weight.detach().clone()
    calls, moved = [], Clipped._moved
    monkeypatch.setattr(Clipped, "_moved", lambda self, weight: calls.append(1) or moved(self, weight))
    with torch.no_grad():
        values = [layer.weight for _ in range(3)]
        assert len(calls) == 1
        assert all(torch.equal(a, b) for a, b in pairwise([trained, *values])), "training and evaluation agree"
        original(layer).data.mul_(-1)
        assert torch.allclose(layer.weight, -trained)
        assert len(calls) == 2


def test_remembered_weights_cannot_be_spoilt() -> None:
    """A weight that is written to in place, as by an initializer, is not what the next forward reads."""
    layer = clipped(made("matrix", gain=5)).eval()
    with torch.no_grad():
        expected = layer.weight.clone()
        layer.weight.zero_()
        assert torch.equal(layer.weight, expected)


def test_autocast_does_not_reach_inside() -> None:
    layer = clipped(made("3×3", torch.float32, gain=10))
    expected = layer.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("function", [clipped, banded])
def test_matrices_compile_to_one_graph(function) -> None:
    layer, x = function(made("matrix", torch.float32, gain=5)), torch.randn(3, 7)
    torch._dynamo.reset()
    y = torch.compile(layer, backend="eager", fullgraph=traces_copies())(x)
    assert torch.allclose(y, layer(x), atol=1e-6)
    y.sum().backward()
    assert bool(original(layer).grad.any())


def test_kernels_compile_around_a_break() -> None:
    layer, x = clipped(made("3×3", torch.float32, gain=5)), torch.randn(1, 2, 5, 5)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(layer, backend="eager")(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    for function in (clipped, banded):
        layer = function(made("matrix"))
        with torch.no_grad():
            original(layer).view(-1)[3] = bad
        assert bool(layer.weight.isnan().any())
    layer = clipped(made("3×3"))
    with torch.no_grad():
        original(layer).view(-1)[3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.weight  # noqa: B018


# -- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0, -1.0, float("inf"), float("nan"), "1", None, True])
def test_refuses_norms(max_norm) -> None:
    with pytest.raises(ValueError, match="`max_norm` must be a positive, finite number"):
        clipped(nn.Linear(2, 2), max_norm)


@pytest.mark.parametrize("min_norm", [1.1, -0.1, float("nan"), float("inf"), "0", True], ids=str)
def test_refuses_bands(min_norm) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"`min_norm` must lie in \[0, 1.0\]"):
        banded(layer, min_norm=min_norm)
    assert not parametrize.is_parametrized(layer)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("value", [1e-200, 1e-20, 0.3, 1e20, 1e200])
def test_a_band_without_a_lower_end_is_one_value(name: str, value: float) -> None:
    for layer in (banded(made(name), value), banded(made(name), value, min_norm=value)):
        for factor in (1e-3, 1.0, 1e3):
            with torch.no_grad():
                original(layer).copy_(made(name).weight * value * factor)
            values = torch.linalg.svdvals(matrices(layer) / value)
            torch.testing.assert_close(values, torch.ones_like(values))


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64])
def test_numpy_s_numbers_are_numbers(number) -> None:
    for function, settings in ((clipped, {}), (banded, {"min_norm": number(1)})):
        layer = function(made("matrix", torch.float32, gain=9), number(2), **settings)
        parametrization = layer.parametrizations.weight[0]
        assert (type(parametrization.max_norm), type(parametrization.min_norm)) == (float, float)
        assert layer.weight.dtype == torch.float32
        assert float(torch.linalg.svdvals(matrices(layer)).max()) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("bound", [1e39, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_beyond_the_dtype_hold(bound: float, dtype: torch.dtype) -> None:
    for name in ("matrix", "3×3"):
        for function, settings in ((clipped, {}), (banded, {"min_norm": 0.1})):
            if function is banded and name == "3×3":
                continue
            layer = function(made(name, dtype), bound, **settings)
            assert bool(layer.weight.isfinite().all())
            if function is clipped:
                assert torch.equal(layer.weight, made(name, dtype).weight)


def test_refuses_lower_ends_that_the_dtype_has_not() -> None:
    layer = nn.Linear(2, 2)
    for settings, name in (
        ({"max_norm": 1e39}, "max_norm"),
        ({"min_norm": 1e-40}, "min_norm"),
        ({"max_norm": 1e-40}, "max_norm"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be a number of the weight's dtype"):
            banded(layer, **settings)
        assert not parametrize.is_parametrized(layer)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("inf"), "1", None, True])
def test_banded_refuses_norms(max_norm) -> None:
    with pytest.raises(ValueError, match="`max_norm` must be a positive, finite number"):
        banded(nn.Linear(2, 2), max_norm)


@pytest.mark.parametrize("case", [case for case in CONVS if case.stride == 1 and case.kernel == 3][:12], ids=str)
def test_banded_refuses_overlapping_patches_and_names_others(case: Case) -> None:
    layer = case.layer()
    with pytest.raises(NotImplementedError, match="skew, cayley or orthogonal"):
        banded(layer)
    assert not parametrize.is_parametrized(layer)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_banded_refuses_padded_patches(mode: str) -> None:
    with pytest.raises(NotImplementedError, match="padding=0"):
        banded(nn.Conv2d(2, 2, 1, padding=1, padding_mode=mode))


@pytest.mark.parametrize("function", [clipped, banded])
def test_refuses_layers(function) -> None:
    with pytest.raises(TypeError, match="no operator"):
        function(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="pruned"):
        function(prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5))
    with pytest.raises(ValueError, match="parametrized by"):
        function(parametrizations.orthogonal(nn.Linear(3, 3)))


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_a_second_call_gives_a_new_band(shape: tuple[int, int]) -> None:
    layer = clipped(nn.Linear(*shape, dtype=torch.float64), 0.1)
    with torch.no_grad():
        original(layer).mul_(100)
    assert len(banded(layer, 3, min_norm=2).parametrizations.weight) == 1
    values = torch.linalg.svdvals(layer.weight.detach())
    assert float(values.min()) >= 2 - 1e-12
    assert float(values.max()) <= 3 + 1e-12
