"""A shortened long run: over many tasks and epochs on two workers, nothing accumulates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.programs import soak
from tests.distributed.workers import assert_ended_well, run_workers


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_nothing_piles_up_over_twenty_tasks(tmp_path: Path) -> None:
    assert_ended_well(run_workers(soak.long_run, 2, tmp_path, deadline=1400))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        second, last = found["tasks"][1], found["tasks"][-1]
        # Times are printed, not tested: the tenth percentile of a task's steps, which other work delays the least.
        early, late = (
            sum(task["step_ms"] for task in tasks) / 5 for tasks in (found["tasks"][1:6], found["tasks"][-5:])
        )
        print(f"worker {rank}, task 1: {second}\nworker {rank}, task 19: {last}")
        print(f"worker {rank}: a step {early:.2f} ms in tasks 1 to 5, {late:.2f} ms in tasks 15 to 19")
        assert last["task"] == 19
        assert last["rss"] <= 1.05 * second["rss"]
        assert last["threads"] <= second["threads"]
        assert last["files"] <= second["files"]
        assert not found["shm"]
    # Two checkpoints with a file of each worker, and nothing half.
    assert len(list((tmp_path / "c").rglob("rank_*"))) == 4
    assert not (tmp_path / "c" / ".staging").exists()
