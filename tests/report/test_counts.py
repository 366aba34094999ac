"""Counts over all workers: samples trained on, and what the memories hold."""

from __future__ import annotations

import copy

import pytest
import torch

from dcl_lightning.comm import SingleProcessComm
from dcl_lightning.report.counts import MemoryLog, SampleCounts
from dcl_lightning.types import Batch, MemoryRows


def test_a_task_that_is_counted_again_after_a_resume_counts_once() -> None:
    ids = torch.tensor([0, 2, 3])
    held = MemoryRows(
        capacity=4, num_bytes=8, sample_ids=ids, ages=torch.zeros_like(ids), drawn=torch.ones_like(ids), shared=False
    )
    log, targets, origins = MemoryLog(), torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.int64)
    log.note(0, held, targets, origins, SingleProcessComm())
    once = copy.deepcopy(vars(log))
    log.note(0, held, targets, origins, SingleProcessComm())
    assert vars(log) == once
    assert log.rows_by_class(1, 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("steps", [1, 2, 60])
def test_steps_are_counted_each_as_it_was(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    counts, expected = SampleCounts(), {"new": 0, "rehearsed": 0}
    for step in range(steps):
        weights = torch.randint(2, (5,), generator=generator).float() * 2.5
        task_ids, num_new = torch.randint(3, (5,), generator=generator), step % 6
        task = None if step % 4 else 1
        for row in range(5):
            if weights[row]:
                is_new = row < num_new and (task is None or task_ids[row] == task)
                expected["new" if is_new else "rehearsed"] += 1
        ids = torch.arange(5)
        counts.add(Batch(ids, ids, task_ids, ids, weights, weights.sum(), ids, num_new), task)
    assert counts.settle(SingleProcessComm()) == expected
    assert counts.settle(SingleProcessComm()) == expected, "nothing is counted twice"
