"""write_ changes the values of a weight and nothing else."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from spectral_hooks import ConvOperator, DenseOperator, SpectralClip, as_operator, projections, spectral_norm
from spectral_hooks.weights.gains import clipped_gain
from spectral_hooks.weights.sharded import full
from spectral_hooks.weights.writing import leaves, write_


def test_a_plain_parameter_is_copied_into() -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    parameter, pointer = layer.weight, layer.weight.data_ptr()
    write_(layer, torch.ones(2, 3))
    assert layer.weight is parameter
    assert layer.weight.data_ptr() == pointer
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.requires_grad
    assert bool((layer.weight == 1).all())


def test_an_optimizer_still_holds_it() -> None:
    layer = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    write_(layer, torch.ones(2, 3))
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    assert bool((layer.weight == 0).all())


def test_writing_counts_as_a_change_for_autograd() -> None:
    """Between forward and backward it is an error, not a wrong gradient."""
    layer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    loss = layer(torch.ones(3)).sum()
    write_(layer[1], torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal], ids=lambda f: f.__name__)
def test_a_parametrized_weight_is_assigned_and_read_back(wrap) -> None:
    layer = wrap(nn.Linear(4, 4))
    torch.manual_seed(0)
    wanted = torch.linalg.qr(torch.randn(4, 4)).Q
    keys = list(layer.state_dict())
    held = {name: id(p) for name, p in layer.named_parameters()}
    write_(layer, wanted)
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=0, atol=1e-5)
    assert list(layer.state_dict()) == keys
    assert {name: id(p) for name, p in layer.named_parameters()} == held


class Half(nn.Module):
    """A parametrization that gives back another weight than was assigned."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return x


class OneWay(nn.Module):
    """A parametrization that cannot be assigned."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


@pytest.mark.parametrize(
    ("parametrization", "message"),
    [(Half(), "Half did not take the projected weight"), (OneWay(), "OneWay has no right_inverse")],
    ids=["half", "one-way"],
)
def test_a_parametrization_that_does_not_take_it_keeps_the_old_weight(parametrization: nn.Module, message: str) -> None:
    layer = parametrize.register_parametrization(nn.Linear(3, 2), "weight", parametrization)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message + ".*exclude the layer"):
        write_(layer, torch.ones(2, 3))
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_right_inverse_that_is_not_implemented() -> None:
    """torch's orthogonal has one, but without trivialization it raises."""
    layer = parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley", use_trivialization=False)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"_Orthogonal has no right_inverse.*exclude the layer"):
        write_(layer, torch.eye(3))
    assert torch.equal(layer.weight.detach(), before)


def test_a_value_that_an_orthogonal_weight_cannot_take_is_refused() -> None:
    layer = parametrizations.orthogonal(nn.Linear(3, 3))
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"Orthogonal|not orthogonal|did not take"):
        write_(layer, torch.diag(torch.tensor([1.0, 0.5, 0.1])))
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=1e-6)


def test_a_pruned_weight_is_written_where_its_mask_is_open() -> None:
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", amount=6)
    original, closed = layer.weight_orig, layer.weight_mask == 0
    before = original.detach().clone()
    write_(layer, torch.full((4, 4), 7.0))
    assert layer.weight_orig is original
    assert bool((original[~closed] == 7).all())
    assert torch.equal(original[closed], before[closed])
    assert torch.equal(as_operator(layer).weight.detach(), 7 * layer.weight_mask)
    assert torch.equal(layer.weight.detach(), 7 * layer.weight_mask)


def test_leaves_are_the_parameters_behind_a_weight() -> None:
    plain = nn.Linear(2, 2)
    normed = parametrizations.weight_norm(nn.Linear(2, 2))
    pruned = prune.identity(nn.Linear(2, 2), "weight")
    assert [id(p) for p in leaves(plain)] == [id(plain.weight)]
    assert [id(p) for p in leaves(normed)] == [id(p) for n, p in normed.named_parameters() if n != "bias"]
    assert [id(p) for p in leaves(pruned)] == [id(pruned.weight_orig)]


def test_full_is_the_weight_itself_without_gradient() -> None:
    weight = nn.Linear(2, 2).weight
    assert full(weight).data_ptr() == weight.data_ptr()
    assert not full(weight).requires_grad


# -- through the operator ---------------------------------------------------------------------------------------------------


class Held(nn.Module):
    """A layer that makes its matrix of a parameter under another name; each subclass in another way."""

    def __init__(self, *shape: int, scale: float = 3.0) -> None:
        super().__init__()
        self.kernel = nn.Parameter(scale * torch.randn(*(shape or (6, 4)), dtype=torch.float64))

    def matrix(self) -> Tensor:
        return self.kernel

    def assign(self, weight: Tensor) -> None:
        raise AssertionError("not asked for")


class OtherName(Held):
    pass


class Turned(Held):
    def matrix(self) -> Tensor:
        return self.kernel.T


class Detached(Held):
    def matrix(self) -> Tensor:
        return self.kernel.detach()


class Rows(Held):
    def matrix(self) -> Tensor:
        return self.kernel.chunk(3)[1]


class Columns(Held):
    def matrix(self) -> Tensor:
        return self.kernel[:, 1:3]


class Flattened(Held):
    def __init__(self) -> None:
        super().__init__(6, 2, 3)

    def matrix(self) -> Tensor:
        return self.kernel.flatten(1)


class Inner(Held):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()

    def matrix(self) -> Tensor:
        return self.inner.weight


class Computed(Held):
    def matrix(self) -> Tensor:
        return 0.5 * self.kernel


class Scaled(Computed):
    def assign(self, weight: Tensor) -> None:
        self.kernel.copy_(weight / 0.5)


class Wrong(Computed):
    def assign(self, weight: Tensor) -> None:
        self.kernel.copy_(weight)


class Replaced(Computed):
    def assign(self, weight: Tensor) -> None:
        self.kernel = nn.Parameter(weight)


WRITABLE = [OtherName, Turned, Detached, Rows, Columns, Flattened, Inner, Scaled]


@as_operator.register
def _(layer: Held, input_size=None) -> DenseOperator:
    inverse = isinstance(layer, (Scaled, Wrong, Replaced))
    return DenseOperator(layer.matrix(), assign=layer.assign if inverse else None)


def svd_clip(matrix: Tensor, max_norm: float) -> Tensor:
    """Independent of the library: the nearest matrix inside."""
    u, s, v = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    return u @ torch.diag(s.clamp(max=max_norm)) @ v


@pytest.mark.filterwarnings("ignore:SpectralClip leaves .* free for want of support")
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 2.0])
@pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.__name__)
def test_the_operators_weight_is_what_is_written(kind: type[Held], max_norm: float) -> None:
    """Exactly the nearest matrix inside, in the memory that makes it; nothing else of the layer moves."""
    torch.manual_seed(0)
    layer = kind()
    held, keys = {name: id(p) for name, p in layer.named_parameters()}, list(layer.state_dict())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    nearest = svd_clip(layer.matrix(), max_norm)
    SpectralClip(max_norm).attach(nn.Sequential(nn.Linear(2, 2), layer), torch.optim.SGD(layer.parameters(), lr=0.1))
    torch.testing.assert_close(layer.matrix().detach(), nearest, rtol=0, atol=1e-6 * max_norm)
    assert {name: id(p) for name, p in layer.named_parameters()} == held
    assert list(layer.state_dict()) == keys
    with torch.no_grad():
        view = layer.matrix()
        view.copy_(0 * view)
        if kind in (Rows, Columns):  # what the map does not use
            untouched = layer.kernel != 0
            assert torch.equal(layer.kernel[untouched], before["kernel"][untouched])
            assert int(untouched.sum()) == layer.kernel.numel() - nearest.numel()


@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_a_weight_that_can_only_be_measured_is_refused_before_anything_is_written(max_norm: float) -> None:
    """Also where it is inside now: it may not be later."""
    layer = Computed()
    model = nn.Sequential(nn.Linear(3, 3), layer)
    nn.init.constant_(model[0].weight, 500.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^layer 1: Computed computes the weight.*`assign=`.*or exclude"):
        SpectralClip(max_norm).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"Computed computes the weight"):
        write_(layer, torch.zeros(6, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    SpectralClip(max_norm, exclude="1").attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("kind", [Wrong, Replaced], ids=lambda kind: kind.__name__)
def test_an_inverse_map_that_is_none_is_found_out(kind: type[Held]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), kind())
    nn.init.constant_(model[0].weight, 500.0)
    held = [id(p) for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^layer 1, after step 0: the layer did not take the projected weight"):
        SpectralClip(1.0).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [id(p) for p in model.parameters()] == held
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_expanded_view_cannot_be_written() -> None:
    """Its rows are one row in memory, so no other matrix fits."""

    class Expanded(Held):
        def matrix(self) -> Tensor:
            return self.kernel[:1].expand(6, 4)

    with pytest.raises(ValueError, match="Expanded computes the weight"):
        SpectralClip(1.0).start(Expanded())


@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "transposed"])
def test_a_parametrized_tensor_of_another_name(turned: bool) -> None:
    layer = (Turned if turned else OtherName)()
    parametrizations.weight_norm(layer, "kernel")
    nearest = svd_clip(layer.matrix(), 1.0)
    SpectralClip(1.0).start(layer)
    torch.testing.assert_close(layer.matrix().detach(), nearest, rtol=0, atol=1e-6)
    assert [id(p) for p in leaves(layer)] == [id(p) for p in layer.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 16), lambda: nn.Conv2d(6, 8, 3)], ids=["linear", "conv"])
def test_what_comes_back_rounded_from_an_inverse_map_obeys(make, dtype: torch.dtype) -> None:
    """A norm and a direction in half precision make another weight than was assigned; the stored one must be inside."""
    torch.manual_seed(1)
    layer = parametrizations.weight_norm(make()).to(dtype)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(4)
    unrounded = float(spectral_norm(as_operator(layer).with_weight(projections.clip(as_operator(layer), 1.0)), rtol=1e-6))
    SpectralClip(1.0).start(layer)
    weight = layer.weight.detach().double()
    op = DenseOperator(weight) if weight.ndim == 2 else ConvOperator(weight)
    # the lattice norm by a fine grid, from below
    taps = torch.fft.fft2(weight, s=(48, 48)).permute(2, 3, 0, 1) if weight.ndim == 4 else weight
    assert float(torch.linalg.matrix_norm(taps, 2).max()) <= 1 + 1e-6
    assert float(spectral_norm(op, rtol=1e-6)) <= 1 + 2e-6
    # as near as the dtype allows
    assert float(spectral_norm(op)) >= (0.95 if dtype in (torch.bfloat16, torch.float16) else 1 - 1e-5) * unrounded


def test_a_registered_attention_is_bounded_whole() -> None:
    """The remedy that the message names."""

    class Attention(nn.MultiheadAttention):
        pass

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    layer.self_attn = Attention(16, 2)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.mul_(5)
    as_operator.register(Attention, lambda m, input_size=None: DenseOperator(m.in_proj_weight))
    parameter, nearest = layer.self_attn.in_proj_weight, svd_clip(layer.self_attn.in_proj_weight, 1.0)
    hook = SpectralClip(1.0)
    hook.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    assert layer.self_attn.in_proj_weight is parameter
    torch.testing.assert_close(parameter.detach().double(), nearest, rtol=0, atol=1e-5)
    assert "self_attn" not in hook.skipped


def test_split_parts_of_a_view() -> None:
    torch.manual_seed(0)
    layer = Turned(4, 6)
    parts = [svd_clip(part, 1.0) for part in layer.matrix().chunk(3)]
    SpectralClip(1.0, split={Turned: 3}).start(layer)
    torch.testing.assert_close(layer.matrix().detach(), torch.cat(parts), rtol=0, atol=1e-6)


# -- gains of batch normalization -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("low", "high"), [(-12, -8), (-4, 4), (3, 4.5), (-38, 38)])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1 / 3, 7.0])
def test_gains_obey_as_exact_numbers(dtype: torch.dtype, low: float, high: float, max_norm: float) -> None:
    """`γ² ≤ c² (running_var + ε)` in rational arithmetic, of the numbers as they are stored."""
    generator = torch.Generator().manual_seed(0)

    def random(signed: bool) -> Tensor:
        size = 10 ** torch.empty(64, dtype=torch.float64).uniform_(low, high, generator=generator)
        sign = torch.empty(64).bernoulli_(generator=generator) * 2 - 1 if signed else 1
        top = torch.finfo(dtype).max
        return (size * sign).clamp(-top, top).to(dtype)

    layer = nn.BatchNorm2d(64).to(dtype)
    layer.running_var.copy_(random(signed=False))
    with torch.no_grad():
        layer.weight.copy_(random(signed=True))
    before = layer.weight.detach().clone()
    new = clipped_gain(layer, max_norm)
    new = before if new is None else new
    assert new.dtype == dtype
    for old, gamma, variance in zip(before.tolist(), new.tolist(), layer.running_var.tolist(), strict=True):
        limit = Fraction(max_norm) ** 2 * (Fraction(variance) + Fraction(layer.eps))
        assert Fraction(gamma) ** 2 <= limit
        assert gamma * old >= 0
        if Fraction(old) ** 2 <= limit * (1 - Fraction(1, 10**12)):
            assert gamma == old
        else:  # the next number would be outside
            eps = torch.finfo(dtype)
            up = Fraction(abs(gamma)) * (1 + 2 * Fraction(eps.eps)) + Fraction(eps.smallest_normal) * Fraction(eps.eps)
            assert up**2 >= limit * (1 - Fraction(1, 10**12))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gain_that_is_not_finite_names_the_layer_and_leaves_all(bad: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    nn.init.constant_(model[0].weight, 5.0)
    with torch.no_grad():
        model[1].weight[1] = bad
    with pytest.raises(ValueError, match=r"^layer 1, after step 0: .*NaN or infinity"):
        SpectralClip(1.0, batch_norm="clip").start(model)
    assert bool((model[0].weight == 5).all())
