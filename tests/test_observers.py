"""The references themselves, on cases that are known by hand, and against each other."""

from __future__ import annotations

from math import cos, ldexp, sqrt

import attacks
import numpy as np
import observers
import promises
import pytest
import torch
from torch import nn


def conv(weight: torch.Tensor, **options: object) -> nn.Module:
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
    groups = options.get("groups", 1)
    layer = kind(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), bias=False, dtype=torch.float64, **options)
    layer.weight.data = weight.double()
    return layer


def test_the_norm_of_a_matrix_at_every_scale() -> None:
    matrix = np.array([[3.0, 0.0], [4.0, 5.0]])  # singular values √5 and 3 √5
    for exponent in (-1060, -500, 0, 500, 1020):
        norm = observers.matrix_norm(np.ldexp(matrix, exponent))
        # what is subnormal has few digits left
        assert norm / ldexp(1.0, exponent) == pytest.approx(3 * sqrt(5), rel=1e-12 if exponent > -1000 else 1e-3)
    assert observers.matrix_norm(np.zeros((2, 3))) == 0


def test_the_nearest_matrix_in_a_band() -> None:
    assert observers.clipped_matrix(np.diag([3.0, 1.0, 0.1]), 0.5, 2.0) == pytest.approx(np.diag([2.0, 1.0, 0.5]))


def test_lattice_norms_known_by_hand() -> None:
    assert observers.lattice_norm(conv(torch.ones(1, 1, 3))) == pytest.approx(3)  # at frequency zero
    assert observers.lattice_norm(conv(torch.tensor([[[1.0, -1.0]]]))) == pytest.approx(2)  # at π
    assert observers.lattice_norm(conv(torch.ones(1, 1, 3, 2))) == pytest.approx(6)
    assert observers.lattice_norm(conv(torch.ones(2, 3, 2))) == pytest.approx(2 * sqrt(6))
    # y[n] = x[2n] + x[2n + 1]: rows orthogonal
    assert observers.lattice_norm(conv(torch.ones(1, 1, 2), stride=2)) == pytest.approx(sqrt(2))
    # of three taps the outer ones overlap: phases of 2 taps and 1, norm² 4 + 1
    assert observers.lattice_norm(conv(torch.ones(1, 1, 3), stride=2)) == pytest.approx(sqrt(5))
    # dilated by the stride: one phase only
    assert observers.lattice_norm(conv(torch.ones(1, 1, 3), stride=2, dilation=2)) == pytest.approx(3)
    # groups: the larger of 2 and 6, not their product
    grouped = conv(torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]]), groups=2)
    assert observers.group_norms(grouped) == pytest.approx([2, 6])
    assert observers.lattice_norm(grouped) == pytest.approx(6)


def test_a_supremum_off_every_coarse_grid() -> None:
    for angle in (0.1, 0.45, 1.234, 3.0):
        c, s = cos(angle), sqrt(1 - cos(angle) ** 2)
        weight = torch.tensor([[[1, c], [0, -s]], [[0, s], [1, c]]], dtype=torch.float64)  # 2 |cos((θ ± angle) / 2)|
        assert observers.lattice_norm(conv(weight)) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("excess", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("angle", [0.4, 1.234, 2.6])
def test_a_peak_off_the_grid_that_is_higher_by_little(angle: float, excess: float) -> None:
    """Others are as high as the bound of the norm without it, and lie on the grid: `1 + z` of two taps, where `z = ±1`.

    A rotation times `1 + ε` beside them has the eigenvalues `(1 + ε) exp(± i angle)`, so the norm is `2 + ε` at `θ = ± angle`.
    """
    c, s = (1 + excess) * cos(angle), (1 + excess) * sqrt(1 - cos(angle) ** 2)
    for taps in (2, 3):  # with a tap of zeros between, all peaks occur twice
        weight = torch.zeros(4, 4, taps, dtype=torch.float64)
        weight[:, :, 0] = torch.eye(4)
        weight[:, :, -1] = torch.diag(torch.tensor([c, c, 1, -1], dtype=torch.float64))
        weight[0, 1, -1], weight[1, 0, -1] = -s, s
        assert observers.lattice_norm(conv(weight)) == pytest.approx(2 + excess, rel=1e-9)


@pytest.mark.parametrize("seed", [54, 0, 1, 2])
def test_no_torus_exceeds_the_lattice_where_singular_values_meet(seed: int) -> None:
    """A fine grid sees it where a climb along axes and diagonals ends on a ridge: of the first kernel, 8e-5 below the peak."""
    layer = conv(torch.from_numpy(np.random.default_rng(seed).integers(-1, 2, (3, 3, 3, 3))))
    assert max(observers.circular_norm(layer, (n, n)) for n in (230, 256)) <= observers.lattice_norm(layer) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_aliases_are_the_dense_torus(seed: int) -> None:
    """With strides and dilations that share factors, groups, one to three axes."""
    rng = np.random.default_rng(seed)
    layer = attacks.convolution(rng, torch.float64, transposed=False, extreme=0)
    axes = zip(layer.stride, layer.dilation, layer.kernel_size, strict=True)
    size = [s * max(2, -(-d * (k - 1) // s)) for s, d, k in axes]
    matrix = observers.torus_matrix(layer, size)
    if matrix.shape[1] > 1500:
        pytest.skip("the dense matrix would be large, and smaller ones say the same")
    assert observers.circular_norm(layer, size) == pytest.approx(observers.matrix_norm(matrix), rel=1e-10)
    assert observers.circular_norm(layer, size) <= observers.lattice_norm(layer) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_no_input_size_exceeds_the_lattice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = attacks.convolution(rng, torch.float32)
    small, large = (observers.finite_norm(layer, attacks.size(rng, layer, largest)) for largest in (30, 400))
    assert max(small, large) <= observers.lattice_norm(layer) * (1 + 1e-9)


def test_large_inputs_near_the_lattice_norm() -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(2, 3, 4, stride=2, dilation=3, padding=4, bias=False)
    norm = observers.lattice_norm(layer)
    assert norm * 0.99 <= observers.finite_norm(layer, (150,)) <= norm


def test_attacks_are_finite_and_repeatable() -> None:
    for seed in range(60):
        first, second = (attacks.convolution(np.random.default_rng(seed), torch.float16) for _ in range(2))
        assert torch.isfinite(first.weight).all()
        assert torch.equal(first.weight, second.weight)


def test_a_broken_promise_is_seen() -> None:
    def kept(rng: np.random.Generator) -> promises.Margin:
        return promises.Margin(-0.1, "")

    def broken(rng: np.random.Generator) -> promises.Margin:
        return promises.Margin(2e-6, "")

    def raises(rng: np.random.Generator) -> promises.Margin:
        raise ZeroDivisionError("here")

    def nan(rng: np.random.Generator) -> promises.Margin:
        return promises.Margin(float("nan"), "")

    assert [promises.is_broken(promises.attack(p, 0)) for p in (kept, broken, raises, nan)] == [False, True, True, True]
    assert "ZeroDivisionError: here" in promises.attack(raises, 0).about
