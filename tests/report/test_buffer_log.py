"""Counts of what the memories hold."""

from __future__ import annotations

import copy

import torch

from dcl_lightning.comm import SingleProcessComm
from dcl_lightning.report.buffer_log import MemoryLog
from dcl_lightning.types import MemoryRows


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
