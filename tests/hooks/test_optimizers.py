"""Which optimizers a hook understands: the promise after each one's last write, or a refusal that says what to do."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import spectral_hooks as sh

BOUND = 1 + 2e-6


def network(seed: int = 0) -> nn.Sequential:
    """A matrix, a convolution of one tap, which is one, and a strided convolution."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 2, stride=2), nn.Flatten(), nn.Linear(16, 5))


def largest_norm(model: nn.Module) -> float:
    """By float64 SVD: kernels whose stride is their size are matrices."""
    weights = [layer.weight.detach().double() for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return max(float(torch.linalg.matrix_norm(weight.flatten(1), 2)) for weight in weights)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """Pushes every weight outwards."""
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return -model(x.to(next(model.parameters()))).square().mean()


def backward(model: nn.Module, seed: int) -> None:
    loss_of(model, seed).backward()
    for p in model.parameters():  # of bounded length: without the hook weights leave the ball, but stay finite
        if p.grad is not None:
            p.grad.div_(p.grad.norm().clamp(min=1e-3))


def run(model: nn.Module, optimizer, steps: int = 13) -> list[float]:
    """The largest norm after every step of the plain loop."""
    norms = []
    for n in range(steps):
        optimizer.zero_grad()
        backward(model, n)
        optimizer.step()
        norms.append(largest_norm(model))
    return norms


# -- wrappers -----------------------------------------------------------------------------------------------------------------


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021): up, and from there the step of another optimizer."""

    def __init__(self, params, base: type[Optimizer], **settings) -> None:
        super().__init__(params, settings)
        self.base_optimizer = base(self.param_groups, **settings)

    @torch.no_grad()
    def first_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["up"] = 0.05 * p.grad / (p.grad.norm() + 1e-12)
            p.add_(self.state[p]["up"])

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.sub_(self.state[p]["up"])
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Late(SAM):
    """One that goes back only after the step of the other."""

    @torch.no_grad()
    def second_step(self) -> None:
        self.base_optimizer.step()
        for p in (p for group in self.param_groups for p in group["params"]):
            p.add_(self.state[p]["up"], alpha=20)


@pytest.mark.parametrize(("make", "closure"), [(SAM, False), (SAM, True), (Late, True)])
def test_sharpness_aware(make: type[SAM], closure: bool) -> None:
    model = network()
    optimizer = make(model.parameters(), SGD, lr=2.0)
    clip = sh.SpectralClip(1.0)
    with clip.attach(model, optimizer):
        for n in range(5):

            def evaluate(n: int = n) -> None:
                optimizer.zero_grad()
                backward(model, n)

            evaluate()
            if closure:
                optimizer.step(evaluate)
            else:
                optimizer.first_step()
                evaluate()
                optimizer.second_step()
            assert largest_norm(model) <= BOUND
            assert clip.step == n + 1
    assert "step" not in vars(optimizer)


class SlowInState(Optimizer):
    """Lookahead (Zhang et al. 2019), written through `.data`, which no version counter sees; it never calls `__init__`."""

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5, early: bool = False) -> None:
        self.optimizer, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        self.param_groups, self.state, self.defaults = optimizer.param_groups, defaultdict(dict), optimizer.defaults
        if early:
            for p in self.parameters():
                self.state[p]["slow"] = p.detach().clone()

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def slow(self, p: Tensor) -> Tensor:
        return self.state[p].setdefault("slow", p.detach().clone())

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.count += 1
        for p in self.parameters() if self.count % self.k == 0 else ():
            slow = self.slow(p)
            slow.add_(p.data - slow, alpha=self.alpha)
            p.data.copy_(slow)
        return loss


class SlowInLists(SlowInState):
    """The slow weights in a list of its own."""

    def __init__(self, optimizer: Optimizer, **settings) -> None:
        super().__init__(optimizer, **settings)
        self.slow_weights = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def slow(self, p: Tensor) -> Tensor:
        return next(
            slow
            for group, slows in zip(self.param_groups, self.slow_weights, strict=True)
            for each, slow in zip(group["params"], slows, strict=True)
            if each is p
        )


class Around:
    """No Optimizer at all, with one inside."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.wrapped = SlowInState(optimizer)
        self.zero_grad = self.wrapped.zero_grad

    def step(self) -> None:
        self.wrapped.step()


def of_timm(optimizer: Optimizer):
    return pytest.importorskip("timm.optim").Lookahead(optimizer, k=5)


def of_pytorch_optimizer(optimizer: Optimizer):
    return pytest.importorskip("pytorch_optimizer").Lookahead(optimizer, k=5)


LOOKAHEADS: dict[str, Callable] = {
    "state": SlowInState,
    "state, early": partial(SlowInState, early=True),
    "lists": SlowInLists,
    "around": Around,
    "timm": of_timm,
    "pytorch_optimizer": of_pytorch_optimizer,
}


@pytest.mark.parametrize("base", [partial(SGD, lr=2.0), partial(AdamW, lr=0.3)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("make", LOOKAHEADS.values(), ids=LOOKAHEADS)
def test_slow_weights(make: Callable, base: Callable) -> None:
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    optimizer = make(base(model.parameters()))
    clip = sh.SpectralClip(1.0)
    with clip.attach(model, optimizer):
        norms = run(model, optimizer)
        assert max(norms) <= BOUND
        assert clip.step == len(norms)
        kept = [optimizer] + [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
        slow = [
            value
            for each in kept
            for p, state in getattr(each, "state", {}).items()
            for name, value in state.items()
            if "slow" in name and p.ndim > 1
        ] + [p for slows in getattr(optimizer, "slow_weights", []) for p in slows if p.ndim > 1]
        assert slow or isinstance(optimizer, Around)
        for weight in slow:
            assert float(torch.linalg.matrix_norm(weight.double().flatten(1), 2)) <= BOUND
    assert max(run(model, optimizer)) > 1.5, "by itself it leaves the ball"


def test_slow_weights_with_a_learning_rate_schedule_around_and_remove_in_any_order() -> None:
    """A schedule wraps `step` too: ours must be a method that it can wrap, and lie still where it stays wrapped."""
    for schedule_first in (False, True):
        model = network()
        optimizer = SlowInState(SGD(model.parameters(), lr=2.0))
        clip = sh.SpectralClip(1.0)
        make = partial(torch.optim.lr_scheduler.StepLR, optimizer, step_size=1)
        schedule = make() if schedule_first else None
        handle = clip.attach(model, optimizer)
        schedule = schedule or make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for n in range(6):
                assert max(run(model, optimizer, 1)) <= BOUND, n
                schedule.step()
        handle.remove()
        for group in optimizer.param_groups:
            group["lr"] = 2.0
        assert max(run(model, optimizer)) > 1.5
        assert clip.step == 6


def test_copies_and_pickles_of_a_wrapper_are_free() -> None:
    model = network()
    optimizer = Around(SGD(model.parameters(), lr=2.0))
    optimizer.wrapped = optimizer.wrapped.optimizer
    del optimizer.zero_grad  # a bound method would hold the original
    clip = sh.SpectralClip(1.0)
    clip.attach(model, optimizer)
    backward(model, 0)
    for duplicate in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        before = [p.detach().clone() for p in model.parameters()]
        for p in (p for group in duplicate.wrapped.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        duplicate.step()
        assert clip.step == 0
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_only_passes_steps_on_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper that may write afterwards costs a second look, those known not to none."""

    class Passes(Around):
        pass

    looks = []
    for module, expected in (("accelerate.optimizer", 1), ("another", 2)):
        monkeypatch.setattr(Passes, "__module__", module)
        model = network()
        optimizer = Passes(SGD(model.parameters(), lr=2.0))
        optimizer.wrapped = optimizer.wrapped.optimizer
        clip = sh.SpectralClip(1.0)
        clip.attach(model, optimizer)
        monkeypatch.setattr(clip, "act", lambda targets, stepped: looks.append(stepped))
        backward(model, 0)
        optimizer.step()
        assert len(looks) == expected
        looks.clear()


class NeverInitialized(Optimizer):
    """Does not call `Optimizer.__init__`, has a name of its own for the real one, and skips steps (as Opacus' does)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.original_optimizer = optimizer
        self.skips = False

    param_groups = property(lambda self: self.original_optimizer.param_groups)
    state = property(lambda self: self.original_optimizer.state)

    def zero_grad(self) -> None:
        self.original_optimizer.zero_grad()

    def step(self, closure=None):
        return None if self.skips else self.original_optimizer.step(closure)


class Alone(Optimizer):
    """Neither calls `__init__` nor has another inside."""

    def __init__(self, params) -> None:
        self.param_groups, self.state = [{"params": list(params)}], {}

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=2.0)


def test_optimizers_that_torch_never_initialized() -> None:
    for make in (lambda p: NeverInitialized(SGD(p, lr=2.0)), Alone):
        model = network()
        optimizer = make(model.parameters())
        clip = sh.SpectralClip(1.0)
        with clip.attach(model, optimizer):
            assert max(run(model, optimizer, 4)) <= BOUND
            assert clip.step == 4
            if isinstance(optimizer, NeverInitialized):
                optimizer.skips = True
                run(model, optimizer, 1)
                assert clip.step == 4
                optimizer.skips = False
        assert max(run(model, optimizer, 4)) > 1.5
        assert clip.step == 4


# -- averages -----------------------------------------------------------------------------------------------------------------


def schedule_free(name: str, package: str = "schedulefree", **settings) -> Callable:
    return lambda params: getattr(pytest.importorskip(package), name)(params, **settings)


def schedule_free_around(package: str) -> Callable:
    return lambda params: pytest.importorskip(package).ScheduleFreeWrapper(SGD(params, lr=0.5), momentum=0.9)


class ScheduleFree(Optimizer):
    """Schedule-free SGD (Defazio et al. 2024) that does not say in which mode it is."""

    def __init__(self, params, lr: float = 0.5, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})
        self.k = 0

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self.k += 1
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / self.k).add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / self.k) - 1))
                z.sub_(p.grad, alpha=group["lr"])

    @torch.no_grad()
    def switch(self, weight: Callable[[float], float]) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.lerp_(self.state[p]["z"], weight(group["beta"]))

    def eval(self) -> None:
        self.switch(lambda beta: 1 - 1 / beta)

    def train(self) -> None:
        if self.k:
            self.switch(lambda beta: 1 - beta)


SCHEDULE_FREE = {
    "own": ScheduleFree,
    "sgd": schedule_free("SGDScheduleFree", lr=0.5),
    "sgd, foreach off": schedule_free("SGDScheduleFree", lr=0.5, foreach=False, momentum=0.5),
    "adamw": schedule_free("AdamWScheduleFree", lr=0.1),
    "radam": schedule_free("RAdamScheduleFree", lr=0.1),
    "adamw, reference": schedule_free("AdamWScheduleFreeReference", lr=0.1),
    "around": schedule_free_around("schedulefree"),
    "pytorch_optimizer, sgd": schedule_free("ScheduleFreeSGD", "pytorch_optimizer", lr=0.5),
    "pytorch_optimizer, adamw": schedule_free("ScheduleFreeAdamW", "pytorch_optimizer", lr=0.1),
    "pytorch_optimizer, around": schedule_free_around("pytorch_optimizer"),
}


@pytest.mark.parametrize("make", SCHEDULE_FREE.values(), ids=SCHEDULE_FREE)
def test_schedule_free(make: Callable) -> None:
    """Inside where it trains and where it evaluates; and as good as the ball allows, which is the identity."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    optimizer = make(layer.parameters())
    clip = sh.SpectralClip(1.0)
    with clip.attach(layer, optimizer):
        optimizer.train()
        for n in range(200):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            (layer(x) - 5 * x).square().mean().backward()
            optimizer.step()
            assert largest_norm(layer) <= BOUND
            assert clip.step == n + 1
            if n % 50 == 49:
                trained = layer.weight.detach().clone()
                optimizer.eval()
                assert largest_norm(layer) <= BOUND
                evaluated = layer.weight.detach().clone()
                optimizer.train()
                assert largest_norm(layer) <= BOUND
                torch.testing.assert_close(layer.weight.detach(), trained, rtol=0, atol=3e-6)
        # those with momentum or normalized steps take longer; without the fast iterate inside it would be further by far
        assert float((evaluated - torch.eye(8)).norm()) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schedule_free_inside_the_ball_is_left_alone(dtype: torch.dtype) -> None:
    """Bit for bit, also where a round trip through the average would round."""
    trained = []
    for bound in (None, 1e3):
        model = network().to(dtype)
        optimizer = schedule_free("AdamWScheduleFree", lr=1e-3)(model.parameters())
        if bound:
            sh.SpectralClip(bound).attach(model, optimizer)
        optimizer.train()
        run(model, optimizer, 5)
        optimizer.eval()
        trained.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_schedule_free_goes_on_as_if_never_interrupted() -> None:
    make = schedule_free("SGDScheduleFree", lr=0.5)
    whole, clip = network(), sh.SpectralClip(1.0)
    optimizer = make(whole.parameters())
    clip.attach(whole, optimizer)
    optimizer.train()
    run(whole, optimizer, 4)
    state = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), clip.state_dict()))
    run(whole, optimizer, 4)
    resumed, other = network(1), sh.SpectralClip(1.0)
    again = make(resumed.parameters())
    resumed.load_state_dict(state[0])
    again.load_state_dict(state[1])
    other.load_state_dict(state[2])
    other.attach(resumed, again)
    run(resumed, again, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_nothing_is_lost_where_an_iterate_is_not_finite() -> None:
    model = network()
    optimizer = ScheduleFree(model.parameters())
    clip = sh.SpectralClip(1.0)
    clip.attach(model, optimizer)
    run(model, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.state[model[4].weight]["z"].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        clip.project()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_averages_that_cannot_be_told_are_refused() -> None:
    class Swapping(SGD):
        def eval(self) -> None:
            """Puts an average in the place of the weights."""

    model = network()
    optimizer = Swapping(model.parameters(), lr=1.0)
    for group in optimizer.param_groups:
        group.pop("momentum")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match="evaluates other weights than it trains"):
        sh.SpectralClip(1e-3).attach(model, optimizer)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


# -- steps that are none, and steps in the backward pass ----------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, of_timm], ids=["plain", "lookahead"])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_loss_scaling_skips(fused: bool, wrap: Callable) -> None:
    """A fused optimizer is stepped all the same, and leaves the weights."""
    layer = nn.Linear(4, 4)
    optimizer = wrap(AdamW(layer.parameters(), fused=fused))
    clip = sh.SpectralClip(1.0, every=2, schedule=lambda step: 1.0 + step)
    clip.attach(layer, optimizer)
    scaler, moved = torch.amp.GradScaler("cpu"), 0
    for overflows in (True, False, False, True, True, False):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(layer(torch.randn(4, 4)).sum() * (float("inf") if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved += not torch.equal(before, layer.weight)
        assert clip.step == moved
    assert moved == 3


def in_backward(model: nn.Module, **settings) -> list[Optimizer]:
    """One optimizer for each parameter, stepped as soon as its gradient is there."""
    optimizers = {p: SGD([p], **settings) for p in model.parameters()}

    def update(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(update)
    return list(optimizers.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"every": 3}, {"schedule": lambda step: max(0.3, 1 - 0.1 * step)}, {"batch_norm": "clip"}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_optimizers_in_the_backward_pass(options: dict) -> None:
    """As one optimizer after it, bit for bit: an update is a backward pass, whatever the number of optimizers."""
    plain, split = (nn.Sequential(network(), nn.BatchNorm1d(5), nn.Linear(5, 5)) for _ in range(2))
    split.load_state_dict(plain.state_dict())
    clips = [sh.SpectralClip(1.0, **options) for _ in range(2)]
    optimizer = SGD(plain.parameters(), lr=0.1, momentum=0.5)
    clips[0].attach(plain, optimizer)
    clips[1].attach(split, in_backward(split, lr=0.1, momentum=0.5))
    for n in range(9):
        optimizer.zero_grad()
        loss_of(plain, n).backward()
        optimizer.step()
        loss_of(split, n).backward()
        assert clips[0].step == clips[1].step == n + 1
        assert clips[0].clipped == clips[1].clipped
        for a, b in zip(plain.parameters(), split.parameters(), strict=True):
            assert torch.equal(a, b)
    assert any(clip.clipped for clip in clips) or options == {"every": 3}


def test_in_the_backward_pass_of_checkpointed_segments() -> None:
    """Each is a backward pass of its own, in which the weights of the others are still needed."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
    clip = sh.SpectralClip(schedule=lambda step: max(0.5, 1 - 0.1 * step))
    clip.attach(model, in_backward(model, lr=1.0))
    for n in range(6):
        x = torch.randn(5, 6, requires_grad=True)
        for i in (0, 2):
            x = checkpoint(model[i : i + 2], x, use_reentrant=True)
        (-x.square().mean()).backward()
        assert clip.step == n + 1
        assert largest_norm(model) <= max(0.5, 1 - 0.1 * (n + 1)) * BOUND


def test_a_backward_pass_that_fails_is_not_the_last() -> None:
    model = network()
    clip = sh.SpectralClip(1.0)
    clip.attach(model, in_backward(model, lr=2.0))
    trap = model[0].weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, 0).backward()
    trap.remove()
    loss_of(model, 1).backward()
    assert largest_norm(model) <= BOUND
    assert clip.step == 1
    with torch.no_grad():
        model[4].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        loss_of(model, 2).backward()


# -- the wrong optimizer ------------------------------------------------------------------------------------------------------


def master_weights(model: nn.Module, norms_stay: bool) -> Optimizer:
    """An optimizer of float32 copies of a half-precision model, as mixed precision was before autocast."""
    model.to(torch.bfloat16)
    if norms_stay:
        model[-1].to(torch.float32)
    params = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in model.parameters()]
    return SGD(params, lr=1.0)


def of_a_copy(model: nn.Module) -> Optimizer:
    return SGD(copy.deepcopy(model).parameters(), lr=1.0)


def flattened(model: nn.Module) -> Optimizer:
    return SGD([nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))], lr=1.0)


@pytest.mark.parametrize("norms_stay", [False, True])
def test_master_weights_are_refused(norms_stay: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6))
    optimizer = master_weights(model, norms_stay)
    before = copy.deepcopy(model.state_dict())
    hook = sh.SpectralClip(1e-3)
    with pytest.raises(ValueError, match=r"float32 copy in the place of 0\.weight"):
        hook.attach(model, optimizer)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not optimizer._optimizer_step_post_hooks
    hook.attach(model, SGD(model.parameters(), lr=1.0))  # a refusal leaves nothing behind


@pytest.mark.parametrize("make", [of_a_copy, flattened])
def test_an_optimizer_of_other_parameters_gets_a_warning(make: Callable) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6))
    with pytest.warns(UserWarning, match=r"none of the 2 selected weights \(0, \.\.\.\) is stepped by this optimizer"):
        sh.SpectralClip(1.0).attach(model, make(model))


def test_what_trains_on_flattened_copies_is_refused() -> None:
    kind = type("FullyShardedDataParallel", (nn.Sequential,), {})
    model = kind(nn.Linear(4, 4))
    with pytest.raises(NotImplementedError, match="FSDP2"):
        sh.SpectralClip(1.0).attach(model, SGD(model.parameters(), lr=1.0))


@pytest.mark.parametrize("thing", ["sgd", None, nn.Linear(2, 2), [SGD(nn.Linear(2, 2).parameters(), lr=1.0), 3]], ids=str)
def test_what_is_no_optimizer_is_refused(thing: object) -> None:
    model = network()
    with pytest.raises(TypeError, match=r"`optimizer` must be a torch\.optim\.Optimizer"):
        sh.SpectralClip(1.0).attach(model, thing)


def test_a_warning_where_no_selected_weight_is_stepped() -> None:
    model = network()
    hook = sh.SpectralClip(1.0, layers="4")
    with pytest.warns(UserWarning, match="none of the 1 selected weights"):
        hook.attach(model, SGD(model[:4].parameters(), lr=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hook.attach(model, SGD(model[4:].parameters(), lr=1.0))
        sh.SpectralClip(1.0).attach(model, SGD(model[:1].parameters(), lr=1.0))


@pytest.mark.filterwarnings("error")
def test_a_warning_where_weights_moved_and_no_step_was_seen() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=1.0)
    duplicate = copy.copy(optimizer)  # shares the parameters, not the hooks
    hook = sh.SpectralClip(1.0)
    with hook.attach(model, optimizer):
        hook.project()
    backward(model, 0)
    handle = hook.attach(model, optimizer)
    duplicate.step()
    with pytest.warns(UserWarning, match=r"no step of the optimizer \(SGD\) was seen"):
        handle.remove()
    handle.remove()
    with hook.attach(model, optimizer):
        optimizer.step()
        duplicate.step()


def test_removed_handles_leave_nothing_on_the_optimizer() -> None:
    model = network()
    optimizer = ScheduleFree(model.parameters())
    handle = sh.SpectralClip(1.0).attach(model, optimizer)
    assert {"eval", "train"} <= vars(optimizer).keys()
    handle.remove()
    assert not {"eval", "train", "step"} & vars(optimizer).keys()
    assert not optimizer._optimizer_step_post_hooks
    assert handle.averages == []
    del optimizer, handle
    gc.collect()
