"""Skips are for expected reasons, or fail the run where `EXPECTED_SKIPS_ONLY` is set, as in `.ci/run`."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

#: Reasons for which a test may be skipped with everything installed, as patterns of the whole reason.
EXPECTED_SKIPS = (
    # of the machine
    r"no CUDA device here",
    r"float16 mixed precision as users run it needs a GPU",
    r"this torch is built without gloo, the process group for CPUs",
    r"needs torch\.distributed with gloo",
    # of versions from the lower bounds of pyproject.toml on
    r"FSDP2 of torch 2\.5 needs CUDA",
    r"timm [\d.]+ has no \w+, the small model of its family",
    r"transformers has ModernBERT from 4\.48 on",
    r"this version of Lightning does not average weights",
    r"this version of Lightning trains again on the batch before the checkpoint",
    # of packages that no extra installs
    r"onnx, onnxscript and onnxruntime are not installed",
    # of Keras, whose backend is one for a process
    r"KERAS_BACKEND is '\w+', and not torch",
    r"Keras was imported before with the backend '\w+'",
    # of mathematics
    r"not differentiable there, or with another support",
    r"the dense matrix would be large, and smaller ones say the same",
)


def is_expected(reason: str) -> bool:
    return any(re.fullmatch(pattern, reason.removeprefix("Skipped: ")) for pattern in EXPECTED_SKIPS)


class _Skips:
    """Keeps what was skipped for another reason, of tests and of whole files; with xdist, where the reports come together."""

    def __init__(self) -> None:
        self.unexpected: dict[str, str] = {}

    def _look(self, report: Any) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2]
            if not is_expected(reason):
                self.unexpected[report.nodeid] = reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.unexpected:
            terminalreporter.section("skips that tests/conftest.py does not expect")
            for name, reason in self.unexpected.items():
                terminalreporter.line(f"{name}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("EXPECTED_SKIPS_ONLY"):
        config.pluginmanager.register(_Skips(), "expected_skips")
