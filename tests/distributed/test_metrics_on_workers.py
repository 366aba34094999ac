"""Logged values and metrics on two and three workers with uneven and empty shards equal one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.programs import logged_values
from tests.distributed.workers import assert_ended_well, run_workers


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_logged_values_and_metrics_equal_one_process(workers: int, tmp_path: Path) -> None:
    assert_ended_well(run_workers(logged_values.logged, workers, tmp_path))
