"""A worker is killed at a random moment of a job that saves at each step; the resumed job ends the same."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dcl_lightning.checkpoint.directory import problem_of
from tests.conformance.rehearsal_runs import same
from tests.distributed.workers import SCRIPTS, environment

PATIENCE_S = 150


def job(folder: Path, name: str, kill: tuple[int, float] | None = None, workers: int = 2) -> bool:
    """Run a job, one of whose workers is killed so many seconds after it began; return whether it came to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    pids = folder / "pids"
    pids.unlink(missing_ok=True)
    command = [sys.executable, str(SCRIPTS / "killed_job.py"), str(folder), name, str(workers)]
    killed = False
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
    try:
        end = time.monotonic() + PATIENCE_S
        if kill is not None:
            while process.poll() is None and (not pids.exists() or len(pids.read_text().split()) < workers):
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.01)
            time.sleep(kill[1])
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # a worker that came to its end first
                    os.kill(int(pids.read_text().split()[kill[0]]), signal.SIGKILL)
                    killed = True
        code = process.wait(PATIENCE_S)
    finally:
        process.kill()
    assert code == 0 or killed, (folder / "log").read_text()[-5000:]
    return code == 0


def ends(folder: Path) -> list[dict[str, Any]]:
    """What each worker ended with."""
    return [torch.load(folder / f"end_{rank}.pt") for rank in range(2)]


def kill_and_compare(tmp_path: Path, names: list[str], kills: int, seed: int) -> dict[str, int]:
    """Kill a worker of each agent's job so many times; each job ends as the one that was left alone."""
    draw = random.Random(seed)
    counts = {"kills": 0, "later": 0}
    for name in names:
        started = time.monotonic()
        assert job(tmp_path / f"{name}_whole", name)
        whole, began = ends(tmp_path / f"{name}_whole"), (tmp_path / f"{name}_whole" / "pids").stat().st_mtime
        trained = max((tmp_path / f"{name}_whole" / "end_0.pt").stat().st_mtime - began, 0.1)
        folder, left = tmp_path / f"{name}_killed", kills
        while left:
            if job(folder, name, (draw.randrange(2), draw.uniform(0.2, 1) * trained)):
                break  # at its end before the kill
            left -= 1
            counts["kills"] += 1
            assert not [p for file in (folder / "checkpoints").glob("*.ckpt") if (p := problem_of(file))]
        assert job(folder, name)
        for ours, theirs in zip(ends(folder), whole, strict=True):
            counts["later"] += int(ours["first"] > 0)
            assert torch.equal(ours["weights"], theirs["weights"]), f"{name}: other weights"
            assert torch.equal(ours["matrix"], theirs["matrix"]), f"{name}: another matrix"
            assert ours["memory"] is None or same(ours["memory"], theirs["memory"]), f"{name}: another memory"
        print(f"{name}: {time.monotonic() - started:.0f} s, so far {counts}")
    return counts


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    counts = kill_and_compare(tmp_path, ["nil_global"], 1, 0)
    assert counts["kills"] == 1


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_killed_workers_of_every_memory_change_nothing(tmp_path: Path) -> None:
    counts = kill_and_compare(tmp_path, ["nil", "nil_v1", "nil_v4", "nil_global", "icarl", "derpp", "er"], 3, 1)
    # A job may end before its kill, or be killed before it has saved anything; most are not.
    assert counts["kills"] >= 10
    assert counts["later"] >= 6
