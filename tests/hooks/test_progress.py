"""The bar of projections that take long: when it appears, and who keeps it silent."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import spectral_hooks as sh
from spectral_hooks.hooks import progress

tqdm = pytest.importorskip("tqdm.std")

TEXT = "projecting weights"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY", 0)


def attach(shows_bars: bool = True) -> None:
    model, hook = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))), sh.SpectralClip(0.1)
    hook.shows_bars = shows_bars
    with hook.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        pass


@pytest.mark.parametrize(("seconds", "appears"), [(0.1, False), (0.6, True)])
def test_it_appears_after_two_seconds_and_not_before(
    seconds: float, appears: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By a clock that goes on with every item."""
    now = 0.0
    monkeypatch.setattr(tqdm, "time", lambda: now)
    seen = []
    for item in progress.shown(items := list(range(9)), TEXT):
        if TEXT in capsys.readouterr().err:
            seen.append(now)
        now += seconds
        assert item == items[round(now / seconds) - 1]
    assert bool(seen) == appears
    assert all(time >= 2 for time in seen)


@pytest.mark.usefixtures("at_once")
def test_attach_shows_it(capsys: pytest.CaptureFixture) -> None:
    attach()
    assert TEXT in capsys.readouterr().err


def test_what_is_quick_shows_none(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm, "time", lambda: 0.0)
    attach()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("at_once")
def test_the_first_process_alone_shows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for rank, shows in ((0, True), (1, False)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            assert list(progress.shown([1, 2], TEXT)) == [1, 2]
        assert (TEXT in capsys.readouterr().err) == shows


@pytest.mark.usefixtures("at_once")
def test_a_logger_above_warnings_keeps_it_silent(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("spectral_hooks")
    monkeypatch.setattr(logger, "level", logging.ERROR)
    logger.manager._clear_cache()
    attach()
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    logger.manager._clear_cache()


def test_the_environment_keeps_it_silent() -> None:
    """tqdm reads it when it is imported."""
    code = """if True:
        from spectral_hooks.hooks import progress
        progress._DELAY = 0
        print(list(progress.shown([1, 2], "projecting weights")))"""
    for disabled in (False, True):
        environment = os.environ | ({"TQDM_DISABLE": "1"} if disabled else {})
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "[1, 2]\n"
        assert (TEXT in done.stderr) != disabled


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("wanted", [True, False])
def test_a_hook_keeps_it_silent(wanted: bool, capsys: pytest.CaptureFixture) -> None:
    """As frameworks tell it that show no bars themselves."""
    attach(wanted)
    assert (TEXT in capsys.readouterr().err) == wanted


def test_nothing_to_do_shows_none() -> None:
    assert progress.shown(items := [], TEXT) is items


def test_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "tqdm", None)
    assert progress.shown(items := [3, 1, 2], TEXT) is items
