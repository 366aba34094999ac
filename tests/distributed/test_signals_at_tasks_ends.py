"""A signal to one of two workers during a task's end: both stop there, and resume to the same end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.programs import task_end_signals
from tests.distributed.workers import assert_ended_well, run_workers

MANY = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("name", "sharding"),
    [("icarl", "epoch"), pytest.param("derpp_task_end", "epoch", marks=MANY), ("derpp_task_end", "fixed")],
)
def test_both_workers_stop_at_the_same_batch_and_are_resumed(tmp_path: Path, name: str, sharding: str) -> None:
    assert_ended_well(run_workers(task_end_signals.stop, 2, tmp_path, name, sharding))


@pytest.mark.parametrize(
    ("workers", "strategy", "name"),
    [
        (1, "auto", "icarl"),
        (2, "horovod", "derpp_task_end"),
        pytest.param(1, "auto", "derpp_task_end", marks=MANY),
        pytest.param(2, "horovod", "icarl", marks=MANY),
    ],
)
def test_slurms_signal_saves_and_requeues_within_a_tasks_end(
    tmp_path: Path, requeued: Path, workers: int, strategy: str, name: str
) -> None:
    assert_ended_well(run_workers(task_end_signals.requeue, workers, tmp_path, name, strategy))
    assert requeued.read_text() == "requeue 123\n"
