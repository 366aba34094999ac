"""A run resumed with another number of workers, or under another strategy."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dcl_lightning.checkpoint.buffer_files import RowsFile
from tests.distributed.programs import memory_files
from tests.distributed.workers import assert_ended_well, run_script, run_workers


def run(folder: Path, name: str, workers: int, strategy: str, stop: int, ckpt: str, scope: str) -> list[Any]:
    out = folder / name
    out.mkdir()
    done = run_script("resumed_job", folder, str(out), str(workers), strategy, str(stop), ckpt, scope)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(workers)]


def stored(checkpoint: Path) -> Counter[int]:
    """Sample ids in the memories of a checkpoint, with how often each is stored."""
    counts: Counter[int] = Counter()
    for path in Path(f"{checkpoint}.memory").glob("*/rank_*"):
        file = RowsFile(path)
        names = [name for name, _, _ in file.header["columns"]]
        counts.update(list(file._columns())[names.index("sample_ids")].tolist())
    return counts


@pytest.mark.parametrize(
    ("scope", "jobs"),
    [
        ("local", [(2, "horovod", 13), (3, "ddp", 20), (1, "auto", 0)]),
        pytest.param("global", [(2, "horovod", 20), (2, "ddp", 33), (1, "auto", 0)], marks=pytest.mark.exhaustive),
        pytest.param("local", [(1, "auto", 25), (2, "horovod", 33), (1, "auto", 0)], marks=pytest.mark.exhaustive),
        pytest.param("global", [(1, "horovod", 45), (3, "horovod", 0)], marks=pytest.mark.exhaustive),
    ],
)
def test_a_job_goes_on_with_other_workers(tmp_path: Path, scope: str, jobs: list[tuple[int, str, int]]) -> None:
    check_jobs(tmp_path, scope, jobs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(20))
def test_from_two_to_three_workers_to_one(tmp_path: Path, seed: int) -> None:
    """At any step."""
    draw = random.Random(seed)
    first = draw.randint(12, 34)
    second = first + draw.randint(1, 12)
    scope, strategy = draw.choice(["local", "global"]), draw.choice(["horovod", "ddp"])
    print(f"seed {seed}: {scope}, two workers to step {first}, three ({strategy}) to step {second}, then one")
    check_jobs(tmp_path, scope, [(2, "horovod", first), (3, strategy, second), (1, "auto", 0)])


def check_jobs(tmp_path: Path, scope: str, jobs: list[tuple[int, str, int]]) -> None:
    """Run jobs of so many workers, each up to a step, one after another: each goes on where the last one stopped.

    Tasks of 40 samples, two a step and worker: 10 steps an epoch of two workers, 7 of three, 20 of one.
    """
    ckpt, before, capacity, size, done = "", Counter(), None, None, 0
    for number, (workers, strategy, stop) in enumerate(jobs):
        ran = run(tmp_path, str(number), workers, strategy, stop, ckpt, scope)
        held = Counter(i for _, ids, *_ in ran for i in ids)
        assert held == before
        capacities = [c for _, _, c, *_ in ran]
        assert max(capacities) - min(capacities) <= 1
        capacity = capacity or sum(capacities)
        assert sum(capacities) == capacity == 3 * 6 * jobs[0][0]
        steps = ran[0][3]
        assert len({json.dumps(worker[4:]) for worker in ran}) == 1
        if ckpt:
            # Not a sample of the epoch is left out, and less than a step comes again.
            task, epoch, index, rehearsed, rate = steps[0]
            seen = done * size * 2
            assert epoch * 40 + index * workers * 2 <= seen < epoch * 40 + (index + 1) * workers * 2
            assert task == epoch // 2
            assert rehearsed == 4
        per_epoch = -(-40 // (2 * workers))
        for _, epoch, index, _, rate in steps:
            assert index < per_epoch
            # The rate falls after the first epoch of each task, whoever computes it.
            assert rate == pytest.approx(0.05 if epoch % 2 == 0 else 0.005), steps
        if stop:
            ckpt = str(tmp_path / str(number) / f"step={stop}.ckpt")
            before = stored(Path(ckpt))
            assert sum(before.values()) > 6
            last = steps[-1]
            # Steps of the stream as this job counts them, for the samples that were trained on.
            done, size = last[1] * (40 // (2 * workers)) + last[2] + 1, workers
            if workers == 3:
                done, size = (last[1] * 40 + min((last[2] + 1) * 6, 40)) / 2, 1
        else:
            assert [s[1:3] for s in steps][-1] == [5, per_epoch - 1]
            assert all(min(row[: i + 1]) >= 0 for i, row in enumerate(ran[0][4]))
    shutil.rmtree(tmp_path / "0")


def test_what_one_worker_cannot_write_no_worker_saves(tmp_path: Path) -> None:
    """All workers raise the same error, and nothing half is left."""
    assert_ended_well(run_workers(memory_files.staged, 2, tmp_path))
