"""Shared by all tests: quiet Lightning that starts fast, reports without figures, and no skipped test in CI."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
from collections.abc import Iterator

import pytest

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# Each trainer reads from all installed packages what they offer to Lightning, which takes as long as some fits here.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


@pytest.fixture(autouse=True)
def _reports_without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out a report's pictures, which take half of a small run's time, where a test is not marked ``pictures``."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr("dcl_lightning.callbacks.report.figures_of", lambda *_: {})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread, whatever the machine: for comparisons bit for bit, and small tensors."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if os.environ.get("CI") and skipped and exitstatus == 0:
        print(f"\n{len(skipped)} tests skipped in CI: all must run there")
        session.exitstatus = 1
