"""parametrizations.group_shuffle: orthogonal weights, and fine-tuning by rotations that keep the singular values."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from cases import apply_to_identity
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.parametrizations import remove_spectral, shuffles, spectral_report
from spectral_hooks.parametrizations.group_shuffle import GroupShuffle, Rotated, group_shuffle
from spectral_hooks.parametrizations.stiefel import householder

#: Channels and blocks: more, as many and fewer entries than blocks, with and without a common divisor.
SIZES = [(12, 2), (12, 3), (16, 4), (20, 4), (15, 3), (10, 2), (30, 5), (6, 1)]

#: Every kind of layer to be fine-tuned, with the shape of an input; 4 divides all channels.
LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), (8,)),
    "3×3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (8, 6, 5)),
    "strided": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), (8, 7, 6)),
    "reflect": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect", bias=False), (8, 6, 5)),
    "grouped": (lambda: nn.Conv2d(16, 32, 3, groups=2), (16, 5, 4)),
    "sequence": (lambda: nn.Conv1d(8, 12, 5, stride=3), (8, 11)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2), (8, 3, 4)),
    "transposed groups": (lambda: nn.ConvTranspose1d(16, 32, 4, stride=2, groups=2), (16, 5)),
}


def randomize(*tensors: Tensor | None, scale: float = 0.5) -> None:
    with torch.no_grad():
        for tensor in tensors:
            if tensor is not None:
                tensor.normal_().mul_(scale)


def parts(layer: nn.Module) -> tuple[Rotated, nn.Parameter]:
    held = layer.parametrizations.weight
    return held[0], held.original


def rotations(free: Tensor) -> Tensor:
    """The Cayley transforms of lower triangles, by inverses, in float64; `(2, blocks, b, b)` for one group."""
    free = free.detach().double()
    size = next(b for b in range(1, 99) if b * (b - 1) // 2 == free.shape[-1])
    rows, columns = torch.tril_indices(size, size, -1)
    skew = torch.zeros(*free.shape[:-1], size, size, dtype=torch.float64)
    skew[..., rows, columns] = free / 4
    skew = skew - skew.mT
    eye = torch.eye(size, dtype=torch.float64)
    return torch.linalg.inv(eye - skew) @ (eye + skew)


def dense(sides: Tensor) -> Tensor:
    """`Pᵀ L P R` by its definition, with explicit permutations, from blocks `(2, blocks, b, b)`."""
    left, right = (torch.block_diag(*side) for side in sides.detach())
    blocks, size = sides.shape[1:3]
    shuffle = torch.zeros_like(left)
    for block in range(blocks):
        for place in range(size):
            shuffle[place * blocks + block, block * size + place] = 1
    return shuffle.T @ left @ shuffle @ right


def grouped(weight: Tensor, layer: nn.Module) -> Tensor:
    """`(groups, outputs, inputs, taps)`."""
    weight = weight.detach().double().unflatten(0, (getattr(layer, "groups", 1), -1))
    weight = weight.transpose(1, 2) if getattr(layer, "transposed", False) else weight
    return weight.reshape(*weight.shape[:3], -1)


def fine_tuned(name: str, two_sided: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer, the same with random rotations, and a batch."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    tuned = group_shuffle(copy.deepcopy(layer), blocks=4, fine_tune=True, two_sided=two_sided)
    rotated, _ = parts(tuned)
    randomize(rotated.outer, rotated.inner)
    return layer, tuned, torch.randn(3, *shape, dtype=dtype)


# -- the matrix ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "blocks"), SIZES)
def test_it_is_what_the_equation_says(n: int, blocks: int) -> None:
    torch.manual_seed(0)
    layer = group_shuffle(nn.Linear(n, n).double(), blocks=blocks)
    _, free = parts(layer)
    randomize(free)
    q = layer.weight.detach()
    torch.testing.assert_close(q, dense(householder(free[:, 0])), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.T @ q, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    # every output depends on every input
    assert bool((q != 0).all())
    tuned = group_shuffle(nn.Linear(3, n).double(), blocks=blocks, fine_tune=True)
    rotated, weight = parts(tuned)
    assert rotated.outer.numel() == n * (n // blocks - 1)
    randomize(rotated.outer)
    torch.testing.assert_close(tuned.weight, dense(rotations(rotated.outer[:, 0])) @ weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "blocks"), SIZES)
def test_assigned_weights_of_this_form_come_back(n: int, blocks: int) -> None:
    torch.manual_seed(0)
    layer = group_shuffle(nn.Linear(n, n).double(), blocks=blocks)
    for _ in range(5):
        randomize(parts(layer)[1], scale=1.0)
        q = layer.weight.detach().clone()
        layer.weight = q
        torch.testing.assert_close(layer.weight, q, rtol=0, atol=1e-10)


def test_the_start() -> None:
    """The identity stays, bit for bit; a weight that is not of this form becomes a near one."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    nn.init.eye_(layer.weight)
    assert torch.equal(group_shuffle(layer, blocks=4).weight, torch.eye(16))
    layer = nn.Linear(64, 64)
    before = layer.weight.detach().clone()
    distance = float((group_shuffle(layer, blocks=8).weight - before).norm().detach())
    assert distance < 0.85 * float((nn.init.orthogonal_(torch.empty(64, 64)) - before).norm())
    # reflections and rotations by π, of one entry in each of four blocks
    for signs in (torch.tensor([-1.0] + [1.0] * 15), torch.tensor([-1.0] * 4 + [1.0] * 12)):
        layer = nn.Linear(16, 16)
        layer.weight.data = torch.diag(signs)
        torch.testing.assert_close(group_shuffle(layer, blocks=4).weight, torch.diag(signs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(16, 16, 1), lambda: nn.Conv1d(32, 32, 1, groups=2)], ids=["1×1", "groups"])
def test_convolutions_of_a_single_tap(make: object) -> None:
    torch.manual_seed(0)
    layer = group_shuffle(make().double(), blocks=4)
    randomize(parts(layer)[1])
    size = (3, 2)[: layer.weight.ndim - 2]
    matrix = apply_to_identity(layer, (layer.in_channels, *size))
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=1e-12)


def test_orthogonal_after_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(group_shuffle(nn.Linear(64, 64), blocks=8), nn.Tanh(), group_shuffle(nn.Linear(64, 64), blocks=4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = torch.randn(32, 64), torch.randn(32, 64) / 2
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for layer in (model[0], model[2]):
        weight = layer.weight.detach().double()
        assert float((weight @ weight.T - torch.eye(64)).abs().max()) < 5e-6
    # far away too
    randomize(parts(model[0])[1], scale=100)
    weight = model[0].weight.detach().double()
    assert float((weight @ weight.T - torch.eye(64)).abs().max()) < 5e-6


def test_gradients() -> None:
    torch.manual_seed(0)
    free = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    layer = GroupShuffle(2, 1, False, (8, 8))
    assert torch.autograd.gradcheck(layer, free)
    uneven = torch.randn(2, 1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GroupShuffle(2, 1, False, (6, 6)), uneven)
    rotated = Rotated(2, 1, False, (8, 4, 3), two_sided=True).double()
    weight = torch.randn(8, 4, 3, dtype=torch.float64, requires_grad=True)
    outer, inner = (torch.randn_like(p).requires_grad_() for p in (rotated.outer, rotated.inner))

    def turned(weight: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
        return torch.func.functional_call(rotated, {"outer": outer, "inner": inner}, (weight,))

    assert torch.autograd.gradcheck(turned, (weight, outer, inner))
    batch = torch.randn(3, *free.shape, dtype=torch.float64)
    together = torch.func.vmap(layer)(batch)
    torch.testing.assert_close(together, torch.stack([layer(one) for one in batch]))


@pytest.mark.parametrize("size", [(1, 2, 4), (2, 4, 4), (3, 1, 5)], ids=str)
def test_the_derivative_by_hand(size: tuple[int, int, int]) -> None:
    """That of the composed map, a second time and forward too; in float32 as near the truth."""
    groups, k, b = size
    torch.manual_seed(0)
    free = torch.randn(2, groups, k, b, b, dtype=torch.float64, requires_grad=True)
    layer = GroupShuffle(k, groups, False, (groups * k * b, k * b))
    assert shuffles._is_fused(free)
    composed = shuffles._composed(free).flatten(0, 1)
    assert torch.equal(layer(free), composed)
    weights = torch.randn_like(composed)
    (ours,) = torch.autograd.grad((layer(free) * weights).sum(), free)
    (theirs,) = torch.autograd.grad((composed * weights).sum(), free)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert torch.autograd.gradgradcheck(layer, free, fast_mode=True)
    push = torch.randn_like(free)
    _, tangent = torch.func.jvp(layer, (free.detach(),), (push,))
    torch.testing.assert_close((tangent * weights).sum(), (ours * push).sum(), rtol=0, atol=1e-10)
    single = free.detach().float().requires_grad_()
    (rounded,) = torch.autograd.grad((layer(single) * weights.float()).sum(), single)
    torch.testing.assert_close(rounded.double(), ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


# -- fine-tuning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_fine_tuning_starts_at_the_weight_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name][0]().to(dtype)
    weight = layer.weight
    before = weight.detach().clone()
    assert group_shuffle(layer, blocks=4, fine_tune=True, two_sided=True) is layer
    rotated, original = parts(layer)
    assert original is weight
    assert torch.equal(layer.weight, before)
    assert torch.equal(original, before)
    assert {key for key, p in layer.named_parameters() if p.requires_grad} - {"bias"} == {
        "parametrizations.weight.0.outer",
        "parametrizations.weight.0.inner",
    }
    assert {p.dtype for p in rotated.parameters()} == {dtype}
    plain = remove_spectral(layer)
    assert plain.weight is weight
    assert torch.equal(plain.weight, before)
    assert plain.weight.is_contiguous()


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_fine_tuning_rotates_and_keeps_the_singular_values(name: str, two_sided: bool) -> None:
    layer, tuned, x = fine_tuned(name, two_sided)
    rotated, _ = parts(tuned)
    before, after = grouped(layer.weight, layer), grouped(tuned.weight, layer)
    assert not torch.allclose(before, after, atol=0.01)
    for g in range(len(before)):
        expected = torch.einsum("po,oit->pit", dense(rotations(rotated.outer[:, g])), before[g])
        if two_sided:
            expected = torch.einsum("pit,ij->pjt", expected, dense(rotations(rotated.inner[:, g])))
        torch.testing.assert_close(after[g], expected, rtol=0, atol=1e-12)
    shape = tuple(x.shape[1:])
    values = [torch.linalg.svdvals(apply_to_identity(one, shape)) for one in (layer, tuned)]
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_merged_is_unmerged(name: str) -> None:
    """In float32: the rotated outputs of the plain layer, the layer as it trains, and the layer after merging."""
    layer, tuned, x = fine_tuned(name, dtype=torch.float32)
    y = tuned(x)
    weight = tuned.weight.detach().clone()
    rotated, _ = parts(tuned)
    bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (x.ndim - 2))
    turn = torch.block_diag(*(dense(rotations(rotated.outer[:, g])) for g in range(rotated.groups))).float()
    outputs = (turn @ (layer(x) - bias).flatten(2)).reshape(y.shape) if x.ndim > 2 else (layer(x) - bias) @ turn.T
    torch.testing.assert_close(outputs + bias, y, rtol=0, atol=1e-5)
    merged = remove_spectral(tuned)
    assert type(merged) is type(layer)
    assert torch.equal(merged.weight, weight)
    torch.testing.assert_close(merged(x), y, rtol=0, atol=0)
    assert set(merged.state_dict()) == set(layer.state_dict())


def test_transformers_conv1d() -> None:
    Conv1D = pytest.importorskip("transformers").pytorch_utils.Conv1D
    torch.manual_seed(0)
    layer = Conv1D(12, 8).double()
    before, x = layer.weight.detach().clone(), torch.randn(3, 8, dtype=torch.float64)
    plain = layer(x).detach() - layer.bias
    group_shuffle(layer, blocks=4, fine_tune=True, two_sided=True)
    assert torch.equal(layer.weight, before)
    rotated, _ = parts(layer)
    randomize(rotated.outer)
    torch.testing.assert_close(layer(x) - layer.bias, plain @ dense(rotations(rotated.outer[:, 0])).T, rtol=0, atol=1e-12)
    randomize(rotated.inner)
    expected = dense(rotations(rotated.outer[:, 0])) @ before.T @ dense(rotations(rotated.inner[:, 0]))
    torch.testing.assert_close(layer.weight, expected.T, rtol=0, atol=1e-12)
    y = layer(x)
    merged = remove_spectral(layer)
    assert type(merged) is Conv1D
    assert merged.weight.is_contiguous()
    assert torch.equal(merged(x), y)
    square = group_shuffle(Conv1D(16, 16).double(), blocks=4)
    randomize(parts(square)[1])
    torch.testing.assert_close(square.weight.T, dense(householder(parts(square)[1][:, 0])), rtol=0, atol=1e-12)


def test_fine_tuning_trains_the_rotation_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8))
    values = [torch.linalg.svdvals(layer.weight.detach().flatten(1)) for layer in (model[0], model[3])]
    for layer in (model[0], model[3]):
        group_shuffle(layer, blocks=4, fine_tune=True)
    frozen = [parts(layer)[1].detach().clone() for layer in (model[0], model[3])]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = torch.randn(16, 4, 4, 4), torch.randn(16, 8) / 4
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert parts(model[0])[1].grad is None
    y = model(x)
    for layer, weight in zip((model[0], model[3]), frozen, strict=True):
        assert torch.equal(parts(layer)[1], weight)
        assert not torch.allclose(layer.weight, weight, atol=1e-3)
    merged = remove_spectral(model)
    torch.testing.assert_close(merged(x), y, rtol=0, atol=0)
    for layer, before in zip((merged[0], merged[3]), values, strict=True):
        torch.testing.assert_close(torch.linalg.svdvals(layer.weight.detach().flatten(1)), before, rtol=0, atol=1e-5)


def test_clipping_a_fine_tuned_layer() -> None:
    """The frozen weight takes the clip; the rotation stays."""
    layer, tuned, _ = fine_tuned("linear", dtype=torch.float32)
    rotation = parts(tuned)[0].outer.detach().clone()
    model = nn.Sequential(tuned)
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) > 0.5
    with sh.SpectralClip(0.5).attach(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        assert float(torch.linalg.matrix_norm(tuned.weight.detach(), 2)) <= 0.5 * (1 + 1e-6)
    assert torch.equal(parts(tuned)[0].outer, rotation)
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    expected = dense(rotations(rotation[:, 0])).float() @ (u * s.clamp(max=0.5)) @ vh
    torch.testing.assert_close(tuned.weight, expected, rtol=0, atol=1e-5)


# -- in a model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fine_tune", [False, True])
def test_checkpoints_and_copies(fine_tune: bool) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        return nn.Sequential(group_shuffle(nn.Linear(16, 16), blocks=4, fine_tune=fine_tune))

    model, other, x = make(), make(), torch.randn(3, 16)
    randomize(*(p for p in model.parameters() if p.requires_grad))
    assert not list(model.buffers())
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), y)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    # the baked one is a plain checkpoint, and loads into a fresh one
    plain = remove_spectral(copy.deepcopy(model)).state_dict()
    assert set(plain) == {"0.weight", "0.bias"}
    fresh = make()
    if fine_tune:
        fresh.load_state_dict(plain)
        assert torch.equal(fresh[0].weight, plain["0.weight"])
    else:
        fresh.load_state_dict(plain)
        torch.testing.assert_close(fresh[0].weight, plain["0.weight"], rtol=0, atol=1e-5)


def test_compiled_autocast_and_half_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    for fine_tune in (False, True):
        layer = group_shuffle(nn.Linear(16, 16), blocks=4, fine_tune=fine_tune)
        learned = [p for p in layer.parametrizations.parameters() if p.requires_grad]
        randomize(*learned)
        y = layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), y)
        grads = torch.autograd.grad(y.square().sum(), learned)
        for ours, theirs in zip(grads, torch.autograd.grad(compiled(x).square().sum(), learned), strict=True):
            torch.testing.assert_close(theirs, ours)
        weight = layer.weight.detach()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.weight, weight)
            assert layer(x).dtype == torch.bfloat16
            inside = layer.weight.square().cumsum(0).sum()
        outside = layer.weight.square().cumsum(0).sum()
        for ours, theirs in zip(
            torch.autograd.grad(inside, learned),
            torch.autograd.grad(outside, learned),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
        half = copy.deepcopy(layer).bfloat16()
        assert half.weight.dtype == torch.bfloat16
        # no worse than the rounding of its entries
        exact = copy.deepcopy(half).float().weight
        torch.testing.assert_close(half.weight, exact.bfloat16(), rtol=0, atol=0)


def test_forward_changes_no_state() -> None:
    layer = group_shuffle(nn.Linear(16, 16), blocks=4)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 16)
    assert torch.equal(layer(x), layer.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_again_and_reported() -> None:
    """What the layer has become is where the next one starts."""
    _, tuned, _ = fine_tuned("3×3", dtype=torch.float32)
    weight = tuned.weight.detach().clone()
    group_shuffle(tuned, blocks=2, fine_tune=True)
    assert torch.equal(tuned.weight, weight)
    assert len(tuned.parametrizations.weight) == 1
    assert spectral_report(nn.Sequential(tuned)) == {"0": "Rotated(blocks=2, two_sided=False)"}
    assert spectral_report(nn.Sequential(group_shuffle(nn.Linear(4, 4), blocks=2))) == {
        "0": "GroupShuffle(max_norm=1.0, blocks=2)"
    }


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, -1, 5, 12, 2.0, True, None, "4"])
def test_bad_blocks(blocks: object) -> None:
    with pytest.raises(ValueError, match=r"`blocks` must be an int that divides the 12 output channels.*got"):
        group_shuffle(nn.Linear(12, 12), blocks=blocks, fine_tune=True)


def test_layers_that_are_refused() -> None:
    with pytest.raises(ValueError, match="square root of the 16 channels"):
        group_shuffle(nn.Linear(16, 16), blocks=8)
    with pytest.raises(ValueError, match="divides the 9 input channels"):
        group_shuffle(nn.Linear(9, 8), blocks=4, fine_tune=True, two_sided=True)
    with pytest.raises(ValueError, match="`two_sided` is for `fine_tune=True`"):
        group_shuffle(nn.Linear(16, 16), blocks=4, two_sided=True)
    with pytest.raises(ValueError, match=r"a convolution or have a square matrix.*got 16 x 12"):
        group_shuffle(nn.Linear(12, 16), blocks=4)
    with pytest.raises(TypeError, match="has no operator"):
        group_shuffle(nn.BatchNorm2d(16), blocks=4)
    with pytest.raises(ValueError, match="none of this package"):
        group_shuffle(nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)), blocks=4)
    layer = nn.Linear(16, 16)
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        group_shuffle(layer, blocks=4)
