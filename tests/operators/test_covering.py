"""The norm at an input size is at most that of a circular operator: against dense float64 matrices of torch's own forward."""

from __future__ import annotations

from itertools import product
from math import prod

import observers
import pytest
import torch
from torch import nn

import spectral_hooks as sh
from spectral_hooks.operators.covering import at_sizes, covering

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def layer_of(kind: type[nn.Module], *args, seed: int = 0, positive: bool = False, **options) -> nn.Module:
    torch.manual_seed(seed)
    layer = kind(*args, bias=False, dtype=torch.float64, **options)
    weight = torch.randn_like(layer.weight)
    layer.weight.data = weight.abs() if positive else weight
    return layer


#: Dimensions, channels, taps, the largest input, and other options.
GEOMETRIES = [
    (1, (2, 3), 3, (9,), {"padding": 1}),
    (1, (2, 2), 5, (8,), {"padding": 4, "stride": 3}),
    (1, (1, 2), 4, (11,), {"padding": "same", "dilation": 3}),
    (1, (2, 1), 3, (10,), {"padding": 3, "stride": 2, "dilation": 2}),
    (1, (4, 2), 2, (7,), {"padding": 2, "groups": 2, "stride": 4}),
    (1, (1, 1), 3, (12,), {"padding": 5, "dilation": 4, "stride": 6}),
    (2, (2, 2), 3, (4, 5), {"padding": 1}),
    (2, (1, 2), (2, 4), (5, 6), {"padding": "same"}),
    (2, (2, 1), 3, (4, 6), {"padding": (2, 0), "stride": (2, 1), "dilation": (1, 2)}),
    (3, (1, 2), 2, (3, 2, 3), {"padding": (1, 0, 1), "stride": (1, 1, 2)}),
]
#: Likewise, transposed.
TRANSPOSED_GEOMETRIES = [
    (1, (2, 2), 3, (7,), {"stride": 2, "padding": 1, "output_padding": 1}),
    (1, (1, 2), 4, (6,), {"stride": 3, "dilation": 4, "output_padding": 3}),
    (1, (2, 1), 2, (8,), {"stride": 4, "output_padding": 2}),
    (2, (1, 1), 3, (3, 4), {"stride": (2, 1), "padding": (1, 2)}),
]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(
    ("kind", "geometry"), [(CONV, g) for g in GEOMETRIES] + [(TRANSPOSED, g) for g in TRANSPOSED_GEOMETRIES], ids=str
)
def test_zero_padding_is_covered_at_this_size_and_at_all_smaller_ones(kind, geometry, positive) -> None:
    dims, channels, taps, size, options = geometry
    layer = layer_of(kind[dims], *channels, taps, positive=positive, **options)
    cover = covering([sh.as_operator(layer, input_size=size)])
    bound = float(sh.spectral_norm(cover).detach())
    # what the frequencies say is the norm of the circular matrix
    assert bound == pytest.approx(observers.matrix_norm(cover.to_dense()), rel=1e-9)
    norms = []
    for smaller in product(*(range(1, n + 1) for n in size)):
        try:
            norms.append(observers.finite_norm(layer, smaller))
        except RuntimeError:  # torch has no output at this size
            continue
        assert norms[-1] <= bound * (1 + 1e-9), smaller
    assert len(norms) > 1
    # a larger input is not covered: its norms grow to the supremum over all frequencies
    if positive:
        assert bound == pytest.approx(observers.lattice_norm(layer), rel=1e-6)


def test_the_size_itself_would_not_do_as_period() -> None:
    """The zero-padded operator can have the larger norm, so these tests can fail."""
    found = 0.0
    for seed in range(30):
        layer = layer_of(nn.Conv1d, 1, 1, 3, padding=1, seed=seed)
        op = sh.as_operator(layer, input_size=6)
        found = max(found, observers.finite_norm(layer, (6,)) / float(sh.spectral_norm(op.circular(6)).detach()))
    assert found > 1.001


def test_dynamic_padding_is_covered_at_all_smaller_sizes() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    for stride, taps, dilation, n in product((1, 2, 3), (2, 3, 5), (1, 2), (5, 6, 7)):
        layer = layer_of(timm_layers.Conv2dSame, 1, 1, taps, stride=stride, dilation=dilation)
        bound = float(sh.spectral_norm(covering([sh.as_operator(layer, input_size=(n, 4))])).detach())
        for smaller in product(range(1, n + 1), range(1, 5)):
            assert observers.finite_norm(layer, smaller) <= bound * (1 + 1e-9), (stride, taps, dilation, n, smaller)


@pytest.mark.parametrize(
    ("taps", "options", "sizes"),
    [
        (2, {}, [(4,), (5,)]),
        (3, {"padding": 1, "stride": 2}, [(4,), (6,), (10,)]),
        (3, {"padding": 2, "dilation": 2}, [(6,), (4,)]),
    ],
)
def test_circular_padding_is_covered_at_all_recorded_sizes(taps: int, options: dict, sizes: list[tuple[int, ...]]) -> None:
    for seed in range(10):
        layer = layer_of(nn.Conv1d, 2, 2, taps, seed=seed, padding_mode="circular", **options)
        cover = covering([sh.as_operator(layer, input_size=size) for size in sizes])
        bound = float(sh.spectral_norm(cover).detach())
        assert max(observers.finite_norm(layer, size) for size in sizes) <= bound * (1 + 1e-9)


def test_circular_norms_are_not_monotone_so_no_size_covers_the_smaller_ones() -> None:
    layer = layer_of(nn.Conv1d, 1, 1, 2, padding=1, padding_mode="circular")
    layer.weight.data = torch.tensor([[[1.0, -1.0]]], dtype=torch.float64)
    norms = [float(sh.spectral_norm(sh.as_operator(layer, input_size=n).circular(n)).detach()) for n in (4, 5)]
    assert norms == pytest.approx([2.0, 1.9021], abs=1e-4)
    assert float(sh.spectral_norm(sh.as_operator(layer, input_size=5).circular(20)).detach()) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2}, (5, 5)),  # does not divide
        ({"kernel_size": 3, "padding": 2, "padding_mode": "circular"}, (6, 6)),  # repeats rows
        ({"kernel_size": 3, "padding": 1}, (40, 40)),  # the grid is so fine that it is hardly looser
        ({"kernel_size": 1}, (4, 4)),  # a matrix
        ({"kernel_size": 2, "stride": 2}, (4, 4)),  # another
    ],
)
def test_where_it_is_no_gain_the_bound_is_that_of_every_size(options, size) -> None:
    layer = layer_of(nn.Conv2d, 2, 2, **options)
    assert at_sizes(layer, [size]).kind == sh.as_operator(layer).kind == "lattice"


def test_it_is_at_most_the_lattice_norm_and_takes_few_frequencies() -> None:
    for size, frequencies in (((1, 1), 9), ((2, 2), 9), ((4, 4), 25), ((14, 14), 225)):
        layer = layer_of(nn.Conv2d, 4, 4, 3, padding=1)
        op = at_sizes(layer, [size])
        assert op.weight is layer.weight
        assert prod(n for n, _ in op.frequency_grid) == frequencies
        share = float(sh.spectral_norm(op).detach()) / observers.lattice_norm(layer)
        assert (0.96 if size == (14, 14) else 0.5) < share <= 1 + 1e-6
