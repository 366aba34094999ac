"""Data of two workers of a host: staged by one, index rows as input rows, under horovod and under ddp."""

from __future__ import annotations

from pathlib import Path

from tests.data import small_sets
from tests.distributed.programs import data
from tests.distributed.workers import assert_ended_well, run_workers


def test_one_worker_copies_and_references_are_rows(tmp_path: Path) -> None:
    base = tmp_path / "ImageNet"
    for split, count in (("train", 6), ("val", 1)):
        for name in small_sets.SYNSETS:
            for i in range(count):
                small_sets.image(base / split / name / f"{i}.png", (12 + i, 20 - i))
    assert_ended_well(run_workers(data.staged, 2, tmp_path, deadline=240))
    copied = (tmp_path / "copied").read_text().split()
    there = [str(path) for path in base.rglob("*.png")]
    # Once for each of the two places, whichever worker was asked first.
    assert sorted(copied) == sorted(there * 2)
