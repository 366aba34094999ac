"""A worker is killed at a random step of a job that saves at each step; the resumed job ends the same."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dcl_lightning.checkpoint.directory import problem_of
from tests.conformance.rehearsal_runs import same
from tests.distributed.workers import SCRIPTS, environment

PATIENCE_S = 150


class Kill(NamedTuple):
    """Which worker is killed, and when: so many seconds after the checkpoint of a step is there."""

    rank: int
    step: int
    delay_s: float


def saved_step(folder: Path) -> int:
    """Return the latest step that a checkpoint is named after; 0 without one."""
    names = [file.name for file in (folder / "checkpoints").glob("step=*.ckpt")]
    return max((int(found[1]) for name in names if (found := re.match(r"step=(\d+)", name))), default=0)


def job(folder: Path, name: str, kill: Kill | None = None, workers: int = 2) -> bool:
    """Run a job, one of whose workers may be killed; return whether it came to its end."""
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
            while process.poll() is None and saved_step(folder) < kill.step:
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.005)
            time.sleep(kill.delay_s)
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # a worker that came to its end first
                    os.kill(int(pids.read_text().split()[kill.rank]), signal.SIGKILL)
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
        whole = ends(tmp_path / f"{name}_whole")
        steps, folder, left = int(whole[0]["steps"]), tmp_path / f"{name}_killed", kills
        while left and (first := saved_step(folder) + 1) < steps:
            # The delay is about that of a step, so that a kill comes while it is computed or saved.
            if job(folder, name, Kill(draw.randrange(2), draw.randrange(first, steps), draw.uniform(0, 0.1))):
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


@pytest.mark.exhaustive
def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    counts = kill_and_compare(tmp_path, ["nil_global"], 1, 0)
    assert counts["kills"] == 1


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_killed_workers_of_every_memory_change_nothing(tmp_path: Path) -> None:
    counts = kill_and_compare(tmp_path, ["nil", "nil_v1", "nil_v4", "nil_global", "icarl", "derpp", "er"], 3, 1)
    # A job may end before its kill, and one that was killed late has no step left for another.
    assert counts["kills"] >= 10
    assert counts["later"] == 14  # both workers of each of the seven jobs
