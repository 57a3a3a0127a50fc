"""timm: real models of every family, constrained, trained, saved, made plain; norms by an observer of its own."""

from __future__ import annotations

import copy
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import apply_to_identity, traces_copies
from counting import OPTIONS, WRONG
from torch import nn

import spectral_hooks as sh
from spectral_hooks import parametrizations

timm = pytest.importorskip("timm")

from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, StdConv2d  # noqa: E402
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg  # noqa: E402
from timm.models.densenet import DenseNet  # noqa: E402
from timm.models.regnet import RegNet, RegNetCfg  # noqa: E402
from timm.models.resnetv2 import ResNetV2  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.utils import ModelEmaV3, reparameterize_model  # noqa: E402

from spectral_hooks.integrations.timm import apply_spectral, input_sizes, remove_spectral, spectral_report  # noqa: E402
from spectral_hooks.parametrizations.tensor_train import tensor_train  # noqa: E402

TOLERANCE = 1e-6


def create(name: str, **settings: Any) -> nn.Module:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}, the small model of its family")
    return timm.create_model(name, num_classes=4, **settings)


REP_VGG = ByoModelCfg(
    blocks=tuple(ByoBlockCfg(type="rep", d=d, c=c, s=2, br=0.0) for d, c in [(1, 16), (2, 24), (1, 32)]),
    stem_type="rep",
    stem_chs=8,
)

#: The smallest of each family; where timm lets them be cut down, further.
FAMILIES = {
    "resnet": lambda: create("resnet10t", channels=(8, 16, 16, 32), stem_width=8),
    "resnext": lambda: create("resnext50_32x4d", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), cardinality=4, base_width=8),
    "efficientnet": lambda: create("test_efficientnet"),
    "tf_efficientnet": lambda: create("tf_efficientnet_b0"),
    "mobilenetv3": lambda: create("mobilenetv3_small_050"),
    "convnext": lambda: create("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "densenet": lambda: DenseNet(num_classes=4, growth_rate=8, block_config=(2, 2, 2, 2)),
    "regnet": lambda: RegNet(RegNetCfg(depth=5, w0=16, wa=12, wm=1.5, group_size=8, se_ratio=0.25), num_classes=4),
    "vit": lambda: create("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2),
    "swin": lambda: create(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)
    ),
    "nfnet": lambda: create("test_nfnet"),
    "repvgg": lambda: ByobNet(REP_VGG, num_classes=4),
    "coatnet": lambda: create("test_coatnet", img_size=32),
    "mambaout": lambda: create("test_mambaout"),
}


@torch.no_grad()
def stretched(model: nn.Module, norm: float = 2.0) -> nn.Module:
    """The model with every layer outside; many initializations are inside."""
    for _, layer in weighted(model):
        layer.weight.mul_(norm / sampled_norm(layer))
    return model


def made(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return stretched(FAMILIES[family]())


def small(**settings) -> nn.Module:
    torch.manual_seed(0)
    return stretched(create("resnet10t", channels=(8, 16, 16, 32), stem_width=8, **settings))


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


def weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))


@torch.no_grad()
def sampled_norm(layer: nn.Module) -> float:
    """The norm from nothing but its definition, by float64 frequency samples; never above the true one.

    A stride `s` folds `s²` frequencies of the plain convolution onto one: `A A* = 1/s² Σ F F*` over them.
    """
    weight = layer.weight.double()
    if weight.ndim == 2 or weight.shape[2:] == (1, 1):
        matrices = weight.unflatten(0, (getattr(layer, "groups", 1), -1)).flatten(2)
        return float(torch.linalg.matrix_norm(matrices, 2).max())
    (stride, _), largest = layer.stride, 0.0
    points = max(8 // stride, -(-max(layer.kernel_size) // stride) + 1)
    for kernel in weight.unflatten(0, (layer.groups, -1))[:8]:
        symbol = torch.fft.fft2(kernel, s=(points * stride, points * stride)).permute(2, 3, 0, 1)
        folded = sum(
            part @ part.mH
            for i, j in product(range(stride), repeat=2)
            for part in [symbol[i * points : (i + 1) * points, j * points : (j + 1) * points]]
        )
        largest = max(largest, float(torch.linalg.eigvalsh(folded).max() / stride**2) ** 0.5)
    return largest


def norms(model: nn.Module) -> dict[str, float]:
    """Of every layer but the widest 3×3 ones, whose sampling takes too long."""
    return {
        name: sampled_norm(layer) for name, layer in weighted(model) if layer.weight.shape[0] <= 256 or layer.weight.ndim == 2
    }


def train(model: nn.Module, steps: int = 2, learning_rate: float = 0.5, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
        # without it the networks without normalization diverge
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def constrained(model: nn.Module) -> set[str]:
    return {name for name, held in spectral_report(model).items() if held.startswith("Rescaled")}


# -- every family: by construction, through training, to plain weights -------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    model, layers = made(family), dict(weighted(made(family)))
    checkpoint = copy.deepcopy(model.state_dict())
    assert min(norms(model).values()) > 1.9
    assert apply_spectral(model) is model

    # layer by layer: constrained, or left out with the reason
    report = spectral_report(model)
    refused = {name for name, layer in layers.items() if isinstance(layer, (StdConv2d, ScaledStdConv2d))}
    assert bool(refused) == (family == "nfnet")
    assert constrained(model) == set(layers) - refused
    assert all("standardizes its weight" in report[name] for name in refused)
    assert all(any(text in report[name] for text in ("has no operator", "standardizes")) for name in set(report) - set(layers))

    # trained: inside after any optimizer's step
    train(model)
    inside = norms(model)
    assert all(inside[name] <= 1 + TOLERANCE for name in inside.keys() - refused)
    assert all(inside[name] > 0.3 for name in inside.keys() - refused), "scaled, not squashed"
    changed = (p for name, p in model.named_parameters() if name.endswith("weight.original"))
    plain_keys = [name for name in checkpoint if name.removesuffix(".weight") in constrained(model)]
    assert any(not torch.equal(p, checkpoint[name]) for p, name in zip(changed, plain_keys, strict=True))

    # saved, made plain, loaded into a model that has never heard of this
    with torch.no_grad():
        expected = model(IMAGES)
    file, plain = io.BytesIO(), made(family, seed=1)
    torch.save(remove_spectral(copy.deepcopy(model)).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state.keys() == checkpoint.keys()
    plain.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(IMAGES), expected, atol=1e-5, rtol=1e-4)
    assert norms(plain) == pytest.approx(inside, rel=1e-6)

    # the matrix of the layer as it acts, padding and all
    checked = 0
    for layer, size in input_sizes(plain, 32).items():
        shape = (layer.in_channels, *size)
        if type(layer) in (nn.Conv2d, Conv2dSame) and torch.Size(shape).numel() <= 1200 and checked < 6:
            dense = apply_to_identity(copy.deepcopy(layer).double(), shape)
            assert float(torch.linalg.matrix_norm(dense, 2)) <= 1 + TOLERANCE
            checked += 1
    assert checked or family in ("vit", "swin")  # whose one convolution is larger

    # a plain checkpoint goes into the constrained model as it is
    model.load_state_dict(checkpoint)
    assert all(value <= 1 + TOLERANCE for name, value in norms(model).items() if name not in refused)


def test_options_and_names() -> None:
    model = apply_spectral(small(), "rescaled", max_norm=0.5, layers=["layer*.conv1", "fc"], exclude="layer4")
    assert constrained(model) == {f"layer{i}.0.conv1" for i in (1, 2, 3)} | {"fc"}
    assert max(norms(model)[name] for name in constrained(model)) <= 0.5 + TOLERANCE
    loose = apply_spectral(small(), bound=sh.bounds.absolute_sum)
    assert max(norms(loose).values()) < max(norms(apply_spectral(small())).values())


def test_constraints_from_elsewhere() -> None:
    """Any function from a layer to a layer, as torch's own."""
    model = apply_spectral(small(), nn.utils.parametrizations.spectral_norm, layers="layer1.*.conv1", n_power_iterations=3)
    assert nn.utils.parametrize.is_parametrized(model.layer1[0].conv1)


def test_constraints_that_replace_layers() -> None:
    """And that do not take every one: those are left out with the reason; what is made plain again is known by its names."""
    model, keys = small(), list(small().state_dict())
    apply_spectral(model, tensor_train, rank=4, layers="layer*.conv*")
    report = spectral_report(model)
    assert {held for name, held in report.items() if fnmatchcase(name, "layer*.conv?")} == {"TensorTrain"}
    train(model)
    with torch.no_grad():
        expected = model(IMAGES)
        assert torch.allclose(remove_spectral(model)(IMAGES), expected, atol=1e-4, rtol=1e-3)
    assert sorted(model.state_dict()) == sorted(keys)
    layer = nn.Linear(8, 8)
    assert type(apply_spectral(layer, tensor_train, rank=2)) is not nn.Linear


def test_what_a_constraint_does_not_support_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def only_wide(layer: nn.Module, max_norm: float) -> nn.Module:
        if layer.out_channels < 32:
            raise NotImplementedError("too narrow for this")
        return parametrizations.rescaled(layer, max_norm)

    model = apply_spectral(small(), only_wide, max_norm=0.5, exclude="fc")
    assert constrained(model) == {name for name, layer in weighted(small()) if layer.weight.shape[0] == 32}
    assert "too narrow for this" in caplog.text
    with pytest.raises(TypeError, match=r"^conv1\.0: .*max_norm"):
        apply_spectral(small(), only_wide)


def test_names_are_those_of_the_lists() -> None:
    """Every name of the two rooms is known, and but for what takes constraints away or tells of them nothing else."""
    known = {*parametrizations.__all__, *sh.projections.__all__} - {"remove_spectral", "spectral_report"}
    with pytest.raises(ValueError, match="`constraint` must be") as error:
        apply_spectral(small(), "remove_spectral")
    names = re.findall(r"\w+", str(error.value).partition("one of ")[2].partition("; got")[0])
    assert set(names) - {"or", "of", "the", "projections"} == known
    layer = nn.Linear(4, 4)
    for name in sh.projections.__all__:
        apply_spectral(layer, name)
        assert type(layer) is nn.Linear
        assert not nn.utils.parametrize.is_parametrized(layer)
        # as the function itself, and with arguments laid in
        apply_spectral(layer, partial(getattr(sh.projections, name)))
        assert not nn.utils.parametrize.is_parametrized(layer)


def test_functions_of_ones_own() -> None:
    """`constraint` makes a layer of a layer, `projection` a weight of an operator, whatever their parameters are called."""

    def halved(layer: sh.LinearOperator, max_norm: float) -> torch.Tensor:
        return sh.projections.clip(layer, max_norm / 2)

    def added(op: nn.Module) -> nn.Module:
        return parametrizations.rescaled(op, 0.25)

    model = apply_spectral(small(), projection=halved)
    assert 0.45 < max(norms(model).values()) <= 0.5 + TOLERANCE
    assert constrained(model) == set()
    assert 0.1 < max(norms(apply_spectral(small(), added)).values()) <= 0.25 + TOLERANCE
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    apply_spectral(model, projection="clip", every=2, log=True, optimizer=optimizer)
    train(model, optimizer=optimizer)
    assert max(norms(model).values()) <= 1 + TOLERANCE


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_the_hook_reaches_it_under_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, core, option = [], sh.SpectralClip, {name: OPTIONS[name]}

    class Recorded(sh.SpectralClip):
        def start(self, model: nn.Module) -> None:
            made.append(self)

    monkeypatch.setattr(sh.hooks, "SpectralClip", Recorded)
    apply_spectral(nn.Linear(2, 2), *(() if name == "projection" else ("clip",)), **option)
    assert getattr(made[0], name) == getattr(core(**option), name) != getattr(core(), name)


@pytest.mark.parametrize(("option", "error"), [*WRONG, ({"lora": "product2"}, ValueError)])
def test_options_of_the_hook_are_checked(option: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`?{next(iter(option))}"):
        apply_spectral(nn.Linear(2, 2), *(() if "projection" in option else ("clip",)), **option)


def test_what_is_mistaken_for_a_parametrization_is_told() -> None:
    for wrong, message in [
        (lambda op: sh.projections.clip(op, 1.0), "returned a Tensor, and no layer"),
        (lambda op, max_norm: None, "missing 1 required positional argument"),
        (lambda op: op.no_such_thing, "no attribute 'no_such_thing'"),
    ]:
        with pytest.raises(TypeError, match=rf"^conv1\.0: .*{message}.*a projection of your own goes to `projection=`"):
            apply_spectral(small(), wrong)
    with pytest.raises(TypeError, match=r"give one of them; got 'cayley' too"):
        apply_spectral(small(), "cayley", projection="clip")
    with pytest.raises(ValueError, match="`projection` must be a function"):
        apply_spectral(small(), projection="cayley")


@pytest.mark.filterwarnings("ignore:.*want of support.*")
def test_adapters_are_left_to_projections(caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    network = nn.Sequential()
    network.add_module("adapted", nn.Linear(6, 6))
    network.add_module("plain", nn.Linear(6, 6))
    model = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["adapted"]))
    apply_spectral(model)
    assert "adapted: has adapters, whose sum with the weight only a projection constrains" in caplog.text
    assert type(dict(model.named_modules())["base_model.model.adapted"].base_layer) is nn.Linear
    assert spectral_report(model)["base_model.model.plain"].startswith("Rescaled")


# -- projections -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", [sh.projections.clip, "clip"])
def test_projection_now(constraint) -> None:
    model = small()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    apply_spectral(model, constraint, max_norm=0.8, exclude="fc")
    assert max(value for name, value in norms(model).items() if name != "fc") <= 0.8 + TOLERANCE
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (keys, kinds)
    train(model, learning_rate=5.0)
    assert max(norms(model).values()) > 0.8 + TOLERANCE, "once only"


def test_other_projections() -> None:
    scaled, clipped = (
        apply_spectral(small(), sh.projections.rescale),
        apply_spectral(small(), partial(sh.projections.clip, rounds=1)),
    )
    assert max(norms(scaled).values()) <= 1 + TOLERANCE
    assert max(norms(clipped).values()) <= 1 + TOLERANCE
    plain = small().fc.weight
    assert (clipped.fc.weight - plain).norm() < (scaled.fc.weight - plain).norm()


def test_projection_kept_by_the_optimizer() -> None:
    model = small()
    optimizer = create_optimizer_v2(model, opt="lookahead_adamw", lr=0.05)
    apply_spectral(model, sh.projections.clip, optimizer=optimizer)
    train(model, optimizer=optimizer)
    assert max(norms(model).values()) <= 1 + TOLERANCE


# -- geometry and input sizes ------------------------------------------------------------------------------------------------


def test_input_sizes_are_those_of_a_real_forward() -> None:
    """Of images that `pretrained_cfg` knows nothing of."""
    for model, size, shape in [
        (create("resnet10t", in_chans=1), 40, (1, 40, 40)),
        (create("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, depth=1, in_chans=2), None, (2, 48, 48)),
        (create("test_efficientnet", in_chans=5), (24, 36), (5, 24, 36)),
        (create("test_byobnet"), (3, 33, 31), (3, 33, 31)),
    ]:
        assert model.pretrained_cfg["input_size"] != shape
        found, seen = input_sizes(model, size), {}
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_pre_hook(lambda layer, inputs, seen=seen: seen.update({layer: tuple(inputs[0].shape[2:])}))
        model.eval()(torch.randn(1, *shape))
        assert found == seen
        assert all(not p.is_meta for p in model.parameters())


def test_no_size_is_made_up() -> None:
    assert input_sizes(create("resnet10t")) == {}


def reflecting() -> nn.Module:
    model = small()
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False)
    model.layer1[0].conv2 = conv
    with torch.no_grad():
        conv.weight.mul_(30)
    return model


def test_padding_that_repeats_inputs(caplog: pytest.LogCaptureFixture) -> None:
    name = "layer1.0.conv2"
    model = apply_spectral(reflecting())
    assert name not in constrained(model)
    assert "reflect padding" in spectral_report(model)[name]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert name in caplog.text
    caplog.clear()
    model = apply_spectral(reflecting(), input_size=32)
    assert name in constrained(model)
    assert not caplog.records
    conv = remove_spectral(model).layer1[0].conv2
    size = input_sizes(model, 32)[conv]
    assert size == (8, 8)
    dense = apply_to_identity(copy.deepcopy(conv).double(), (8, *size))
    assert 0.3 < float(torch.linalg.matrix_norm(dense, 2)) <= 1 + TOLERANCE
    model = apply_spectral(reflecting(), input_size=32, exclude=name)
    assert name not in constrained(model)


@pytest.mark.parametrize(("size", "stride", "kernel"), [(9, 2, 3), (8, 2, 5), (7, 3, 3), (5, 1, 4)])
def test_same_padding_that_depends_on_the_input(size: int, stride: int, kernel: int) -> None:
    torch.manual_seed(0)
    layer = Conv2dSame(3, 4, kernel, stride=stride, bias=False).double()
    with torch.no_grad():
        layer.weight.mul_(10)
    parametrizations.rescaled(layer)
    assert 0.5 < float(torch.linalg.matrix_norm(apply_to_identity(layer, (3, size, size)), 2)) <= 1 + TOLERANCE


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_layers_that_standardize_their_weight_are_refused(kind: type[nn.Module]) -> None:
    layer = kind(4, 4, 3)
    with pytest.raises(NotImplementedError, match="standardizes its weight in forward"):
        parametrizations.rescaled(layer)
    assert type(layer) is kind


def test_what_is_left_out_is_logged_once_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = ResNetV2(
        layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_chs=8, num_classes=4, conv_layer=StdConv2d, norm_layer=BatchNormAct2d
    )
    with caplog.at_level(logging.INFO, logger="spectral_hooks"):
        apply_spectral(model)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    infos = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert len(warnings) == 1
    assert "stem.conv" in warnings[0]
    assert "StdConv2d standardizes its weight" in warnings[0]
    assert len(infos) == 1
    assert "BatchNormAct2d" in infos[0]
    caplog.clear()
    apply_spectral(small(), exclude="fc")
    assert not caplog.records, "no warning for what the user has asked for"


# -- what timm's scripts do with a model -------------------------------------------------------------------------------------


def test_new_classifier_is_plain_until_asked_again() -> None:
    model = apply_spectral(small())
    train(model)
    held, body = constrained(model), norms(model)
    model.reset_classifier(7)
    assert constrained(model) == held - {"fc"}
    assert spectral_report(model)["fc"] == "none: it is plain"
    with torch.no_grad():
        model.fc.weight.fill_(1)
    apply_spectral(model)
    assert constrained(model) == held
    after = norms(model)
    assert after["fc"] == pytest.approx(1, rel=1e-5)
    assert all(after[name] == pytest.approx(body[name], rel=1e-5) for name in held - {"fc"})


def test_average_of_weights() -> None:
    model = apply_spectral(small())
    ema, optimizer = ModelEmaV3(model, decay=0.5), torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        train(model, 1, optimizer=optimizer)
        ema.update(model)
    assert constrained(ema.module) == constrained(model)
    assert max(norms(ema.module).values()) <= 1 + TOLERANCE
    assert not torch.equal(ema.module.fc.weight, model.fc.weight)
    assert remove_spectral(ema.module).state_dict().keys() == small().state_dict().keys()


def test_average_made_before_breaks_with_an_error() -> None:
    model = small()
    ema = ModelEmaV3(model)
    apply_spectral(model)
    with pytest.raises(RuntimeError):
        ema.update(model)


def test_fused_models_are_to_be_constrained_again() -> None:
    """The sum of constrained branches is a plain convolution, and outside."""
    model = apply_spectral(made("repvgg"))
    train(model)
    assert max(norms(model).values()) <= 1 + TOLERANCE
    with torch.no_grad():
        # batch norm divides by what little the layers let through
        for _ in range(50):
            model.train()(IMAGES)
        model.eval()
        expected = model(IMAGES)
        fused = reparameterize_model(model)
        assert torch.allclose(fused(IMAGES), expected, atol=1e-3, rtol=1e-3)
    assert constrained(fused) == {"head.fc"}
    assert max(norms(fused).values()) > 1.1
    apply_spectral(fused)
    assert max(norms(fused).values()) <= 1 + TOLERANCE


def test_deepcopy_trains_apart() -> None:
    model = apply_spectral(small())
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    train(twin)
    assert max(norms(twin).values()) <= 1 + TOLERANCE
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    twin.load_state_dict(small().state_dict())


def test_optimizer_made_before_goes_on() -> None:
    model = small()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.05)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    apply_spectral(model)
    assert {id(p) for p in model.parameters()} == known
    train(model, optimizer=optimizer)
    assert max(norms(model).values()) <= 1 + TOLERANCE


def test_half_precision_model() -> None:
    model = apply_spectral(small().bfloat16())
    with torch.no_grad():
        assert model(IMAGES.bfloat16()).dtype == torch.bfloat16
    assert max(norms(model).values()) <= 1


def test_compiles_and_exports() -> None:
    torch._dynamo.reset()
    model = apply_spectral(create("resnet10t", channels=(8, 8, 8, 8), stem_width=8)).eval()
    with torch.no_grad():
        expected = model(IMAGES)
        compiled = torch.compile(model, fullgraph=traces_copies(), backend="aot_eager")
        assert torch.allclose(compiled(IMAGES), expected, atol=1e-5)
        exported = torch.export.export(model, (IMAGES,)).module()
        assert torch.allclose(exported(IMAGES), expected, atol=1e-5)
    remove_spectral(compiled)
    assert not constrained(model)
    with torch.no_grad():
        assert torch.allclose(compiled(IMAGES), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constraint", ["rescaled", "clipped", "orthogonal", "skew", "cayley", "conv_norm", "tensor_train"])
def test_trains_under_autocast(constraint, dtype) -> None:
    """timm's scripts train so by default: the convolutions run in half precision, the constraint in full."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model = apply_spectral(model, constraint, **({"rank": 4} if constraint == "tensor_train" else {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(IMAGES).float().square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    # of the others two bound nothing, and two have no weight to measure
    if constraint in ("rescaled", "clipped", "orthogonal"):
        with torch.no_grad():
            assert max(float(sh.spectral_norm(sh.as_operator(layer))) for layer in (model[0], model[2], model[4])) <= 1.002


# -- mistakes --------------------------------------------------------------------------------------------------------------


def test_mistakes() -> None:
    model = small()
    keys = list(model.state_dict())
    with pytest.raises(TypeError, match="`model`"):
        apply_spectral(model.state_dict())
    with pytest.raises(ValueError, match=r"`constraint` must be .*rescaled.*clip.*got 'shrink'"):
        apply_spectral(model, "shrink")
    with pytest.raises(TypeError, match="`optimizer` is for projections"):
        apply_spectral(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="matches no layer"):
        apply_spectral(model, layers="encoder.*")
    with pytest.raises(ValueError, match="`max_norm`"):
        apply_spectral(model, max_norm=-1)
    with pytest.raises(TypeError, match=r"^conv1\.0: .*rounds"):
        apply_spectral(model, rounds=3)
    for size in (-3, (3, 32, 32, 1), "32", (32.0, 32)):
        with pytest.raises(ValueError, match="`input_size` must be"):
            apply_spectral(reflecting(), input_size=size)
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match=r"`layers` names stem.*standardizes"):
        apply_spectral(create("nf_resnet26"), layers="stem.conv")


# -- the example -----------------------------------------------------------------------------------------------------------


def test_example(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = Path(__file__).parents[2] / "examples" / "timm_digits.py"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(script), "--quick"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    rows = {line.split("  ")[0]: line.split()[-5:] for line in done.stdout.splitlines() if "%" in line}
    assert list(rows) == ["plain", "apply_spectral"]
    assert float(rows["plain"][1]) > 1
    assert 0.5 < float(rows["apply_spectral"][1]) <= 1
    assert not list(tmp_path.iterdir())
