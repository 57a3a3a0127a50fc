"""Other loops than those with an adapter: `attach` in accelerate, skorch and Ignite, as the README shows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spectral_hooks as sh

TOLERANCE = 2e-6


def network() -> nn.Sequential:
    """Outside the ball at the start, and after every step without a projection."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for layer in (model[0], model[3], model[5]):
            layer.weight.mul_(4)
    return model


def largest_norm(model: nn.Module) -> float:
    """By float64 SVD; the convolution is 1×1 and so a matrix."""
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return max(float(torch.linalg.matrix_norm(layer.weight.detach().double().flatten(1), 2)) for layer in layers)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 1, 4, 4, generator=generator), torch.randint(3, (32,), generator=generator)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*data()), batch_size=8)


def watched(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Fills with the largest norm after every step, of projections that were installed before."""
    norms: list[float] = []
    optimizer.register_step_post_hook(lambda *_: norms.append(largest_norm(model)))
    return norms


def assert_inside(model: nn.Module, norms: list[float], steps: int) -> None:
    assert len(norms) == steps
    assert max(norms) <= 1 + TOLERANCE
    assert largest_norm(model) <= 1 + TOLERANCE
    assert largest_norm(model) > 0.9


def test_these_steps_leave_the_ball_without_it() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    norms = watched(model, optimizer)
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert min(norms) > 1.5


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate) -> None:
    """accelerate's wrapper of the optimizer has no hooks: `attach` finds the real one inside."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = network()
    model, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), loader())

    clip = sh.SpectralClip(1.0)
    clip.attach(model, optimizer)
    assert largest_norm(model) <= 1 + TOLERANCE
    norms = watched(model, optimizer.optimizer)
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert_inside(model, norms, steps=4 // accumulate)
    assert clip.step == 4 // accumulate


def test_skorch() -> None:
    skorch = pytest.importorskip("skorch")
    from sklearn.base import clone

    class Clip(skorch.callbacks.Callback):
        """The callback of the README; the watch is the test's."""

        def on_train_begin(self, net, **kwargs) -> None:
            self.clip = sh.SpectralClip(1.0)
            self.handle = self.clip.attach(net.module_, net.optimizer_)
            self.at_start, self.norms = largest_norm(net.module_), watched(net.module_, net.optimizer_)

        def on_train_end(self, net, **kwargs) -> None:
            self.handle.remove()

    settings = {"optimizer": torch.optim.SGD, "lr": 1.0, "batch_size": 8, "max_epochs": 2, "train_split": None, "verbose": 0}
    net = skorch.NeuralNetClassifier(network(), criterion=nn.CrossEntropyLoss, callbacks=[("clip", Clip())], **settings)
    for each in (net, clone(net)):
        each.fit(*(tensor.numpy() for tensor in data()))
        clip = dict(each.callbacks_)["clip"]
        assert clip.at_start <= 1 + TOLERANCE
        assert_inside(each.module_, clip.norms, steps=8)
        assert clip.clip.step == 8
        assert not clip.handle.attached


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ignite(accumulate) -> None:
    engine = pytest.importorskip("ignite.engine")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = engine.create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, gradient_accumulation_steps=accumulate
    )
    clip = sh.SpectralClip(1.0)
    with clip.attach(model, optimizer) as handle:
        assert largest_norm(model) <= 1 + TOLERANCE
        norms = watched(model, optimizer)
        trainer.run(loader(), max_epochs=2)
    assert_inside(model, norms, steps=8 // accumulate)
    assert clip.step == 8 // accumulate
    assert not handle.attached


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
@pytest.mark.parametrize("by_name", [False, True])
def test_before_step_comes_when_a_closure_has_made_the_gradients(kind, by_name) -> None:
    """Of LBFGS each time that it asks for them."""
    layer, x, seen, calls = torch.nn.Linear(3, 3), torch.randn(5, 3), [], []

    class Sees(sh.SpectralClip):
        def before_step(self, parameters) -> None:
            seen.append(layer.weight.grad.clone())
            layer.weight.grad.zero_()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        calls.append(layer.weight.grad.clone())
        return loss

    optimizer = kind(layer.parameters(), lr=0.1)
    with Sees(10.0).attach(layer, optimizer):
        before = layer.weight.detach().clone()
        optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert torch.equal(layer.weight, before), "what it makes of them is what the optimizer gets"
    assert len(seen) == len(calls) >= (2 if kind is torch.optim.LBFGS else 1)
    assert all(torch.equal(one, two) for one, two in zip(seen, calls, strict=True))
