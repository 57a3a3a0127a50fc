"""Which layers are chosen, once each, and the reason for every other."""

from __future__ import annotations

import copy
import warnings

import observers
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import spectral_hooks as sh
from spectral_hooks import DenseOperator, as_operator
from spectral_hooks.weights.selection import select


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


# -- every parameter is constrained or has a reason -------------------------------------------------------------------------


class Raw(nn.Module):
    """Parameters of its own, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 5))
        self.bias = nn.Parameter(torch.zeros(5))
        self.proj = nn.Linear(5, 5)


class Twofold(nn.Module):
    """Its operator is made of one of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.randn(4, 4))
        self.other = nn.Parameter(torch.randn(40, 4))


as_operator.register(Twofold, lambda layer, input_size=None: DenseOperator(layer.used))


def tied_embedding() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "mid": nn.Linear(5, 5), "head": nn.Linear(5, 7)})
    model["head"].weight = model["embed"].weight
    return model


def frozen_backbone() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 2))
    model[:2].requires_grad_(False)
    return model


MODELS = {
    "net": Net,
    "recurrent": lambda: nn.ModuleDict({"rnn": nn.LSTM(8, 16), "gru": nn.GRUCell(4, 4), "head": nn.Linear(16, 2)}),
    "attention": lambda: nn.TransformerEncoderLayer(16, 2, 32),
    "bilinear": lambda: nn.ModuleDict({"pair": nn.Bilinear(3, 4, 5), "head": nn.Linear(5, 2)}),
    "raw": Raw,
    "twofold": lambda: nn.Sequential(Twofold(), nn.Linear(4, 4)),
    "tied embedding": tied_embedding,
    "frozen": frozen_backbone,
    "weight norm of an embedding": lambda: nn.Sequential(parametrizations.weight_norm(nn.Embedding(5, 4)), nn.Linear(4, 4)),
    "empty": lambda: nn.Sequential(nn.Linear(0, 5), nn.Linear(5, 5), nn.Linear(5, 0)),
    "complex": lambda: nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64), nn.Linear(3, 3)),
}


def as_target(layer: nn.Module, exclude) -> bool:
    """Whether there is something to bound."""
    excluded = isinstance(layer, exclude) if isinstance(exclude, type) else exclude is not None and exclude(layer)
    kinds = (nn.Linear, nn.Conv2d, Twofold)
    return isinstance(layer, kinds) and not excluded and all(p.numel() and p.is_floating_point() for p in layer.parameters())


def true_norm(layer: nn.Module) -> float:
    """A norm that is no upper bound, as `spectral_norm` of a convolution is, by up to its `rtol`."""
    if isinstance(layer, nn.Conv2d):
        return float(max(observers.group_norms(layer)))
    return float(torch.linalg.matrix_norm(as_operator(layer).weight.detach().double(), 2))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("exclude", [None, nn.Linear, nn.LSTM, lambda layer: isinstance(layer, (nn.Embedding, nn.BatchNorm2d))])
def test_every_parameter_of_two_or_more_dimensions_is_constrained_or_listed(name: str, exclude) -> None:
    model = MODELS[name]()
    hook, optimizer = sh.SpectralClip(1.0, exclude=exclude), torch.optim.SGD(model.parameters(), lr=0.1)
    if not any(as_target(layer, exclude) for layer in model.modules()):
        with pytest.raises(ValueError, match="no layer to act on is left"):
            hook.attach(model, optimizer)
        return
    hook.attach(model, optimizer)
    assert all(hook.skipped.values())
    for parameter, value in model.named_parameters(remove_duplicate=False):
        layer = parameter.rpartition(".")[0].split(".parametrizations")[0]
        if value.ndim < 2 or layer in hook.skipped or parameter in hook.skipped:
            continue
        assert true_norm(model.get_submodule(layer)) <= 1 + 1e-6
    report = hook.report()
    assert all(each in report for each in hook.skipped)
    assert all(report.count(reason) >= 1 for reason in set(hook.skipped.values()))


@pytest.mark.parametrize(
    ("make", "exclude", "free"),
    [
        (lambda: nn.ModuleDict({"rnn": nn.LSTM(8, 16), "head": nn.Linear(16, 2)}), None, {"rnn": 64 * 24}),
        (lambda: nn.ModuleDict({"rnn": nn.LSTM(8, 16), "head": nn.Linear(16, 2)}), "rnn", {}),
        (lambda: nn.ModuleDict({"rnn": nn.LSTM(8, 16), "head": nn.Linear(16, 2)}), "head", None),
        (lambda: nn.ModuleDict({"embed": nn.Embedding(1000, 4), "head": nn.Linear(4, 4)}), None, {}),
        (lambda: nn.ModuleDict({"rnn": nn.GRU(1, 1), "head": nn.Linear(40, 40)}), None, {}),  # less than a tenth
        (tied_embedding, None, {}),
        (Raw, None, {"": 25}),
        (lambda: nn.Sequential(Twofold()), None, {"0.other": 160}),
        (frozen_backbone, None, {}),  # what is frozen cannot leave
        (lambda: nn.ModuleDict({"norm": nn.LayerNorm(8), "head": nn.Linear(8, 8)}), None, {}),
    ],
)
def test_one_warning_when_more_than_a_tenth_is_free_for_want_of_support(make, exclude, free) -> None:
    model = make()
    if free is None:
        with pytest.raises(ValueError, match="no layer to act on"):
            sh.SpectralClip(1.0, exclude=exclude).start(model)
        return
    hook = sh.SpectralClip(1.0, exclude=exclude)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hook.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    messages = [str(each.message) for each in caught if "free for want of support" in str(each.message)]
    assert len(messages) == bool(free)
    if free:
        constrained = sum(target.operators()[0].weight.numel() for target in select(model).targets)
        share = sum(free.values()) / (sum(free.values()) + constrained)
        assert f"leaves {share:.0%} of the weights" in messages[0]
        assert all((name or "the model itself") in messages[0] for name in free)
        assert "hook.report()" in messages[0]
        (warning,) = [each for each in caught if "free for want" in str(each.message)]
        assert warning.filename == __file__


def test_the_report_gives_each_reason_once() -> None:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.LayerNorm(4))), nn.LSTM(4, 4))
    hook = sh.SpectralClip(2.5, exclude="0")
    with pytest.warns(UserWarning, match="free for want of support"):
        hook.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    report = hook.report()
    assert "3 weights constrained to norm <= 2.5, 6 layers or weights left out." in report
    assert report.count("LayerNorm") == 1
    assert "1, 3, 5, 7" in report
    # the largest first
    assert report.index("LSTM") < report.index("excluded")


def test_a_tied_embedding_reads_as_bounded() -> None:
    skipped = select(tied_embedding()).skipped
    assert skipped == {"embed": "the weight of this Embedding is bounded as that of head"}


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_are_listed() -> None:
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, dtype=torch.qint8)
    buffers = nn.Module()
    buffers.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    model = nn.ModuleDict({"q": packed, "gptq": buffers, "head": nn.Linear(3, 3)})
    skipped = select(model).skipped
    assert set(skipped) == {"q.0", "gptq"}
    assert all("no parameter (quantized or packed)" in reason for reason in skipped.values())
    with pytest.raises(ValueError, match=r"`layers` names q\.0, but the weight of this torch\.ao\..*quantized"):
        select(model, layers="q.0")


def test_messages_say_which_layer_of_which_library() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

    Linear.__module__, Linear.__qualname__ = "torch_geometric.nn.dense.linear", "Linear"
    assert (
        "torch_geometric.nn.dense.linear.Linear has no operator" in select(nn.Sequential(Linear(), nn.Linear(2, 2))).skipped["0"]
    )


@pytest.mark.parametrize("layers", ["act", ["stem", "act"]])
def test_a_layer_without_weights_named_in_full_is_an_error(layers) -> None:
    with pytest.raises(ValueError, match=r"`layers` names act, a ReLU, which has no weight"):
        select(Net(), layers=layers)


def test_nothing_left_shows_what_the_patterns_matched() -> None:
    with pytest.raises(ValueError, match=r"`layers` matches act \(ReLU\)"):
        select(Net(), layers=nn.ReLU)
    with pytest.raises(ValueError, match=r"`layers` matches stem \(Conv2d\); `exclude` matches .*stem \(Conv2d\).* and \d+ more"):
        select(Net(), layers="stem", exclude="*")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_layer_is_nothing_to_do(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(*shape), nn.Linear(5, 5))
    with torch.no_grad():
        model[1].weight.mul_(10)
    hook = sh.SpectralClip(1.0)
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "its weight is empty" in hook.skipped["0"]
    assert float(sh.spectral_norm(as_operator(model[1]))) <= 1 + 1e-6


# -- several layers of the same parameters ----------------------------------------------------------------------------------


class View(nn.Module):
    """A layer whose matrix is some view of another's parameter."""

    def __init__(self, weight: nn.Parameter, view) -> None:
        super().__init__()
        self.weight, self.view = weight, view


as_operator.register(View, lambda layer, input_size=None: DenseOperator(layer.view(layer.weight)))


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (1, 5)])
@pytest.mark.parametrize("first", [False, True])
def test_a_matrix_and_its_transpose_are_one_weight(shape: tuple[int, int], first: bool) -> None:
    """A decoder that is the encoder transposed: clipped once, for both."""
    torch.manual_seed(0)
    encoder = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        encoder.weight.mul_(10)
    u, s, v = torch.linalg.svd(encoder.weight.detach(), full_matrices=False)
    decoder = View(encoder.weight, lambda w: w.T)
    hook = sh.SpectralClip(1.0)
    hook.start(nn.Sequential(decoder, encoder) if first else nn.Sequential(encoder, decoder))
    assert hook.clipped == 1
    assert hook.skipped == {"1": "shares the weight of 0"}
    torch.testing.assert_close(encoder.weight.detach(), u @ torch.diag(s.clamp(max=1)) @ v, rtol=0, atol=1e-6)


def test_parts_that_lie_apart_are_weights_of_their_own() -> None:
    weight = nn.Parameter(10 * torch.randn(6, 6))
    model = nn.Sequential(View(weight, lambda w: w[:, :3]), View(weight, lambda w: w[:, 3:]))
    assert names(model) == ["0", "1"]
    sh.SpectralClip(1.0).start(model)
    assert all(abs(float(torch.linalg.matrix_norm(part, 2)) - 1) <= 1e-6 for part in weight.detach().chunk(2, dim=1))


@pytest.mark.parametrize(
    "view", [lambda w: w[:2], lambda w: w[:, 1:3], lambda w: w.reshape(8, 2)], ids=["rows", "columns", "shape"]
)
def test_views_that_overlap_are_refused(view) -> None:
    """Either projection would change the other's matrix."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(View(model[0].weight, view))
    with pytest.raises(ValueError, match=r"layer 2 and layer 0 use the same parameters in different ways"):
        select(model)
    assert names(model, exclude="2") == ["0"]


def test_other_functions_of_the_same_parameter_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    parametrizations.weight_norm(model[1])
    model[0].weight = model[1].parametrizations.weight.original1
    with pytest.raises(ValueError, match=r"use the same parameters in different ways"):
        select(model)


# -- frozen layers ----------------------------------------------------------------------------------------------------------


def large() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(10)
    return model


@pytest.mark.parametrize("distribute", [False, True])
@pytest.mark.parametrize("slack", [0.0, 0.08])
def test_frozen_weights_are_left_while_training_and_constrained_once_they_are_thawed(distribute: bool, slack: float) -> None:
    model = large()
    model[:2].requires_grad_(False)
    before = {name: value.clone() for name, value in model[:2].state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    hook = sh.SpectralClip(1.0, batch_norm="clip", distribute=distribute, slack=slack, log=True)
    hook.attach(model.eval(), optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()

    step()
    assert all(torch.equal(value, before[name]) for name, value in model[:2].state_dict().items())
    assert float(sh.spectral_norm(as_operator(model[2]))) <= 1 + 1e-6
    assert set(hook.skipped) == {"0", "1"}
    assert all("frozen" in reason for reason in hook.skipped.values())
    model.requires_grad_(True)
    model[2].requires_grad_(False)
    assert set(hook.skipped) == {"2"}
    held = model[2].weight.detach().clone()
    step()
    assert hook.skipped["2"].startswith("frozen")
    assert torch.equal(model[2].weight, held)
    assert float(sh.spectral_norm(as_operator(model[0]))) <= 1 + 1e-6
    assert float((model[1].weight.abs() / (model[1].running_var + model[1].eps).sqrt()).max()) <= 1 + 1e-6


@pytest.mark.parametrize("frozen", [["weight"], ["bias"]])
def test_a_layer_is_frozen_if_its_weight_is(frozen: list[str]) -> None:
    model = large()
    for name in frozen:
        model[0].get_parameter(name).requires_grad_(False)
    hook = sh.SpectralClip(1.0)
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert ("0" in hook.skipped) == ("weight" in frozen)


@pytest.mark.filterwarnings("ignore:none of the .* is stepped by this optimizer")
def test_all_frozen_is_nothing_to_do() -> None:
    model = large().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    hook = sh.SpectralClip(1.0, log=True)
    with pytest.warns(UserWarning, match="none of the 2 selected weights"):
        hook.attach(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    assert hook.clipped == 0
    assert hook.largest_norm is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_projection_for_once_takes_frozen_weights_too() -> None:
    model = large().requires_grad_(False)
    hook = sh.SpectralClip(1.0)
    hook.start(model)
    assert hook.clipped == 2
    assert max(float(sh.spectral_norm(as_operator(model[i]))) for i in (0, 2)) <= 1 + 1e-6


# -- any wrapper's prefix ---------------------------------------------------------------------------------------------------


class GradSampleModule(nn.Module):
    """As in Opacus."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module


GradSampleModule.__module__ = "opacus.grad_sample.grad_sample_module"


def fabric(model: nn.Module) -> nn.Module:
    return pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1).setup_module(model)


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(model)


WRAPPERS = {
    "compile": torch.compile,
    "data parallel": nn.DataParallel,
    "average": torch.optim.swa_utils.AveragedModel,
    "fabric": fabric,
    "opacus": GradSampleModule,
    "checkpoint": checkpointed,
    "compiled fabric": lambda model: fabric(torch.compile(model)),
    "opacus in parallel": lambda model: nn.DataParallel(GradSampleModule(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("where", ["whole", "in the middle", "one layer"])
def test_wrappers_are_taken_off_names(wrap, where: str) -> None:
    model = Net()
    if where == "whole":
        model = wrap(model)
    elif where == "in the middle":
        model.blocks[0] = wrap(model.blocks[0])
    else:
        model.head = wrap(model.head)
    assert names(model) == ALL
    assert names(model, layers="blocks.0.conv1", exclude="head") == ["blocks.0.conv1"]
    assert select(model, exclude="head").skipped["head"] == "excluded"


def test_a_module_of_the_users_own_keeps_its_name() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Linear(2, 2))

    assert names(Mine()) == ["module.0"]
    assert names(nn.ModuleDict({"module": nn.Linear(2, 2)})) == ["module"]
