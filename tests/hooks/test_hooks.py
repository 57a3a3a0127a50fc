"""SpectralClip in training loops: the promise at every step, and a model that stays as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import spectral_hooks as sh


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A strided convolution, a depthwise one, batch norm and a linear layer; all norms start above one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(36, 3),
    )
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data.mul_(5)
    return model.to(dtype)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(8, 1, 6, 6, generator=generator).to(dtype)).square().mean()


def norms(model: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, float]:
    """True norms at a finite size, from dense matrices in float64, by layer."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and name not in skip:
            op = sh.as_operator(layer, input_size=7)
            weight = op.weight.detach().double()
            found[name] = float(torch.linalg.matrix_norm(op.with_weight(weight).to_dense(), ord=2))
    return found


def assert_inside(model: nn.Module, bound: float = 1.0) -> None:
    assert norms(model)
    assert {name: norm for name, norm in norms(model).items() if norm > bound * (1 + 1e-6)} == {}


def is_outside(model: nn.Module) -> bool:
    return max(norms(model).values()) > 1.01


def step(model: nn.Module, optimizer, seed: int = 0) -> None:
    """One update of bounded length: without the hook weights leave the ball, but stay finite."""
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=5.0, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.5),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.5, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.5, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.5),
}


# -- the promise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_inside_at_attach_and_after_every_step(make) -> None:
    model = network()
    optimizer = make(model.parameters())
    assert is_outside(model)
    handle = sh.SpectralClip(1.0).attach(model, optimizer)
    assert_inside(model)
    for i in range(3):
        step(model, optimizer, seed=i)
        assert_inside(model)
    handle.remove()
    for i in range(3):
        step(model, optimizer, seed=i)
    assert is_outside(model), "the optimizer leaves the ball by itself, so the hook did the work"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_stored_weight_obeys_in_other_precisions(dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    sh.SpectralClip(1.0).attach(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_inside(model)


def test_mixed_bfloat16_layers() -> None:
    model = network()
    model[3].to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    sh.SpectralClip(1.0).attach(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert_inside(model)
    assert model[3].weight.dtype == torch.bfloat16


def test_autocast() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    sh.SpectralClip(1.0).attach(model, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(model).backward()
        # inside the context too: the projection is not run in low precision
        optimizer.step()
    assert_inside(model)


def test_the_model_stays_the_plain_model() -> None:
    """The same parameter objects and memory, state-dict keys, classes, buffers; nothing in the forward."""
    model = network()
    parameters = {name: (id(p), p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sh.SpectralClip(1.0).attach(model, optimizer)
    step(model, optimizer)
    assert {name: (id(p), p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    network().load_state_dict(model.state_dict())


def test_a_model_inside_trains_as_without_the_hook() -> None:
    """Bit for bit: weights that stay inside are never written."""
    models = [network(), network()]
    for i, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        if i:
            hook = sh.SpectralClip(1e3)
            hook.attach(model, optimizer)
        for seed in range(3):
            step(model, optimizer, seed)
    assert hook.clipped == 0
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_max_norm_and_selection_are_obeyed() -> None:
    model = network()
    head = model[5].weight.detach().clone()
    hook = sh.SpectralClip(0.3, exclude="5")
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert torch.equal(model[5].weight, head)
    assert max(norms(model, skip=("5",)).values()) <= 0.3 * (1 + 1e-6)
    assert hook.skipped["5"] == "excluded"
    assert "BatchNorm2d" in hook.skipped["1"]
    assert hook.clipped == 2


# -- the handle -------------------------------------------------------------------------------------------------------------


def test_attaching_twice_is_attaching_once() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    hook = sh.SpectralClip(1.0)
    handle = hook.attach(model, optimizer)
    assert hook.attach(model, optimizer) is handle
    step(model, optimizer)
    assert hook.step == 1


def test_remove_and_context_manager() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    hook = sh.SpectralClip(1.0)
    with hook.attach(model, optimizer) as handle:
        step(model, optimizer)
        assert handle.attached
        assert_inside(model)
    assert not handle.attached
    assert_inside(model)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    step(model, optimizer)
    assert is_outside(model)
    assert hook.step == 1
    handle.remove()
    # and again
    hook.attach(model, optimizer)
    assert_inside(model)


def test_the_context_manager_removes_after_an_exception() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    handle = sh.SpectralClip(1.0).attach(model, optimizer)
    with pytest.raises(KeyError), handle:
        raise KeyError
    assert not optimizer._optimizer_step_post_hooks


def test_another_model_needs_another_hook() -> None:
    model = network()
    hook = sh.SpectralClip(1.0)
    handle = hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    other = network()
    with pytest.raises(ValueError, match="attached to another model"):
        hook.attach(other, torch.optim.SGD(other.parameters(), lr=1.0))
    handle.remove()
    hook.attach(other, torch.optim.SGD(other.parameters(), lr=1.0))
    assert_inside(other)


# -- events -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
def test_two_optimizers(together: bool) -> None:
    model = network()
    body = torch.optim.SGD(model[:4].parameters(), lr=5.0)
    head = torch.optim.Adam(model[4:].parameters(), lr=0.5)
    hook = sh.SpectralClip(1.0)
    if together:
        hook.attach(model, [body, head])
    else:
        assert hook.attach(model, body) is hook.attach(model, head)
    for optimizer in (body, head, head):
        step(model, optimizer)
        assert_inside(model)
    assert hook.step == 3


def test_lbfgs() -> None:
    """Once per step, however often its closure runs."""
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    hook = sh.SpectralClip(1.0)
    hook.attach(model, optimizer)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (loss_of(model) - 3).abs()
        loss.backward()
        calls.append(loss)
        return loss

    optimizer.step(closure)
    assert len(calls) > 1
    assert hook.step == 1
    assert_inside(model)


def test_gradient_accumulation() -> None:
    """The weights change, and are projected, once per update and never between forward and backward."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    hook = sh.SpectralClip(1.0)
    hook.attach(model, optimizer)
    for i in range(6):
        before = [p.detach().clone() for p in model.parameters()]
        loss_of(model, i).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
            assert_inside(model)
    assert hook.step == 2


def test_a_step_that_the_scaler_skips_is_no_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    hook = sh.SpectralClip(1.0)
    hook.attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for overflow, steps in ((False, 1), (True, 1), (False, 2)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if overflow:
            model[0].weight.grad[0] = float("inf")
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert hook.step == steps
        assert torch.equal(before, model[0].weight) == overflow
        assert_inside(model)


def test_every() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    hook = sh.SpectralClip(1.0, every=3)
    hook.attach(model, optimizer)
    assert_inside(model)
    outside = []
    for i in range(6):
        step(model, optimizer, i)
        outside.append(is_outside(model))
    assert outside == [True, True, False, True, True, False]


def test_record() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = max(float(sh.spectral_norm(sh.as_operator(model[i])).detach()) for i in (0, 3, 5))
    hook = sh.SpectralClip(1.0, log=True)
    assert hook.largest_norm is None
    hook.attach(model, optimizer)
    assert hook.largest_norm == pytest.approx(before, rel=0.011)
    assert hook.clipped == 3
    optimizer.step()
    assert hook.largest_norm == pytest.approx(1.0, rel=0.02)
    assert hook.clipped == 0


# -- copies, state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda hook: pickle.loads(pickle.dumps(hook))], ids=["deepcopy", "pickle"])
def test_copies_carry_the_settings_not_the_model(duplicate) -> None:
    model = network()
    hook = sh.SpectralClip(0.5, exclude="5", every=2, rounds=4)
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    twin = duplicate(hook)
    assert repr(twin) == repr(hook)
    assert twin.skipped == {}
    other = network()
    twin.attach(other, torch.optim.SGD(other.parameters(), lr=1.0))
    assert max(norms(other, skip=("5",)).values()) <= 0.5 * (1 + 1e-6)
    assert hook.skipped["5"] == "excluded"


def test_the_model_can_be_copied_and_pickled_while_attached() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    sh.SpectralClip(1.0).attach(model, optimizer)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    copy.deepcopy(optimizer)


def test_a_resumed_run_goes_on_like_an_uninterrupted_one() -> None:
    """Saved between two projections, so the resumed run must not project at its start."""

    def run(stops: list[int]) -> list[Tensor]:
        model, hook_state, saved = network(), None, None
        for steps in stops:
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)
            hook = sh.SpectralClip(1.0, every=3)
            if saved is not None:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                hook.load_state_dict(hook_state)
            hook.attach(model, optimizer)
            for _ in range(steps):
                step(model, optimizer, seed=hook.step)
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            hook_state = pickle.loads(pickle.dumps(hook.state_dict()))
        return list(model.parameters())

    for whole, parts in zip(run([7]), run([4, 3]), strict=True):
        assert torch.equal(whole, parts)


def test_deterministic() -> None:
    results = []
    for seed in (0, 1):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        torch.manual_seed(seed)
        sh.SpectralClip(1.0).attach(model, optimizer)
        step(model, optimizer)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- wrappers ---------------------------------------------------------------------------------------------------------------


def test_timm_lookahead() -> None:
    """Its own hooks never fire; the slow weights it writes every k steps must be inside after the step too."""
    lookahead = pytest.importorskip("timm.optim").Lookahead
    model = network()
    optimizer = lookahead(torch.optim.SGD(model.parameters(), lr=5.0), k=2)
    hook = sh.SpectralClip(1.0)
    hook.attach(model, optimizer)
    for i in range(5):
        step(model, optimizer, i)
        assert hook.step == i + 1
        assert_inside(model)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = network()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=5.0))
    hook = sh.SpectralClip(1.0)
    hook.attach(model, optimizer)
    for i in range(2):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, i))
        optimizer.step()
        assert_inside(model)
    assert hook.step == 2


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_model(whole: bool) -> None:
    """The compiled forward sees the projected weights."""
    model = network()
    compiled = torch.compile(model, backend="eager") if whole else model
    if not whole:
        model[0] = torch.compile(model[0], backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    hook = sh.SpectralClip(1.0, layers=["0", "5"])
    hook.attach(compiled, optimizer)
    for i in range(2):
        step(compiled, optimizer, i)
        layer = model[0] if whole else model[0]._orig_mod
        for each in (layer, model[5]):
            assert float(sh.spectral_norm(sh.as_operator(each)).detach()) <= 1 + 2e-3
    model.eval(), compiled.eval()
    x = torch.randn(2, 1, 6, 6)
    plain = network().eval()
    plain.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()})
    torch.testing.assert_close(compiled(x), plain(x))


def test_compiled_optimizer_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    hook = sh.SpectralClip(1.0)
    hook.attach(model, optimizer)
    compiled = torch.compile(optimizer.step, backend="eager")
    loss_of(model).backward()
    compiled()
    assert hook.step == 1
    assert_inside(model)


# -- special weights --------------------------------------------------------------------------------------------------------


def test_tied_weights_with_differing_geometry_obey_for_every_use() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, stride=2), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    )
    for layer in model[1:]:
        layer.weight = model[0].weight
    nn.init.ones_(model[0].weight)
    hook = sh.SpectralClip(1.0)
    hook.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert hook.clipped == 1
    assert_inside(model)
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=lambda f: f.__name__)
def test_parametrized_layers(wrap) -> None:
    """Either the computed weight obeys, or the error names the layer and the remedy."""
    model = nn.Sequential(wrap(nn.Conv2d(2, 3, 3)), nn.Flatten(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    keys = list(model.state_dict())
    if wrap is parametrizations.weight_norm:
        sh.SpectralClip(0.5).attach(model, optimizer)
        model(torch.ones(1, 2, 3, 3)).sum().backward()
        optimizer.step()
        assert max(norms(model).values()) <= 0.5 * (1 + 1e-6)
    else:
        with pytest.raises(ValueError, match=r"^layer 0, after step 0: the parametrization _SpectralNorm did not take.*exclude"):
            sh.SpectralClip(0.1).attach(model, optimizer)
    assert list(model.state_dict()) == keys


def test_pruned_layers_stay_pruned_and_obey() -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.ln_structured(model[5], "weight", amount=1, n=2, dim=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    sh.SpectralClip(1.0).attach(model, optimizer)
    for i in range(2):
        step(model, optimizer, i)
        loss_of(model)
        assert_inside(model)
        assert bool((model[0].weight[model[0].weight_mask == 0] == 0).all())


# -- mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0", "5"])
def test_a_non_finite_weight_names_layer_and_step_and_touches_nothing(name: str, bad: float) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    sh.SpectralClip(1.0).attach(model, optimizer)
    step(model, optimizer)
    optimizer.zero_grad()
    loss_of(model).backward()
    model.get_submodule(name).weight.grad.view(-1)[0] = bad
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(expected.parameters(), model.parameters(), strict=True):
            p.sub_(5.0 * q.grad)
    with pytest.raises(ValueError, match=rf"^layer {name}, after step 2: .*NaN or infinity"):
        optimizer.step()
    for p, q in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)
    assert is_outside(nn.Sequential(model[5 if name == "0" else 0])), "what could have been projected was not"


def test_a_weight_that_cannot_be_written_leaves_all_others_alone() -> None:
    """The layers before the refusing one must not be half way there."""
    model = nn.Sequential(nn.Linear(3, 3), parametrizations.spectral_norm(nn.Linear(3, 3)))
    nn.init.constant_(model[0].weight, 3.0)
    # in training mode torch's spectral_norm moves its buffers whenever the weight is read
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^layer 1, after step 0: "):
        sh.SpectralClip(0.1).attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_failed_start_leaves_no_hook_behind() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    with pytest.raises(ValueError, match="matches no layer"):
        sh.SpectralClip(1.0, layers="decoder").attach(model, optimizer)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_bad_max_norm(bad) -> None:
    with pytest.raises(ValueError, match=r"`max_norm`.*got"):
        sh.SpectralClip(bad)


@pytest.mark.parametrize("name", ["every", "rounds"])
@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", True])
def test_bad_counts(name: str, bad) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be a positive int( or 'auto')?; got"):
        sh.SpectralClip(1.0, **{name: bad})


def test_bad_model_and_optimizer() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(TypeError, match="`model`"):
        sh.SpectralClip(1.0).attach(optimizer, optimizer)
    for bad in (model, None, [optimizer, "sgd"], 3):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(TypeError, match="`optimizer`"):
            sh.SpectralClip(1.0).attach(model, bad)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_first_layers_named_wrongly_fail_before_anything_is_written() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="`layers` names 1, but"):
        sh.SpectralClip(1.0, layers=["0", "1"]).attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
