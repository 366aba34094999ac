"""Counts over all workers for the report: samples trained on, and what the memories hold after each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import Tensor

from dcl_lightning._lightning import callbacks_of
from dcl_lightning.comm import Comm
from dcl_lightning.report.text import csv_text
from dcl_lightning.types import Batch, MemoryRows, StateDict

__all__ = ["MemoryLog", "SampleCounts", "rows_of"]

_COLUMNS = ("task", "worker", "class", "origin_task", "rows", "distinct", "age", "drawn")
_ALL_WORKERS = -1


class SampleCounts:
    """Samples in training steps, each as often as it was trained on; rows that only pad a shard do not count.

    Attributes:
        seen: ``new`` and ``rehearsed`` samples of all workers, as of the last ``settle``.
    """

    def __init__(self) -> None:
        self.seen = {"new": 0, "rehearsed": 0}
        self._since: Tensor | None = None

    def add(self, batch: Batch, task: int | None) -> None:
        """Count a step's batch on its device; the host does not wait.

        Args:
            batch: new samples first.
            task: the current task, if samples of earlier tasks among the new ones count as rehearsed; else None.
        """
        real = batch.weights > 0
        new = real[: batch.num_new]
        again = new[:0] if task is None else new & (batch.task_ids[: batch.num_new] != task)
        counts = torch.stack([new.sum(), again.sum(), real.sum()])
        self._since = counts if self._since is None else self._since + counts

    def settle(self, comm: Comm) -> dict[str, int]:
        """Add what all workers have counted since the last call to ``seen``, and return it. A collective call."""
        since = torch.zeros(3, dtype=torch.int64) if self._since is None else self._since.cpu()
        new, again, every = comm.allreduce(since).tolist()
        self._since = None
        self.seen = {
            "new": self.seen["new"] + new - again,
            "rehearsed": self.seen["rehearsed"] + every - new + again,
        }
        return self.seen


@runtime_checkable
class _HoldsMemory(Protocol):
    def memory_rows(self) -> MemoryRows | None: ...


def rows_of(trainer: pl.Trainer, agent: pl.LightningModule) -> MemoryRows | None:
    """Return this worker's memory, from the first object that implements ``memory_rows``, else None.

    Args:
        trainer: its callbacks and their managers are asked after the agent.
        agent: is asked first.
    """
    callbacks = callbacks_of(trainer)
    for owner in (agent, *(getattr(callback, "manager", None) for callback in callbacks), *callbacks):
        if isinstance(owner, _HoldsMemory) and (held := owner.memory_rows()) is not None:
            return held
    return None


class MemoryLog:
    """Counts of the memories' rows by task, worker, class and origin; the same on all workers.

    Attributes:
        lines: one list for each group of rows: the task learnt last; the worker, -1 for a memory that all workers
            share; the model id; the task that the samples came with; rows; distinct samples among them; the sum of
            their ages; how often they were drawn in all, -1 where draws are not counted.
        nominal: capacity in rows, over all workers.
        stored: rows stored over all workers after the last task.
        distinct: distinct samples among them.
        num_bytes: size of all memories.
    """

    def __init__(self) -> None:
        self.lines: list[list[int]] = []
        self.nominal = self.stored = self.distinct = self.num_bytes = 0

    def note(self, task: int, held: MemoryRows, targets: Tensor, origins: Tensor, comm: Comm) -> None:
        """Count what the memories hold after a task. A collective call.

        Args:
            task: 0-based, the one learnt last.
            held: this worker's rows.
            targets: ``(n,)`` int64 model ids of all training samples.
            origins: ``(n,)`` int64 tasks of all training samples.
            comm: the workers.
        """
        own = not held.shared or comm.rank == 0
        groups = _groups(held, targets, origins) if own else torch.zeros(0, 6, dtype=torch.int64)
        self.lines = [line for line in self.lines if line[0] != task]  # a resumed fit counts its task again
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

    def csv_text(self, labels: Sequence[object]) -> str:
        """Return the groups as CSV, with mean ages and mean times drawn.

        Args:
            labels: original labels in the order of the model ids.
        """
        rows = []
        for task, worker, y, origin, count, distinct, age, drawn in self.lines:
            who = "all" if worker == _ALL_WORKERS else worker
            means = (round(age / count, 2), None if drawn < 0 else round(drawn / count, 2))
            rows.append((task, who, labels[y], origin, count, distinct, *means))
        return csv_text(_COLUMNS, rows)

    def rows_by_class(self, num_tasks: int, num_classes: int) -> Tensor:
        """Return the rows of each class after each task over all workers, ``(num_tasks, num_classes)`` int64."""
        counts = torch.zeros(num_tasks, num_classes, dtype=torch.int64)
        for task, _, y, _, rows, *_ in self.lines:
            counts[task, y] += rows
        return counts

    def state_dict(self) -> StateDict:
        """Return all counts in plain types."""
        return {**vars(self), "lines": [list(line) for line in self.lines]}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the counts."""
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
