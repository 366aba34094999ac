"""What the memories of all workers held after each task."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcl_lightning._lightning import callbacks_of
from dcl_lightning.comm import Comm
from dcl_lightning.types import MemoryRows

__all__ = ["COLUMNS", "MemoryLog", "rows_of"]

COLUMNS = ("task", "worker", "class", "origin_task", "rows", "distinct", "age", "drawn")
_ALL_WORKERS = -1


def rows_of(trainer: Any, agent: Any) -> MemoryRows | None:
    """Return what this worker's memory holds, of whoever says it; None if nobody does.

    Args:
        trainer: whose callbacks, or the managers that they have, may say it.
        agent: may say it, too.
    """
    callbacks = callbacks_of(trainer)
    for owner in (agent, *(getattr(callback, "manager", None) for callback in callbacks), *callbacks):
        ask = getattr(owner, "memory_rows", None)
        held = ask() if ask is not None else None
        if isinstance(held, MemoryRows):
            return held
    return None


class MemoryLog:
    """Counts of the memories' rows by task, worker, class and origin; the same on all workers.

    Attributes:
        lines: a list for each group of rows, in the order of ``COLUMNS``: the task learnt last; the worker, -1 for a
            memory that all share; the model id; the task that the samples came with; rows; distinct samples among
            them; sums of ages and of times drawn, -1 where draws are not counted.
        nominal: rows that there is room for, over all workers.
        stored: rows stored over all workers after the last task.
        distinct: different samples among them.
        num_bytes: bytes that all memories take.
    """

    def __init__(self) -> None:
        self.lines: list[list[int]] = []
        self.nominal = self.stored = self.distinct = self.num_bytes = 0

    def note(self, task: int, held: MemoryRows, targets: Tensor, origins: Tensor, comm: Comm) -> None:
        """Count what is held after a task; every worker calls it.

        Args:
            task: 0-based, the one learnt last.
            held: this worker's rows.
            targets: ``(n,)`` int64 model ids of all training samples.
            origins: ``(n,)`` int64 tasks of all training samples.
            comm: the cluster.
        """
        own = not held.shared or comm.rank == 0
        groups = _groups(held, targets, origins) if own else torch.zeros(0, 6, dtype=torch.int64)
        self.lines = [line for line in self.lines if line[0] != task]  # counted before, and again after resume
        self.stored = 0
        for worker, part in enumerate(comm.allgather(groups)):
            number = _ALL_WORKERS if held.shared else worker
            self.lines += [[task, number, *line] for line in part.tolist()]
            self.stored += int(part[:, 2].sum())
        present = torch.zeros(len(targets), dtype=torch.uint8)
        present[held.sample_ids] = 1
        self.distinct = int(comm.allreduce(present, "max").sum())
        sizes = torch.tensor([held.capacity, held.num_bytes]) * int(own)
        self.nominal, self.num_bytes = comm.allreduce(sizes).tolist()

    def csv_text(self, labels: Sequence[Any]) -> str:
        """Return the groups as CSV, with mean ages and mean times drawn.

        Args:
            labels: original labels in the order of the model ids.
        """
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for task, worker, y, origin, rows, distinct, age, drawn in self.lines:
            who = "all" if worker == _ALL_WORKERS else worker
            means = (round(age / rows, 2), "" if drawn < 0 else round(drawn / rows, 2))
            writer.writerow((task, who, labels[y], origin, rows, distinct, *means))
        return out.getvalue()

    def rows_by_class(self, num_tasks: int, num_classes: int) -> Tensor:
        """Return ``(T, K)`` int64, rows of each class after each task, over all workers.

        Args:
            num_tasks: T.
            num_classes: K.
        """
        counts = torch.zeros(num_tasks, num_classes, dtype=torch.int64)
        for task, _, y, _, rows, *_ in self.lines:
            counts[task, y] += rows
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Return all counts in plain types."""
        return {**vars(self), "lines": [list(line) for line in self.lines]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counts back."""
        vars(self).update({**state, "lines": [list(line) for line in state["lines"]]})


def _groups(held: MemoryRows, targets: Tensor, origins: Tensor) -> Tensor:
    """Return ``(groups, 6)`` int64: class, origin, rows, distinct samples, sum of ages, sum of times drawn or -1."""
    width = int(targets.max()) + 1
    keys = origins * width + targets
    groups, place = keys[held.sample_ids].unique(return_inverse=True)
    zeros = torch.zeros_like(groups)
    distinct = torch.bincount(torch.searchsorted(groups, keys[held.sample_ids.unique()]), minlength=len(groups))
    drawn = zeros - 1 if held.drawn is None else zeros.index_add(0, place, held.drawn)
    columns = [groups % width, groups // width, torch.bincount(place, minlength=len(groups)), distinct]
    return torch.stack([*columns, zeros.index_add(0, place, held.ages), drawn], 1)
