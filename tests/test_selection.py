"""Which layers are chosen, once each, and the reason for every other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_hooks.selection import select


class Block(nn.Module):
    """Two convolutions and a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.conv2 = nn.Conv2d(2, 2, 1)


class Net(nn.Module):
    """Layers at several depths, supported and not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.embed = nn.Embedding(3, 4)
        self.mirror = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 3)


ALL = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "head"]


def names(model: nn.Module, layers=None, exclude=None) -> list[str]:
    return [target.name for target in select(model, layers, exclude).targets]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ALL),
        ("stem", ["stem"]),
        ("blocks", ALL[1:5]),
        ("blocks.1", ALL[3:5]),
        ("*.conv1", ["blocks.0.conv1", "blocks.1.conv1"]),
        ("blocks.?.conv2", ["blocks.0.conv2", "blocks.1.conv2"]),
        ("blocks.[01].conv2", ["blocks.0.conv2", "blocks.1.conv2"]),
        ("*", ALL),
        (["head", "stem"], ["stem", "head"]),
        (("stem", nn.Linear), ["stem", "head"]),
        (nn.Conv2d, ALL[:5]),
        (nn.modules.conv._ConvNd, ALL[:5]),
        (lambda layer: isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1), ["blocks.0.conv2", "blocks.1.conv2"]),
        (lambda name, layer: name.startswith("blocks.0") and isinstance(layer, nn.Conv2d), ALL[1:3]),
        ([lambda name, layer: name == "head", "*.0.conv1"], ["blocks.0.conv1", "head"]),
    ],
)
def test_layers(layers, expected: list[str]) -> None:
    assert names(Net(), layers) == expected


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("head", ALL[:5]),
        ("blocks", ["stem", "head"]),
        (["blocks.0", nn.Linear], ["stem", *ALL[3:5]]),
        (lambda name, layer: name.endswith("conv1"), ["stem", "blocks.0.conv2", "blocks.1.conv2", "head"]),
    ],
)
def test_exclude(exclude, left: list[str]) -> None:
    chosen = select(Net(), exclude=exclude)
    assert [target.name for target in chosen.targets] == left
    assert all(chosen.skipped[name] == "excluded" for name in ALL if name not in left)


def test_exclude_wins_over_layers() -> None:
    assert names(Net(), layers="blocks", exclude="*.conv2") == ["blocks.0.conv1", "blocks.1.conv1"]


def test_every_layer_with_parameters_is_chosen_or_has_a_reason() -> None:
    model = Net()
    chosen = select(model, layers=["stem", nn.Linear, "embed*", "mirror*"])
    known = {target.name for target in chosen.targets} | set(chosen.skipped)
    assert known == {name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    assert all(chosen.skipped.values())
    assert chosen.skipped["blocks.0.conv1"] == "not among `layers`"


def test_unsupported_layers_are_skipped_with_the_remedy() -> None:
    skipped = select(Net()).skipped
    assert "Embedding" in skipped["embed"]
    assert "reflect padding" in skipped["mirror"]
    assert "input_size" in skipped["mirror"]


@pytest.mark.parametrize("layers", ["embed", "mirror", ["stem", "embed"]])
def test_an_unsupported_layer_named_in_full_is_an_error(layers) -> None:
    with pytest.raises(ValueError, match=r"`layers` names (embed|mirror), but"):
        select(Net(), layers=layers)


@pytest.mark.parametrize("argument", ["layers", "exclude"])
@pytest.mark.parametrize(
    ("typo", "meant"), [("haed", "head"), ("blocks.0.conv", "blocks.0.conv1"), ("block", "blocks"), ("steem", "stem")]
)
def test_a_typo_gets_a_suggestion(argument: str, typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"`{argument}` pattern '{typo}' matches no layer; did you mean .*{meant}"):
        select(Net(), **{argument: typo})


def test_one_bad_pattern_among_good_ones_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'decoder\.\*' matches no layer"):
        select(Net(), layers=["stem", "decoder.*"])


@pytest.mark.parametrize("pattern", [3, 1.0, [None], torch.zeros(1)])
def test_patterns_of_other_types(pattern) -> None:
    with pytest.raises(TypeError):
        select(Net(), layers=pattern)


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no layer to act on is left in Net"):
        select(Net(), exclude="*")
    with pytest.raises(ValueError, match=r"no layer to act on is left in ReLU \(it has no weights\)"):
        select(nn.ReLU())


def test_a_single_layer_is_a_model_too() -> None:
    (target,) = select(nn.Linear(2, 2)).targets
    assert len(target.layers) == 1


def test_frozen_layers_are_chosen() -> None:
    model = Net()
    model.stem.requires_grad_(False)
    assert "stem" in names(model)


# -- tied weights -----------------------------------------------------------------------------------------------------------


def test_the_same_module_twice() -> None:
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0"]


def test_tied_weights_are_chosen_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    chosen = select(model)
    assert [target.name for target in chosen.targets] == ["0", "1"]
    assert chosen.targets[0].layers == [model[0], model[2]]
    assert chosen.skipped == {"2": "shares the weight of 0"}


def test_excluding_one_of_two_tied_layers_still_reaches_the_other() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert names(model, exclude="0") == ["1"]


def test_tied_with_another_geometry_has_an_operator_for_each() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, stride=2))
    model[1].weight = model[0].weight
    (target,) = select(model).targets
    assert [op.stride for op in target.operators()] == [(1, 1), (2, 2)]


def test_gpt2() -> None:
    """Ten unique weights of a two-layer GPT-2: the output layer shares the embedding's, which is no linear map."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=6)
    model = transformers.GPT2LMHeadModel(config)
    chosen = select(model)
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    blocks = [f"transformer.h.{i}.{kind}" for i in range(2) for kind in kinds]
    assert [target.name for target in chosen.targets] == [*blocks, "lm_head"]
    assert chosen.targets[-1].layers[0].weight is model.transformer.wte.weight
    assert "Embedding" in chosen.skipped["transformer.wte"]
    assert "LayerNorm" in chosen.skipped["transformer.ln_f"]


# -- wrappers ---------------------------------------------------------------------------------------------------------------


def test_names_of_compiled_models_are_those_of_the_plain_one() -> None:
    model = Net()
    model.blocks[0] = torch.compile(model.blocks[0])
    assert names(model) == ALL
    assert names(model, layers="blocks.0.conv1") == ["blocks.0.conv1"]
    assert names(torch.compile(Net()), layers="*.conv1") == ["blocks.0.conv1", "blocks.1.conv1"]


def test_data_parallel_is_looked_through() -> None:
    assert names(nn.DataParallel(Net())) == ALL


def test_parametrized_layers_are_chosen_under_their_own_name() -> None:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.head)
    nn.utils.parametrizations.orthogonal(model.stem)
    assert names(model) == ALL


def test_parametrized_without_a_parameter_of_its_own_is_chosen() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False))
    assert names(nn.Sequential(layer)) == ["0"]


def test_timm_layers_that_rewrite_their_weight_are_skipped_by_name() -> None:
    layers = pytest.importorskip("timm.layers")
    chosen = select(nn.Sequential(layers.StdConv2d(2, 2, 3), nn.Linear(2, 2)))
    assert [target.name for target in chosen.targets] == ["1"]
    assert "StdConv2d standardizes" in chosen.skipped["0"]
