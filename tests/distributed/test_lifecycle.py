"""A trainer's whole life on the same two workers: nothing is left over, and both agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.programs import lifecycle
from tests.distributed.workers import assert_ended_well, run_workers


def test_running_statistics_are_worker_0s_on_all_workers_once_a_task_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for the report
    assert_ended_well(run_workers(lifecycle.statistics, 2))


def test_fit_validate_test_predict_fit_again_resume_and_stop_early(tmp_path: Path) -> None:
    assert_ended_well(run_workers(lifecycle.lifecycle, 2, tmp_path))
