"""Functions of the singular values: exact on matrices, as promised on convolutions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import spectral_hooks as sh
from spectral_hooks import projections

SHAPES = [(1, 1), (1, 5), (5, 1), (6, 6), (9, 4)]

#: Projection, with arguments, and what it does to the singular values, descending, in units of the bound.
MAPS: dict[str, tuple[Callable[..., Tensor], dict, Callable[[Tensor], Tensor]]] = {
    "band": (projections.band, {"min_norm": 0.6}, lambda s: s.clamp(0.3, 1)),
    "band-low-0": (projections.band, {}, lambda s: s.clamp(max=1)),
    "polar": (projections.polar, {}, torch.ones_like),
    "soft_cap": (projections.soft_cap, {"strength": 0.1}, lambda s: (s - 0.1 * s**3) + 0.1 * (s - 0.1 * s**3) ** 3),
    "hammer": (projections.hammer, {}, lambda s: torch.cat([s[:1].clamp(max=1), s[1:]])),
    "clipped_decay": (projections.clipped_decay, {"decay": 0.3}, lambda s: 0.7 * s + 0.3 * s.clamp(max=1)),
    "parseval": (projections.parseval, {"strength": 0.2}, lambda s: s + 0.2 * s * (1 - s**2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_matrices_by_svd(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    function, options, mapped = MAPS[name]
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = (u * (2 * mapped(s / 2))) @ vh
    result = function(sh.DenseOperator(weight), 2.0, **options)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=3e-6 if dtype == torch.float32 else 1e-9)
    assert torch.equal(weight, torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))), "left as it was"


@pytest.mark.parametrize("name", ["band", "polar"])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_obey_the_bound(name: str, stride: int) -> None:
    function, options, _ = MAPS[name]
    torch.manual_seed(0)
    op = sh.ConvOperator(torch.randn(6, 4, 3, 3), stride=stride)
    projected = op.with_weight(function(op, 0.9, **options))
    values = torch.linalg.svdvals(torch.fft.fft2(projected.canonical().double(), (32, 32)).movedim((1, 2), (-2, -1)))
    assert float(values.max()) <= 0.9
    assert float(values.max()) >= 0.85
    before = torch.linalg.svdvals(torch.fft.fft2(op.canonical().double(), (32, 32)).movedim((1, 2), (-2, -1)))
    # more alike than before
    assert float(values.min() / values.max()) > float(before.min() / before.max())


@pytest.mark.parametrize("power", [-1015, -960, -500, 0])
@pytest.mark.parametrize("bound", [1e-100, 1.0, 7e22, 1e150, 1e300])
@pytest.mark.parametrize("shape", [(6, 4), (4, 4, 3)], ids=str)
def test_bounds_far_above_the_norm(shape: tuple[int, ...], bound: float, power: int) -> None:
    """Values move to the bound, or stay, with all digits, although their ratio may be beyond the range of float64."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = torch.tensor(power)

    def op(weight: Tensor) -> sh.LinearOperator:
        return sh.DenseOperator(weight) if weight.ndim == 2 else sh.ConvOperator(weight, padding=1, input_size=5).circular(5)

    if bound < 1e12 * 2.0**power:  # not far above
        return
    small, less = op(torch.ldexp(weight, size)), op(torch.ldexp(weight, torch.tensor(-60)))
    for share in (1.0, 0.5):
        lifted, plain = projections.band(small, bound, min_norm=share * bound), projections.band(less, 1.0, min_norm=share)
        torch.testing.assert_close(lifted / bound, plain, rtol=1e-9, atol=1e-12)
    for project in (projections.band, projections.clip, projections.rescale, projections.hammer, projections.soft_cap):
        torch.testing.assert_close(torch.ldexp(project(small, bound), -size), weight, rtol=1e-5, atol=1e-9)
    grown = torch.ldexp(projections.parseval(small, bound, strength=0.5), -size)
    torch.testing.assert_close(grown, 1.5 * weight, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 4), (4, 4, 3)], ids=str)
def test_bounds_far_below_the_norm(shape: tuple[int, ...]) -> None:
    """Values move to the bound, and those beside the largest stay, although their ratio is beyond the range of float64."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    make = sh.DenseOperator if weight.ndim == 2 else sh.ConvOperator
    large = make(torch.ldexp(weight, torch.tensor(1015)))
    for bound in (1e-10, 1e-30, 1e-200):
        for share in (1.0, 0.5):
            moved, plain = (
                projections.band(large, bound, min_norm=share * bound),
                projections.band(make(weight * 1e6), min_norm=share),
            )
            torch.testing.assert_close(moved / bound, plain, rtol=1e-6, atol=1e-9)
        hammered = torch.ldexp(projections.hammer(large, bound), torch.tensor(-1015))
        torch.testing.assert_close(hammered, projections.hammer(make(weight), 1e-30), rtol=1e-9, atol=1e-12)


def test_polar_of_an_orthogonal_kernel_is_itself() -> None:
    weight = torch.zeros(4, 4, 3, 3)
    weight[:, :, 1, 1] = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    # up to the width of the certificate that it is scaled by
    torch.testing.assert_close(projections.polar(sh.ConvOperator(weight)), weight, rtol=1.1e-3, atol=1e-6)


def test_parseval_and_soft_cap_settle_at_the_bound() -> None:
    """Many steps of parseval end at an orthogonal matrix; soft_cap only ever shrinks."""
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 4
    for _ in range(400):
        weight = projections.parseval(sh.DenseOperator(weight), 1.0, strength=0.5)
    torch.testing.assert_close(torch.linalg.svdvals(weight), torch.ones(5, dtype=torch.float64))
    start = torch.linspace(0, 1.5, 20, dtype=torch.float64)
    capped = projections.soft_cap(sh.DenseOperator(torch.diag(start)), strength=0.1).diagonal()
    assert (capped <= start).all()


@pytest.mark.parametrize(
    ("function", "options", "match"),
    [
        (projections.band, {"min_norm": 1.5}, "`min_norm`"),
        (projections.band, {"min_norm": -0.5}, "`min_norm`"),
        (projections.soft_cap, {"strength": 2}, "`strength`"),
        (projections.parseval, {"strength": -1}, "`strength`"),
        (projections.clipped_decay, {"decay": 1.1}, "`decay`"),
    ],
)
def test_bad_arguments(function: Callable[..., Tensor], options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        function(sh.DenseOperator(torch.eye(2)), 1.0, **options)


@pytest.mark.parametrize("name", MAPS)
def test_bad_bounds_and_weights(name: str) -> None:
    function = MAPS[name][0]
    with pytest.raises(ValueError, match="max_norm"):
        function(sh.DenseOperator(torch.eye(2)), 0.0)
    with pytest.raises(ValueError, match="NaN"):
        function(sh.DenseOperator(torch.full((2, 2), float("nan"))), 1.0)
