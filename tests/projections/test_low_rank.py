"""The update `W + B A` by its factor alone, parts of fused weights, and the targets made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks.projections.low_rank import clip_update
from spectral_hooks.weights.selection import select
from spectral_hooks.weights.targets import Target

#: out, in, rank, size of the update.
CASES = [
    (6, 6, 2, 0.5), (4, 9, 3, 0.5), (9, 4, 3, 0.5), (8, 5, 7, 0.5), (12, 12, 1, 0.02), (12, 12, 4, 30.0),
    (5, 1, 1, 1.0), (1, 5, 1, 1.0),
]  # fmt: skip


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.double(), 2))


def case(out: int, columns: int, rank: int, size: float, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A base on the sphere in several directions, as after a clip, and an update that leads out."""
    generator = torch.Generator().manual_seed(out * columns + rank)
    weight = torch.randn(out, columns, generator=generator, dtype=torch.float64)
    weight = sh.projections.clip(sh.DenseOperator(weight * 2 / norm(weight)), 1.0)
    left = size * torch.randn(out, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return weight.to(dtype), left.to(dtype), right.to(dtype)


def least_distance(weight: Tensor, left: Tensor, right: Tensor, rounds: int = 2000) -> float:
    """No `W + B' A` inside the ball is nearer to `W + B A` than this.

    With `R` a basis of the rows of `A` and any `Λ`, a point `X₀ + Δ R` of the ball has `⟨Λ, X₀⟩ + ⟨Λ Rᵀ, Δ⟩ ≤ ‖Λ‖_nuclear`, so
    `‖Δ‖ ≥ (⟨Λ, X₀⟩ - ‖Λ‖_nuclear) / ‖Λ Rᵀ‖`. The best `Λ` is what alternating projections (Boyle & Dykstra 1986) add up to.
    """
    rows = torch.linalg.svd(right, full_matrices=False).Vh
    merged = weight + left @ right
    rest = merged - merged @ rows.T @ rows
    point, correction, least = merged.clone(), torch.zeros_like(merged), 0.0
    for _ in range(rounds):
        u, s, vh = torch.linalg.svd(point + correction, full_matrices=False)
        inside = u * s.clamp(max=1) @ vh
        correction = point + correction - inside
        point = rest + inside @ rows.T @ rows
        nuclear = float((s - 1).clamp(min=0).sum())
        least = max(least, (float((correction * merged).sum()) - nuclear) / float((correction @ rows.T).norm()))
    return least


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_the_sum_is_inside_as_stored_and_stays_as_it_is(shape, dtype) -> None:
    weight, left, right = case(*shape, dtype=dtype)
    if dtype == torch.bfloat16:
        weight = weight * 0.98  # rounding has taken the base out
    new = clip_update(weight, left, right)
    assert new.dtype == dtype
    assert new.shape == left.shape
    assert norm(weight.double() + new.double() @ right.double()) <= 1 + 2e-6
    assert clip_update(weight, new, right) is new


@pytest.mark.parametrize("shape", CASES[:6], ids=str)
def test_it_is_the_nearest_and_leaves_an_update(shape) -> None:
    """Although the base touches the bound, where an update that is only scaled would vanish."""
    weight, left, right = case(*shape)
    new = clip_update(weight, left, right)
    assert float(((new - left) @ right).norm()) <= least_distance(weight, left, right) * (1 + 1e-3)
    assert norm(new @ right) > 0.2 * min(1, norm(left @ right))


@pytest.mark.parametrize("power", [-700, -300, 300, 700])
def test_it_scales_with_the_bound(power: int) -> None:
    """Bit for bit, although squares of the bound leave the range of float64."""
    weight, left, right = case(*CASES[0])
    scale = 2.0**power
    assert torch.equal(clip_update(weight * scale, left * scale, right, scale) / scale, clip_update(weight, left, right))


def test_without_a_base_it_clips_the_singular_values_of_the_product() -> None:
    _, left, right = case(9, 6, 3, 1.0)
    new = clip_update(torch.zeros(9, 6, dtype=torch.float64), left, right, max_norm=0.7)
    u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
    torch.testing.assert_close(new @ right, u * s.clamp(max=0.7) @ vh, rtol=0, atol=1e-6)


def test_what_is_inside_comes_back_itself() -> None:
    weight, left, right = case(6, 6, 2, 0.5)
    small = 0.01 * left
    assert clip_update(0.1 * weight, small, right) is small


def test_dependent_rows_and_zero_factors() -> None:
    weight, left, right = case(6, 6, 2, 0.5)
    doubled = torch.cat([right, right[:1]])
    new = clip_update(weight, torch.cat([left, left[:, :1]], dim=1), doubled)
    assert norm(weight + new @ doubled) <= 1 + 2e-6
    zero = torch.zeros_like(left)
    assert clip_update(weight, zero, right) is zero
    assert clip_update(weight, left, torch.zeros_like(right)) is left


def test_mistakes() -> None:
    weight, left, right = case(6, 6, 2, 0.5)
    with pytest.raises(ValueError, match="`weight` alone must have norm at most"):
        clip_update(3 * weight, left, right)
    with pytest.raises(ValueError, match=r"must have shapes \(out, in\).*got \(6, 6\), \(2, 6\)"):
        clip_update(weight, left.T, right)
    with pytest.raises(ValueError, match="NaN"):
        clip_update(weight, left * float("nan"), right)
    with pytest.raises(ValueError, match="`max_norm` must be a positive"):
        clip_update(weight, left, right, -1.0)


# -- parts of fused weights -------------------------------------------------------------------------------------------------


def test_parts_are_targets_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    chosen = select(model, split={"0": (1, 2, 3)})
    assert [target.name for target in chosen.targets] == ["0[0:1]", "0[1:3]", "0[3:6]", "2"]
    shapes = [target.operators()[0].out_shape for target in chosen.targets]
    assert shapes == [(1,), (2,), (3,), (2,)]
    before = model[0].weight.detach().clone()
    chosen.targets[1].write_(torch.zeros(2, 4))
    assert bool((model[0].weight[1:3] == 0).all())
    assert torch.equal(model[0].weight[[0, 3, 4, 5]], before[[0, 3, 4, 5]])


def test_a_part_of_a_parametrized_and_of_a_pruned_layer() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    rest = layer.weight[2:].detach().clone()
    Target("part", [layer], slice(0, 2)).write_(torch.ones(2, 4))
    torch.testing.assert_close(layer.weight[:2].detach(), torch.ones(2, 4))
    torch.testing.assert_close(layer.weight[2:].detach(), rest)

    pruned = nn.utils.prune.l1_unstructured(nn.Linear(4, 6), "weight", amount=12)
    target = Target("part", [pruned], slice(0, 3))
    assert torch.equal(target.mask(), pruned.weight_mask[:3])
    target.write_(torch.ones(3, 4))
    assert torch.equal(sh.as_operator(pruned).weight[:3].detach(), pruned.weight_mask[:3])


@pytest.mark.parametrize(
    ("split", "error", "message"),
    [
        ({"0": 4}, ValueError, "`split` of 0 must be a divisor of its 6 outputs"),
        ({"0": (3, 4)}, ValueError, "sizes that sum to them"),
        ({"0": (0, 6)}, ValueError, "sizes that sum to them"),
        ({"qkv": 3}, ValueError, "`split` pattern 'qkv' matches no layer"),
        ({nn.Conv2d: 2}, ValueError, "`split` is for linear layers; 1 is a Conv2d"),
        (3, TypeError, "`split` must map patterns to parts"),
    ],
)
def test_split_mistakes(split, error, message) -> None:
    with pytest.raises(error, match=message):
        select(nn.Sequential(nn.Linear(4, 6), nn.Conv2d(2, 2, 3)), split=split)


def test_lora_mistakes() -> None:
    with pytest.raises(ValueError, match="`lora` must be one of 'merged', 'product'; got 'factors'"):
        select(nn.Linear(2, 2), lora="factors")


# -- LoRA layers ------------------------------------------------------------------------------------------------------------


def adapted(**settings) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(2, 2, 3))
    model = peft.get_peft_model(layer, peft.LoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": ["0"]} | settings)))
    for part in model.modules():
        for b in getattr(part, "lora_B", {}).values():
            nn.init.normal_(b.weight)
    return model


def test_a_lora_layer_is_measured_by_its_merged_weight() -> None:
    model = adapted(use_rslora=True)
    layer = model.base_model.model[0]
    measured = sh.as_operator(layer).weight
    x = torch.randn(5, 6)
    torch.testing.assert_close(x @ measured.T + layer.base_layer.bias, layer(x))
    model.zero_grad()
    sh.spectral_norm(sh.as_operator(layer)).backward()
    assert layer.lora_B["default"].weight.grad is not None
    layer.merge()
    torch.testing.assert_close(sh.as_operator(layer).weight, measured)
    layer.unmerge()
    with model.disable_adapter():
        assert sh.as_operator(layer).weight is layer.base_layer.weight


def test_two_active_adapters_are_bounded_together() -> None:
    peft = pytest.importorskip("peft")
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=1, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["second"].weight)
    x = torch.randn(5, 6)
    torch.testing.assert_close(x @ sh.as_operator(layer).weight.T + layer.base_layer.bias, layer(x))
    (target,) = [target for target in select(model, layers="*.0").targets if target.name.endswith(".0")]
    change = target.gathered().inside(lambda op, max_norm: op.weight, 1.0)
    assert change is not None
    target.write_(change)
    assert norm(sh.as_operator(layer).weight.detach()) <= 1 + 2e-6


def test_lora_on_a_convolution_is_skipped_with_the_remedy() -> None:
    model = adapted(target_modules=["0", "1"])
    chosen = select(model)
    (reason,) = [why for name, why in chosen.skipped.items() if name.endswith(".1")]
    assert "no plain LoRA on a linear layer" in reason
    assert [target.name.rsplit(".", 1)[1] for target in chosen.targets] == ["0"]


def test_product_without_an_active_adapter_is_skipped() -> None:
    model = adapted()
    with model.disable_adapter(), pytest.raises(ValueError, match="no LoRA adapter is active"):
        select(model, layers="base_model.model.0", lora="product")
