"""Estimates: power iteration from below, the tensor norm against its bound, the reshaped norm against torch's."""

from __future__ import annotations

from math import prod, sqrt

import pytest
import torch
from cases import FEW_CONVS, KERNELS, MATRICES, OPERATORS, Case, flat, random, rank_one, smooth
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.operators import LinearOperator

FINITE = [name for name in OPERATORS if not name.startswith("lattice")]


def dense_norm(op: LinearOperator) -> float:
    return float(torch.linalg.matrix_norm(op.to_dense().double(), ord=2))


# -- power iteration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW_CONVS, ids=str)
def test_power_iteration_of_every_geometry(case: Case) -> None:
    """`estimate ≤ ‖A‖ ≤ bound`, and close to the norm after some steps."""
    for dtype in (torch.float64, torch.float32):
        op = case.operator(case.layer().weight.detach().to(dtype))
        norm = dense_norm(op.with_weight(op.weight.double()))
        few, many = (float(sh.estimates.power_iteration(op, steps=steps)) for steps in (1, 100))
        assert few <= many * (1 + 1e-6)
        assert 0.97 * norm <= many <= norm * (1 + 1e-12)
        assert norm <= float(sh.bounds.cosine_grid(op)) * (1 + 1e-13)


@pytest.mark.parametrize("shape", MATRICES)
def test_power_iteration_of_matrices(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    norm = float(torch.linalg.matrix_norm(weight, ord=2))
    for transposed in (False, True):
        value = float(sh.estimates.power_iteration(sh.DenseOperator(weight, transposed=transposed), steps=300))
        assert 0.999 * norm <= value <= norm * (1 + 1e-12)


def test_warm_start() -> None:
    """Steps add up: the vector that comes out is the one to go on with."""
    op = sh.ConvOperator(random(4, 3, 3, 3), padding=1, input_size=6)
    once = sh.estimates.power_iteration(op, steps=30)
    _, vector = sh.estimates.power_iteration(op, steps=10, return_vector=True)
    again = sh.estimates.power_iteration(op, steps=20, start=3 * vector, return_vector=True)
    assert float(again.norm) == pytest.approx(float(once), rel=1e-9)
    assert again.vector.shape == op.in_shape
    assert float(torch.linalg.vector_norm(again.vector)) == pytest.approx(1)
    # no step at all: what the given vector attains
    assert float(sh.estimates.power_iteration(op, steps=0, start=vector)) == pytest.approx(
        float(torch.linalg.vector_norm(op.matvec(vector))), rel=1e-12
    )
    # the weight moves a little, as in training: one step from the old vector is better than ten from a random one
    moved = op.with_weight(op.weight + 1e-3 * random(4, 3, 3, 3, seed=9))
    assert float(sh.estimates.power_iteration(moved, steps=1, start=again.vector)) > float(
        sh.estimates.power_iteration(moved, steps=10)
    )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_power_iteration_at_every_scale(scale: float, dtype: torch.dtype) -> None:
    """Squares neither overflow nor vanish; the result is never above the float64 norm of the stored weight."""
    weight = (random(3, 3, 3, 3) * scale).to(dtype)
    op = sh.ConvOperator(weight, padding=1, input_size=5)
    value = sh.estimates.power_iteration(op)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    norm = dense_norm(op.with_weight(weight.double()))
    assert 0.98 * norm <= float(value) <= norm * (1 + 1e-12)


def test_autocast_does_not_reach_the_iteration() -> None:
    op = sh.ConvOperator(random(4, 3, 3, 3).float(), padding=1, input_size=5)
    value, spectrum = sh.estimates.power_iteration(op), sh.asymptotic_singular_values(op)
    bounds = (sh.bounds.cosine_grid, sh.bounds.gram_iteration, sh.bounds.unfolding, sh.bounds.tap_sum, sh.bounds.kernel_gram)
    plain = [bound(op) for bound in bounds]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sh.estimates.power_iteration(op), value)
        assert torch.equal(sh.asymptotic_singular_values(op), spectrum)
        assert all(torch.equal(bound(op), before) for bound, before in zip(bounds, plain, strict=True))


def test_power_iteration_of_zero() -> None:
    for weight in (torch.zeros(3, 4, 3), torch.zeros(3, 4, 3, requires_grad=True)):
        value, vector = sh.estimates.power_iteration(sh.ConvOperator(weight, input_size=5), return_vector=True)
        assert float(value.detach()) == 0
        assert bool(torch.isfinite(vector).all())
    value.backward()
    assert weight.grad is not None
    assert bool(torch.isfinite(weight.grad).all())
    # a start in the kernel of the map stays there, and says so
    op = sh.DenseOperator(torch.diag(torch.tensor([1.0, 0.0])))
    assert float(sh.estimates.power_iteration(op, start=torch.tensor([0.0, 1.0]))) == 0


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("make", [random, smooth], ids=lambda f: f.__name__)
def test_gradient_of_power_iteration(name: str, make) -> None:
    weight, direction = make(3, 2, 3, 3).requires_grad_(), random(3, 2, 3, 3, seed=5)
    value, vector = sh.estimates.power_iteration(OPERATORS[name](weight), steps=1000, return_vector=True)
    (gradient,) = torch.autograd.grad(value, weight)
    h = 1e-5
    ends = [
        float(sh.estimates.power_iteration(OPERATORS[name](weight.detach() + sign * h * direction), steps=100, start=vector))
        for sign in (1, -1)
    ]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-3, abs=1e-4)
    plain = sh.estimates.power_iteration(OPERATORS[name](weight.detach()), steps=1000)
    assert torch.equal(plain, value.detach())


def test_power_iteration_is_deterministic() -> None:
    op = sh.ConvOperator(random(3, 2, 3, 3), input_size=5)
    state = torch.get_rng_state()
    first = sh.estimates.power_iteration(op, steps=3)
    torch.manual_seed(17)
    assert torch.equal(first, sh.estimates.power_iteration(op, steps=3))
    torch.set_rng_state(state)
    other = sh.estimates.power_iteration(op, steps=3, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_mistakes_in_power_iteration() -> None:
    power = sh.estimates.power_iteration
    op = sh.ConvOperator(random(3, 2, 3), input_size=5)
    with pytest.raises(ValueError, match="input_size"):
        power(sh.ConvOperator(random(3, 2, 3)))
    for bad in (-1, 1.5, None, True):
        with pytest.raises(ValueError, match=r"`steps`.*got"):
            power(op, steps=bad)
    with pytest.raises(ValueError, match=r"`start`.*\(2, 5\); got \(5,\)"):
        power(op, start=torch.ones(5))
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`start` must be finite and not zero"):
            power(op, start=torch.full((2, 5), value))


# -- the tensor norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KERNELS if not name.endswith("-wide")])
def test_tensor_norm_lies_below_the_unfolding(name: str) -> None:
    """`√(Π k) ‖K‖_σ` is at most that of any unfolding; and for these kernels what is found is a bound, which it need not be."""
    kernel, settings = KERNELS[name]
    op = sh.ConvOperator(kernel, **settings)
    value = float(sh.estimates.tensor_norm(op, steps=300))
    assert value <= float(sh.bounds.unfolding(op)) * (1 + 1e-9)
    assert value >= float(sh.spectral_norm(op, rtol=1e-3)) / 1.001 * (1 - 1e-6)


def test_tensor_norm_in_closed_form() -> None:
    for dims in (1, 2, 3):
        kernel = rank_one(4, 3, *[3] * dims)
        expected = sqrt(3**dims) * float(torch.linalg.vector_norm(kernel))
        assert float(sh.estimates.tensor_norm(sh.ConvOperator(kernel))) == pytest.approx(expected, rel=1e-9)
    matrix = random(5, 4)
    norm = float(torch.linalg.matrix_norm(matrix, ord=2))
    for op in (sh.DenseOperator(matrix), sh.ConvOperator(matrix[:, :, None])):
        assert float(sh.estimates.tensor_norm(op, steps=1000)) == pytest.approx(norm, rel=1e-9)
    groups = sh.ConvOperator(torch.stack([random(2, 3), 5 * random(2, 3, seed=1)]).flatten(0, 1)[:, :, None], groups=2)
    largest = float(torch.linalg.matrix_norm(5 * random(2, 3, seed=1), ord=2))
    assert float(sh.estimates.tensor_norm(groups, steps=1000)) == pytest.approx(largest, rel=1e-9)


def test_tensor_norm_takes_complex_vectors() -> None:
    """A rotation by a quarter turn per tap has its peak at a complex frequency; real vectors would miss it."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    kernel = torch.stack([torch.eye(2, dtype=torch.float64), turn, turn @ turn], -1)
    op = sh.ConvOperator(kernel)
    assert float(sh.spectral_norm(op, rtol=1e-5)) == pytest.approx(3, rel=1e-4)
    assert float(sh.estimates.tensor_norm(op)) == pytest.approx(3, rel=1e-6)


def test_tensor_norm_of_one_start_can_be_no_bound() -> None:
    """Why it is called an estimate."""
    op = sh.ConvOperator(flat(4, 4, 3, 3) + smooth(4, 4, 3, 3) / 40)
    best = float(sh.estimates.tensor_norm(op))
    single = [
        float(sh.estimates.tensor_norm(op, starts=1, steps=1, generator=torch.Generator().manual_seed(seed))) for seed in range(8)
    ]
    assert min(single) < best


@pytest.mark.parametrize("make", [random, smooth], ids=lambda f: f.__name__)
@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"groups": 2}, {"transposed": True, "stride": 2}], ids=str)
def test_gradient_of_the_tensor_norm(make, settings: dict) -> None:
    weight, direction = make(4, 2, 3, 3).requires_grad_(), random(4, 2, 3, 3, seed=5)

    def norm(w: Tensor) -> Tensor:
        return sh.estimates.tensor_norm(sh.ConvOperator(w, **settings), steps=400, starts=3)

    (gradient,) = torch.autograd.grad(norm(weight), weight)
    h = 1e-5
    with torch.no_grad():
        difference = float(norm(weight + h * direction) - norm(weight - h * direction)) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_tensor_norm_at_every_scale(scale: float) -> None:
    kernel = random(3, 3, 3, 3)
    value = sh.estimates.tensor_norm(sh.ConvOperator((kernel * scale).float()))
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(sh.estimates.tensor_norm(sh.ConvOperator(kernel))) * scale, rel=1e-5)
    zero = sh.ConvOperator(torch.zeros(3, 3, 3, requires_grad=True))
    value = sh.estimates.tensor_norm(zero)
    value.backward()
    assert float(value.detach()) == 0
    assert zero.weight.grad is not None
    assert bool(torch.isfinite(zero.weight.grad).all())


@pytest.mark.parametrize("setting", ["steps", "starts"])
@pytest.mark.parametrize("bad", [0, -1, 1.5, None, True])
def test_mistakes_in_the_tensor_norm(setting: str, bad) -> None:
    with pytest.raises(ValueError, match=rf"`{setting}`.*got"):
        sh.estimates.tensor_norm(sh.DenseOperator(torch.eye(2)), **{setting: bad})


# -- the reshaped norm ------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": nn.Linear(5, 4),
    "conv": nn.Conv2d(3, 4, 3),
    "grouped": nn.Conv1d(4, 6, 3, groups=2),
    "transposed": nn.ConvTranspose2d(3, 4, 3, stride=2),
    "3d": nn.Conv3d(2, 3, 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_reshaped_norm_is_what_torch_converges_to(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]
    layer.reset_parameters()
    weight = layer.weight.detach().clone()
    value = sh.estimates.reshaped_norm(sh.as_operator(layer)).detach()
    normalized = nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=500)
    torch.testing.assert_close(normalized.weight.detach() * value, weight, rtol=1e-4, atol=1e-5)
    nn.utils.parametrize.remove_parametrizations(normalized, "weight")


@pytest.mark.parametrize("seed", range(5))
def test_reshaped_norm_of_plain_convolutions_lies_below(seed: int) -> None:
    """At most the lattice norm, and at least that over `√(Π k)`."""
    for op in (sh.ConvOperator(random(4, 3, 3, 2, seed=seed)), sh.ConvOperator(random(4, 3, 3, seed=seed), stride=2)):
        value, norm = float(sh.estimates.reshaped_norm(op)), float(sh.spectral_norm(op, rtol=1e-5))
        assert norm / sqrt(prod(op.weight.shape[2:])) / (1 + 1e-5) <= value <= norm


def test_reshaped_norm_differentiates() -> None:
    for settings in ({}, {"transposed": True}):
        weight = random(3, 2, 3, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda w, s=settings: sh.estimates.reshaped_norm(sh.ConvOperator(w, **s)), weight)
    for dtype in (torch.bfloat16, torch.float32):
        weight = random(3, 2).to(dtype).requires_grad_()
        value = sh.estimates.reshaped_norm(sh.DenseOperator(weight))
        assert value.dtype == torch.float32
        value.backward()
        assert weight.grad is not None
        assert weight.grad.dtype == dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimate", [sh.estimates.power_iteration, sh.estimates.tensor_norm, sh.estimates.reshaped_norm])
def test_non_finite_weights_are_refused(estimate, bad: float) -> None:
    weight = random(3, 2, 3)
    weight[0, 0, 0] = bad
    with pytest.raises(ValueError, match="`weight` contains NaN or infinity"):
        estimate(sh.ConvOperator(weight, input_size=5))
    with pytest.raises(ValueError, match="meta device"):
        estimate(sh.ConvOperator(weight.to("meta"), input_size=5))
