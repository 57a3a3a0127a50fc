"""Every parametrization in two processes over gloo on the CPU: replicas (DDP) and shards (FSDP2) agree with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import distributed_parametrizations as distributed
import torch.multiprocessing as mp
from cases import free_port, shards_on_cpu
from distributed_parametrizations import KINDS, STEPS, inputs, made
from torch import Tensor, nn

import spectral_hooks as sh
import spectral_hooks.parametrizations as make

needs_shards = pytest.mark.skipif(not shards_on_cpu(), reason="FSDP2 of torch 2.5 needs CUDA")
#: A batch split over two processes is summed in another order.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What either process recorded. If one fails or dies, the other is ended and this raises."""
    folder = tmp_path_factory.mktemp("runs")
    mp.spawn(distributed.work, args=(free_port(), str(folder)), nprocs=distributed.PROCESSES)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(distributed.PROCESSES)]


def alone(name: str, kind: str) -> nn.Module:
    """Trained in one process on the whole batches.

    Bounded weights as shards, which a forward cannot write to: by gradients alone, of which each part's leads back for itself.
    """
    layer, parts = made(name), 1
    if kind == "shards" and name.startswith(("rescaled", "clipped", "banded")):
        layer.parametrizations.eval()
        parts = distributed.PROCESSES
    distributed.train(layer, name, parts=parts)
    return layer.eval()


def singular_values(layer: nn.Module, name: str) -> Tensor:
    """Of the map from input to output without the bias, of whatever kind the layer is; its own boundary, or a periodic one."""
    size = inputs(name, 0).shape[1:]
    if name.startswith("orthogonal") and len(size) > 1:
        return sh.singular_values(sh.as_operator(layer).circular(6))
    layer = layer.double()
    units = torch.eye(size.numel(), dtype=torch.float64).reshape(-1, *size)
    with torch.no_grad():
        return torch.linalg.svdvals((layer(units) - layer(torch.zeros_like(units))).flatten(1))


@pytest.mark.parametrize("kind", ["replicas", pytest.param("shards", marks=needs_shards)])
@pytest.mark.parametrize("name", KINDS)
def test_two_processes_are_as_one(name: str, kind: str, runs: list[dict[Any, Any]]) -> None:
    here, there = (run[name, kind] for run in runs)
    one = alone(name, kind)
    state, start = one.state_dict(), made(name).state_dict()
    assert list(here["state"]) == list(there["state"]) == list(state)
    for key, value in state.items():
        assert torch.equal(here["state"][key], there["state"][key])
        torch.testing.assert_close(here["state"][key], value, rtol=ROUNDING, atol=ROUNDING)
    assert max(float((value - start[key]).abs().max()) for key, value in state.items()) > 0.1
    with torch.no_grad():
        expected = one(inputs(name, STEPS))
    for first, second in zip(here["outputs"], there["outputs"], strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["replicas", pytest.param("shards", marks=needs_shards)])
@pytest.mark.parametrize("name", KINDS)
def test_laws_hold_after_training_in_two_processes(name: str, kind: str, runs: list[dict[Any, Any]]) -> None:
    """Of a layer on one process that is given the whole state."""
    layer = made(name, seed=5)
    layer.load_state_dict(runs[1][name, kind]["state"])
    found = singular_values(layer, name)
    if name.startswith(("orthogonal", "skew", "cayley")) or name == "group_shuffle":
        torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-5)
    elif name == "tensor_train":
        core = sh.singular_values(sh.as_operator(layer, 6))
        torch.testing.assert_close(found[: len(core)], core, rtol=0, atol=1e-6)
        assert float(found[len(core) :].abs().max()) <= 1e-6
    elif name == "group_shuffle fine-tuning":
        torch.testing.assert_close(found, singular_values(made(name), name), rtol=0, atol=1e-5)
    elif name == "conv_norm":  # each output channel has norm one
        assert 1 - 1e-5 <= float(found[0]) <= 5**0.5 + 1e-5
    else:
        low, high = {"banded": (0.5, 0.6), "clipped matrix": (0, 0.4)}.get(name, (0, 0.8))
        assert low * (1 - 1e-6) <= float(found[-1])
        # a kernel on few pixels has less than its norm on the lattice, which is what is bounded
        assert 0.8 * high < float(found[0]) <= high * (1 + 1e-6)


@needs_shards
@pytest.mark.parametrize("name", KINDS)
def test_shards_are_not_made_plain(name: str, runs: list[dict[Any, Any]]) -> None:
    """Gathered for a while or not: the error says what to do instead, and the layer goes on (see its last output above)."""
    for run in runs:
        assert len(run[name, "shards"]["refused"]) == 2
        for error in run[name, "shards"]["refused"]:
            assert error.startswith("ValueError: the parameters of ")
            assert "full state dict" in error


@pytest.mark.parametrize("name", KINDS)
def test_a_report_tells_the_same(name: str, runs: list[dict[Any, Any]]) -> None:
    (expected,) = make.spectral_report(made(name)).values()
    for kind in distributed.WAYS:
        assert list(runs[0][name, kind]["report"].values()) == [expected]


def test_what_is_sharded_is_not_parametrized(runs: list[dict[Any, Any]]) -> None:
    for run in runs:
        assert all("before fully_shard" in message for message in run["late"])
        assert run["still"] == "DTensor"
