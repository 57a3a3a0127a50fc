"""Operators against the dense matrix that the layer itself makes of the identity, in float64."""

from __future__ import annotations

import copy
import pickle
from functools import reduce
from itertools import product
from math import lcm

import numpy as np
import pytest
import torch
from cases import CONVS, FEW_CONVS, MATRICES, Case, apply_to_identity, resized
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import spectral_hooks as sh
from spectral_hooks.operators import as_operator


def assert_close(actual: Tensor, expected: Tensor, tol: float) -> None:
    """Largest difference at most `tol`, relative to the largest entry where that is above one."""
    assert actual.shape == expected.shape
    scale = max(float(expected.abs().max()), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol * scale)


def dense_norm(matrix: Tensor) -> float:
    """The largest singular value, in float64."""
    return float(torch.linalg.matrix_norm(matrix.double(), ord=2))


def lattice(layer: nn.Module) -> float:
    """The certified norm that is to hold at every input size."""
    return float(sh.spectral_norm(as_operator(layer)).detach())


def periodic_matrix(case: Case, weight: Tensor) -> Tensor:
    """The dense circular operator, from its definition: row `r` reads position `s r + d t - before` modulo the period."""
    weight = weight.detach()
    dims, op = len(case.size), case.operator(weight)
    shifts = []
    for axis in range(dims):
        s, d, (before, _), n = op.stride[axis], op.dilation[axis], op.padding[axis], case.size[axis]
        period, rows = (n * s, n) if case.transposed else (n, -(-n // s))
        taps = weight.shape[2 + axis]
        table = weight.new_zeros(taps, rows, period)
        for t, r in product(range(taps), range(rows)):
            table[t, r, (s * r + d * t - before) % period] = 1
        shifts.append(table)
    blocks = []
    for block in weight.chunk(case.groups):
        total = 0
        for tap in product(*(range(k) for k in weight.shape[2:])):
            moves = reduce(torch.kron, [table[t] for table, t in zip(shifts, tap, strict=True)])
            total = total + torch.kron(block[(slice(None), slice(None), *tap)].contiguous(), moves)
        blocks.append(total)
    matrix = torch.block_diag(*blocks)
    return matrix.T if case.transposed else matrix


# -- the finite map of a layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv_is_the_layer_and_rmatvec_its_transpose(case: Case) -> None:
    layer = case.layer()
    op = as_operator(layer, input_size=case.size)
    reference = apply_to_identity(layer, case.in_shape)
    with torch.no_grad():
        dense = op.to_dense()
        units = torch.eye(reference.shape[0], dtype=torch.float64).reshape(-1, *op.out_shape)
        transpose = op.rmatvec(units).flatten(1)
        output = layer(torch.zeros(1, *case.in_shape, dtype=torch.float64))
    assert op.in_shape == case.in_shape
    assert op.out_shape == tuple(output.shape[1:])
    assert_close(dense, reference, 1e-12)
    assert_close(transpose, reference, 1e-12)


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_adjoint_identity_with_batch_dimensions(case: Case) -> None:
    """`<A x, y> = <x, Aᵀ y>` for every element of a batch."""
    op = as_operator(case.layer().requires_grad_(False), input_size=case.size)
    x = torch.randn(2, 3, *op.in_shape, dtype=torch.float64)
    y = torch.randn(2, 3, *op.out_shape, dtype=torch.float64)
    image, pulled = op.matvec(x), op.rmatvec(y)
    assert image.shape == y.shape
    assert pulled.shape == x.shape
    assert_close((image * y).flatten(2).sum(2), (x * pulled).flatten(2).sum(2), 1e-12)
    assert_close(op.matvec(x[1, 2]), image[1, 2], 1e-13)
    assert_close(op.rmatvec(y[1, 2]), pulled[1, 2], 1e-13)


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_canonical_is_an_isometry_and_from_canonical_its_adjoint(case: Case) -> None:
    for finite in (True, False):
        op = case.operator(case.layer().weight.detach(), finite)
        kernel = op.canonical()
        assert torch.equal(op.from_canonical(kernel), op.weight)
        assert kernel.shape[0] == case.groups
        assert float(kernel.square().sum()) == pytest.approx(float(op.weight.square().sum()), rel=1e-14)
        other = torch.randn_like(kernel)
        left, right = float((kernel * other).sum()), float((op.weight * op.from_canonical(other)).sum())
        assert left == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_circular_singular_values(case: Case) -> None:
    """Those of `op.circular(n)` are those of the periodic matrix built from the definition, whether the stride divides or not."""
    layer = case.layer()
    op = as_operator(layer).circular(case.size)
    reference = periodic_matrix(case, layer.weight)
    with torch.no_grad():
        assert_close(op.to_dense(), reference, 1e-12)
        expected = torch.linalg.svdvals(reference)
        assert_close(sh.singular_values(op), expected, 1e-10)
        assert float(sh.spectral_norm(op)) == pytest.approx(float(expected[0]), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("case", [c for c in CONVS if c.mode == "circular"], ids=str)
def test_singular_values_of_a_circular_layer(case: Case) -> None:
    layer = case.layer()
    expected = torch.linalg.svdvals(apply_to_identity(layer, case.in_shape))
    with torch.no_grad():
        assert_close(sh.singular_values(as_operator(layer, input_size=case.size)), expected, 1e-10)


@pytest.mark.parametrize("case", [c for c in CONVS if c.mode in ("zeros", "circular")], ids=str)
def test_no_size_has_a_norm_above_that_of_the_lattice(case: Case) -> None:
    """Zero padding at several sizes; circular padding where the stride divides and where rows meet at the seam."""
    layer = case.layer()
    bound = lattice(layer)
    grows = (0, 1, 2) if len(case.size) == 1 else (0, 1) if len(case.size) == 2 else (0,)
    for more in grows:
        size = tuple(n + more * (i + 1) for i, n in enumerate(case.size))
        norm = dense_norm(apply_to_identity(layer, resized(case, size).in_shape))
        assert norm <= bound * (1 + 1e-12), size


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_every_circular_padding_at_every_small_size(k: int, stride: int, dilation: int) -> None:
    """The seam, rows that meet, and rows that repeat: a positive kernel is largest there."""
    for padding in range(0, dilation * (k - 1) + 2):
        layer = nn.Conv1d(
            1, 1, k, stride=stride, padding=padding, dilation=dilation, bias=False, padding_mode="circular", dtype=torch.float64
        )
        nn.init.ones_(layer.weight)
        bound = lattice(layer)
        for n in range(max(padding, 1), 3 * stride + dilation * k + 2):
            if n + 2 * padding < dilation * (k - 1) + 1:
                continue
            matrix = apply_to_identity(layer, (1, n))
            assert dense_norm(matrix) <= bound * (1 + 1e-12), (padding, n)
            finite = as_operator(layer, input_size=n)
            assert dense_norm(matrix) <= finite.lattice_factor * lattice_of_canonical(finite) * (1 + 1e-12), (padding, n)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_circular_layers_whose_rows_meet_as_on_the_lattice_have_its_norm(k: int, stride: int, dilation: int) -> None:
    """Derived apart from the library: rows meet in a way of their own if `A Aᵀ` has entries where the lattice's has none.

    With taps that are random numbers, no sum of products of them is zero by chance.
    """
    weight = torch.randn(1, 1, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    correlation = torch.zeros(2 * dilation * (k - 1) + 1, dtype=torch.float64)
    for (i, a), (j, b) in product(enumerate(weight[0, 0]), repeat=2):
        correlation[dilation * (i - j + k - 1)] += a * b
    reach = len(correlation) // 2
    strided = float(sh.spectral_norm(sh.ConvOperator(weight, stride=stride, dilation=dilation), rtol=1e-5))
    plain = float(sh.spectral_norm(sh.ConvOperator(weight, dilation=dilation), rtol=1e-5))
    alone = set()
    for padding in range(reach + 1):
        op = sh.ConvOperator(weight, stride=stride, dilation=dilation, padding=padding, padding_mode="circular")
        harmless, largest = True, 0.0
        for n in range(max(padding, reach + 1 - 2 * padding, 1), 26):
            here = sh.ConvOperator(weight, stride, padding, dilation=dilation, padding_mode="circular", input_size=n)
            matrix = here.to_dense()
            largest = max(largest, dense_norm(matrix))
            gram = matrix @ matrix.T
            for (i, row), j in product(enumerate(gram), range(len(gram))):
                # those of the lattice whose period is the least that the stride divides
                period = lcm(stride, n)
                shifts = [s for s in range(-reach, reach + 1) if (s - stride * (i - j)) % period == 0]
                wanted = sum(float(correlation[s + reach]) for s in shifts)
                harmless &= abs(float(row[j]) - wanted) < 1e-9
        bound = float(sh.spectral_norm(op, rtol=1e-5))
        assert largest <= bound * (1 + 1e-9)
        repeats = 2**0.5 if 2 * padding > reach else 1
        if harmless:
            assert bound <= repeats * strided * (1 + 2e-5), padding
            alone.add(padding)
        elif repeats == 1:
            assert bound <= plain * (1 + 2e-5), padding
    assert 0 in alone


def test_a_circular_layer_that_does_not_wrap_is_not_clipped() -> None:
    """Patches, which the stride-one operator's norm would halve."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 32, 4, stride=4, padding_mode="circular")
    zeros = sh.ConvOperator(layer.weight.detach(), stride=4)
    assert float(sh.spectral_norm(as_operator(layer)).detach()) == pytest.approx(float(sh.spectral_norm(zeros)), rel=1e-6)
    assert torch.equal(sh.projections.clip(as_operator(layer), 1.0), layer.weight)


def lattice_of_canonical(op: sh.LinearOperator) -> float:
    """The sup of the symbol of the canonical kernel, as the norm of a plain convolution with that kernel."""
    kernel = op.canonical().detach()
    plain = sh.ConvOperator(kernel.flatten(0, 1), groups=kernel.shape[0])
    return float(sh.spectral_norm(plain))


@pytest.mark.parametrize("case", [c for c in CONVS if len(c.size) < 3], ids=str)
def test_lattice_factor_of_a_finite_operator(case: Case) -> None:
    """`‖A‖ ≤ lattice_factor · sup ‖F‖`, reflect and replicate padding included."""
    op = as_operator(case.layer(), input_size=case.size)
    with torch.no_grad():
        assert dense_norm(op.to_dense()) <= op.lattice_factor * lattice_of_canonical(op) * (1 + 1e-12)


def test_the_seam_trap_is_real() -> None:
    """A box kernel, five positions, stride two: the norm is above that of the strided lattice operator."""
    weight = torch.ones(1, 1, 3, dtype=torch.float64)
    circular = sh.ConvOperator(weight, stride=2, padding=1, padding_mode="circular")
    zeros = sh.ConvOperator(weight, stride=2, padding=1)
    at_five = dense_norm(circular.circular(5).to_dense())
    assert at_five > 1.05 * float(sh.spectral_norm(zeros))
    assert at_five <= float(sh.spectral_norm(circular))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_that_repeats_inputs_has_no_lattice_norm(mode: str) -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode)
    with pytest.raises(ValueError, match=rf"{mode} padding.*`input_size`"):
        sh.spectral_norm(as_operator(layer))


# -- matrices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix(shape: tuple[int, int], transposed: bool) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    op = sh.DenseOperator(weight, transposed=transposed)
    matrix = weight.T if transposed else weight
    assert (*op.out_shape, *op.in_shape) == tuple(matrix.shape)
    assert torch.equal(op.to_dense(), matrix)
    x, y = torch.randn(2, 3, matrix.shape[1], dtype=torch.float64), torch.randn(2, 3, matrix.shape[0], dtype=torch.float64)
    assert_close(op.matvec(x), torch.einsum("oi,abi->abo", matrix, x), 1e-13)
    assert_close((op.matvec(x) * y).sum(-1), (x * op.rmatvec(y)).sum(-1), 1e-13)
    assert torch.equal(op.from_canonical(op.canonical()), weight)
    assert_close(sh.singular_values(op), torch.linalg.svdvals(matrix), 1e-13)


# -- from layers ------------------------------------------------------------------------------------------------------------


def test_linear() -> None:
    layer = nn.Linear(5, 3, dtype=torch.float64)
    op = as_operator(layer)
    assert op.weight is layer.weight
    assert_close(op.to_dense().detach(), apply_to_identity(layer, (5,)), 1e-13)


def test_transformers_conv1d() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = conv1d(3, 5).double()
    nn.init.normal_(layer.bias)
    op = as_operator(layer)
    assert isinstance(op, sh.DenseOperator)
    assert (op.in_shape, op.out_shape) == ((5,), (3,))
    assert op.weight is layer.weight
    assert_close(op.to_dense().detach(), apply_to_identity(layer, (5,)), 1e-13)


def test_an_operator_is_its_own_operator() -> None:
    op = sh.DenseOperator(torch.eye(2))
    assert as_operator(op) is op


def test_subclass_that_leaves_forward_alone() -> None:
    class Named(nn.Conv2d):
        pass

    layer = Named(2, 3, 3, dtype=torch.float64)
    assert_close(as_operator(layer, input_size=5).to_dense().detach(), apply_to_identity(layer, (2, 5, 5)), 1e-12)


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    ("layer", "in_shape"), [(nn.Linear(4, 3), (4,)), (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 5))], ids=["linear", "conv"]
)
def test_parametrized_layer_is_the_map_it_computes_now(wrap, layer: nn.Module, in_shape: tuple[int, ...]) -> None:
    layer = wrap(copy.deepcopy(layer).double()).eval()
    op = as_operator(layer, input_size=in_shape[1:] or None)
    assert_close(op.to_dense().detach(), apply_to_identity(layer, in_shape), 1e-12)
    sh.spectral_norm(op).backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if n != "bias")


@pytest.mark.parametrize("method", [prune.l1_unstructured, prune.random_unstructured])
def test_pruned_layer_is_its_masked_weight(method) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    method(layer, "weight", amount=0.5)
    with torch.no_grad():
        # what an optimizer does; the attribute `weight` is stale until the next forward
        layer.weight_orig.add_(1.0)
    op = as_operator(layer, input_size=(4, 5))
    assert_close(op.to_dense().detach(), apply_to_identity(layer, (2, 4, 5)), 1e-12)


def test_pruned_structured_iteratively() -> None:
    layer = nn.Linear(6, 5, dtype=torch.float64)
    prune.ln_structured(layer, "weight", amount=2, n=2, dim=0)
    prune.l1_unstructured(layer, "weight", amount=3)
    assert_close(as_operator(layer).to_dense().detach(), apply_to_identity(layer, (6,)), 1e-13)


def test_pruned_bias_leaves_the_weight_alone() -> None:
    layer = nn.Linear(6, 5, dtype=torch.float64)
    prune.l1_unstructured(layer, "bias", amount=2)
    assert_close(as_operator(layer).to_dense().detach(), apply_to_identity(layer, (6,)), 1e-13)


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (9, 5)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_timm_same_padding(size: tuple[int, int], stride: int, kernel: int) -> None:
    """timm's padding depends on the input size; the operator has the true one, and the lattice norm bounds all."""
    conv = pytest.importorskip("timm.layers").create_conv2d(2, 3, kernel, stride=stride, padding="same").double()
    reference = apply_to_identity(conv, (2, *size))
    assert_close(as_operator(conv, input_size=size).to_dense().detach(), reference, 1e-12)
    assert dense_norm(reference) <= lattice(conv)


def test_timm_same_padding_in_class() -> None:
    layers = pytest.importorskip("timm.layers")
    conv = layers.Conv2dSame(2, 3, 3, stride=2, dilation=2).double()
    assert_close(as_operator(conv, input_size=7).to_dense().detach(), apply_to_identity(conv, (2, 7, 7)), 1e-12)


def test_timm_linear() -> None:
    linear = pytest.importorskip("timm.layers").Linear(4, 3).double()
    assert_close(as_operator(linear).to_dense().detach(), apply_to_identity(linear, (4,)), 1e-13)


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_standardized_convolutions_are_refused_by_name(name: str) -> None:
    layer = getattr(pytest.importorskip("timm.layers"), name)(4, 4, 3)
    with pytest.raises(NotImplementedError, match=rf"^{name} standardizes its weight"):
        as_operator(layer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_old_style_normalization_is_refused_by_name(kind: str) -> None:
    layer = getattr(torch.nn.utils, kind)(nn.Linear(3, 3))
    with pytest.raises(NotImplementedError, match=rf"torch\.nn\.utils\.{kind}\..*parametrizations\.{kind}"):
        as_operator(layer)


@pytest.mark.parametrize("layer", [nn.LazyLinear(3), nn.LazyConv2d(3, 3)], ids=["linear", "conv"])
def test_lazy_layers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="no weight yet: run one forward"):
        as_operator(layer)


def test_lazy_layer_after_its_first_forward() -> None:
    layer = nn.LazyLinear(3)
    layer(torch.zeros(1, 4))
    assert as_operator(layer).in_shape == (4,)


class Doubled(nn.Linear):
    """A forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    """The other method that subclasses change."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


@pytest.mark.parametrize("layer", [Doubled(3, 3), DoubledConv(3, 3, 3)], ids=["forward", "_conv_forward"])
def test_subclass_with_its_own_forward_is_refused(layer: nn.Module) -> None:
    with pytest.raises(NotImplementedError, match=type(layer).__name__ + ".*register"):
        as_operator(layer)


def test_own_layers_can_be_registered() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    as_operator.register(Twice, lambda layer, input_size=None: sh.DenseOperator(2 * layer.weight))
    layer = Twice(3, 4, dtype=torch.float64)
    assert_close(as_operator(layer).to_dense().detach(), apply_to_identity(layer, (3,)), 1e-13)


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.BatchNorm2d(3), nn.Embedding(4, 3), nn.Bilinear(2, 2, 2), nn.LSTM(2, 2)], ids=repr
)
def test_unknown_layers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=rf"`layer`.*{type(layer).__name__}"):
        as_operator(layer)


def test_tensors_and_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="DenseOperator"):
        as_operator(torch.eye(3))
    with pytest.raises(TypeError, match="`layer`"):
        as_operator("conv1")


def test_integer_weights_are_refused() -> None:
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Linear.*int8"):
        as_operator(layer)


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantized_linear_is_refused() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises((TypeError, NotImplementedError, ValueError)):
        as_operator(quantized[0])


# -- mistakes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"stride": 0}, "stride"),
        ({"stride": (1, 2, 3)}, "stride"),
        ({"stride": 1.5}, "stride"),
        ({"dilation": 0}, "dilation"),
        ({"padding": -1}, "padding"),
        ({"padding": "full"}, "padding"),
        ({"padding": (1,)}, "padding"),
        ({"padding": "same", "stride": 2}, "padding"),
        ({"padding": [(1, 2)]}, "padding"),
        ({"padding": [(1,), (2,)]}, "padding"),
        ({"padding": "same", "transposed": True}, "padding"),
        ({"groups": 3}, "groups"),
        ({"groups": 0}, "groups"),
        ({"padding_mode": "mirror"}, "padding_mode"),
        ({"padding_mode": "circular", "transposed": True}, "padding_mode"),
        ({"output_padding": 1}, "output_padding"),
        ({"output_padding": 2, "stride": 2, "transposed": True}, "output_padding"),
        ({"input_size": (5,)}, "input_size"),
        ({"input_size": 0}, "input_size"),
        ({"input_size": (2, 5)}, "input_size"),
        ({"input_size": 3, "padding": 3, "padding_mode": "reflect"}, "input_size"),
        ({"input_size": 3, "padding": 4, "padding_mode": "circular"}, "input_size"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(settings: dict, argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}"):
        sh.ConvOperator(torch.ones(4, 2, 3, 3), **settings)


@pytest.mark.parametrize("shape", [(3, 3), (1, 1, 1, 1, 1, 1), (3,), (3, 2, 0), (3, 2, 3, 0)], ids=str)
def test_wrong_kernel_ranks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`weight` must be a kernel"):
        sh.ConvOperator(torch.ones(shape))


@pytest.mark.parametrize("shape", [(3,), (3, 3, 3)], ids=str)
def test_wrong_matrix_ranks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`weight` must be a matrix"):
        sh.DenseOperator(torch.ones(shape))


@pytest.mark.parametrize("make", [sh.DenseOperator, sh.ConvOperator])
@pytest.mark.parametrize(
    "weight", [[[1.0]], torch.ones(2, 2, 3, dtype=torch.int32), torch.ones(2, 2, dtype=torch.complex64)], ids=str
)
def test_weights_that_are_no_real_tensors(make, weight) -> None:
    with pytest.raises(TypeError, match="`weight` must be a"):
        make(weight)


@pytest.mark.parametrize("shape", [(), (5, 5), (3, 5, 5), (2, 5, 6), (1, 3, 5)], ids=str)
def test_wrong_input_shapes(shape: tuple[int, ...]) -> None:
    op = sh.ConvOperator(torch.ones(3, 2, 3, 3), padding=1, input_size=5)
    with pytest.raises(ValueError, match=r"`x` must have shape \(\*batch, 2, 5, 5\)"):
        op.matvec(torch.ones(shape))
    if shape[-3:] != (3, 5, 5):
        with pytest.raises(ValueError, match=r"`y` must have shape \(\*batch, 3, 5, 5\)"):
            op.rmatvec(torch.ones(shape))
    with pytest.raises(ValueError, match=r"`x` must have shape \(\*batch, 7\)"):
        sh.DenseOperator(torch.ones(2, 7)).matvec(torch.ones(2))


def test_the_lattice_operator_has_no_shapes() -> None:
    op = sh.ConvOperator(torch.ones(3, 2, 3, 3))
    assert not op.is_finite
    for ask in (lambda: op.in_shape, lambda: op.out_shape, op.to_dense, lambda: op.matvec(torch.ones(2, 5, 5))):
        with pytest.raises(ValueError, match="`input_size=`"):
            ask()


def test_with_weight_refuses_another_shape() -> None:
    op = sh.DenseOperator(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"`weight` must have shape \(3, 2\)"):
        op.with_weight(torch.ones(2, 3))
    other = torch.zeros(3, 2)
    assert op.with_weight(other).weight is other
    assert bool((op.weight == 1).all())


# -- dtypes, copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FEW_CONVS[::4], ids=str)
def test_lower_precision(case: Case, dtype: torch.dtype) -> None:
    """The operator applies the weight in its own dtype, and its norms are those of the stored values."""
    layer = case.layer(dtype)
    op = as_operator(layer, input_size=case.size)
    with torch.no_grad():
        dense = op.to_dense()
        assert dense.dtype == dtype
        stored = op.with_weight(layer.weight.double()).to_dense()
        # only sums of taps that meet at one input are rounded
        assert_close(dense.double(), stored, 8 * torch.finfo(dtype).eps)
        norm = sh.spectral_norm(op)
        assert norm.dtype == torch.float32
        assert float(norm) == pytest.approx(dense_norm(stored), rel=1e-5)
        if case.mode in ("zeros", "circular"):
            assert float(sh.spectral_norm(as_operator(layer))) >= dense_norm(stored)


def test_deepcopy_and_pickle() -> None:
    case = FEW_CONVS[2]
    op = case.operator(case.layer().weight.detach())
    for twin in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert twin.weight is not op.weight
        assert torch.equal(twin.to_dense(), op.to_dense())
        assert repr(twin) == repr(op)


def test_gradient_reaches_the_layer() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    as_operator(layer, input_size=4).matvec(torch.ones(2, 4, 4)).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight, as_operator(layer).weight)


def test_operators_do_not_touch_the_layer() -> None:
    layer = parametrize.register_parametrization(nn.Linear(3, 3), "weight", nn.Identity())
    before = {name: p.clone() for name, p in layer.state_dict().items()}
    sh.spectral_norm(as_operator(layer))
    assert all(torch.equal(before[name], p) for name, p in layer.state_dict().items())


# -- what is no dense weight ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize(
    ("change", "error", "remedy"),
    [
        (lambda w: w.to_sparse(), NotImplementedError, "to_dense"),
        (lambda w: w.to_sparse_csr(), NotImplementedError, "to_dense"),
        (lambda w: w.to(torch.float8_e4m3fn), NotImplementedError, "float"),
        (lambda w: w.to(torch.float8_e5m2), NotImplementedError, "float"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), TypeError, "dequantize"),
        (lambda w: w.to(torch.complex64), TypeError, "real"),
        (lambda w: w.to(torch.int32), TypeError, "floating-point"),
    ],
    ids=["coo", "csr", "e4m3fn", "e5m2", "quantized", "complex", "integer"],
)
def test_weights_that_are_not_the_map_are_refused(change, error: type[Exception], remedy: str) -> None:
    with pytest.raises(error, match=f"`weight`.*{remedy}"):
        sh.DenseOperator(change(torch.randn(4, 4)))


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(2, 2, 3, padding="same"), nn.ConvTranspose2d(2, 2, 3, padding="valid")])
def test_a_transposed_layer_with_a_word_for_padding_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"`padding` of a transposed convolution must be numbers.*'(same|valid)'.*Give.*an int"):
        as_operator(layer)


def test_integers_of_numpy_are_integers() -> None:
    weight = torch.randn(4, 3, 3)
    op = sh.ConvOperator(weight, np.int64(2), np.array([1]), dilation=np.int32(1), groups=np.int64(1), input_size=np.int64(8))
    plain = sh.ConvOperator(weight, 2, 1, input_size=8)
    assert repr(op) == repr(plain)


@pytest.mark.parametrize("layer", [nn.Linear(0, 3), nn.Linear(3, 0)], ids=str)
def test_singular_values_of_nothing(layer: nn.Module) -> None:
    assert sh.singular_values(as_operator(layer)).shape == (0,)
