"""What evaluation finds over a stream: the results, the counts of one row, and those of Lightning's own evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from dcl_lightning.comm import Comm
from dcl_lightning.functional.scores import restricted, top_k_hits
from dcl_lightning.metrics.accuracy_matrix import AccuracyMatrix
from dcl_lightning.metrics.class_accuracy import ClassAccuracy

__all__ = ["EvaluationCounts", "StreamResults", "Tally"]


_TOP = 5
_MAX_CONFUSED = 1000  # classes; beyond, the confusion matrix would be the largest part of a checkpoint


class StreamResults:
    """The counts of every evaluation of a stream, the same on all workers.

    Args:
        tested: model ids of the classes that each task is tested on.
        num_classes: K, classes of the whole stream.
        task_aware: whether accuracy with the scores restricted to each task's classes is counted, too.

    Attributes:
        matrix: the accuracy matrix.
        top5: that of the five highest scores; None with five classes or fewer.
        task_aware: that of restricted scores (task-IL); None unless asked for.
        classes: accuracy of each class after each task.
        confusion: ``(K, K)`` int64, after the last row: samples of class y (row) taken for class k; None above a
            thousand classes.
    """

    def __init__(self, tested: Sequence[Sequence[int]], num_classes: int, task_aware: bool = False) -> None:
        self.tested, self.num_classes = [list(classes) for classes in tested], num_classes
        size = len(tested)
        self.matrix = AccuracyMatrix(size)
        self.top5 = AccuracyMatrix(size, top_k=_TOP) if num_classes > _TOP else None
        self.task_aware = AccuracyMatrix(size) if task_aware else None
        self.classes = ClassAccuracy(size, num_classes)
        kept = num_classes <= _MAX_CONFUSED
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64) if kept else None

    def tally(self) -> Tally:
        """Return what counts one row."""
        return Tally(self.tested, self.num_classes, self.task_aware is not None, self.confusion is not None)

    def add(self, row: int, tally: Tally, allreduce: Callable[[Tensor], Tensor]) -> None:
        """Write a row; every worker calls it.

        Args:
            row: the task learnt last.
            tally: this worker's counts.
            allreduce: adds up a tensor of all workers; called once.
        """
        columns, classes, confusion = tally.split(allreduce(tally.counts()))
        for column, (total, hits, top, aware) in enumerate(columns.tolist()):
            self.matrix.add_counts(hits, total, row, column)
            if self.top5 is not None:
                self.top5.add_counts(top, total, row, column)
            if self.task_aware is not None:
                self.task_aware.add_counts(aware, total, row, column)
        self.classes.add_counts(classes[0], classes[1], row)
        self.confusion = confusion

    def state_dict(self) -> dict[str, Any]:
        """Return all counts."""
        counts = {f"{name}.{part}": getattr(m, part).clone() for name, m in self._counted() for part in _PARTS}
        return counts if self.confusion is None else {**counts, "confusion": self.confusion.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counts back; what the state does not know keeps its own."""
        for name, metric in self._counted():
            for part in _PARTS:
                if f"{name}.{part}" in state:
                    setattr(metric, part, state[f"{name}.{part}"].clone())
        if self.confusion is not None and "confusion" in state:
            self.confusion = state["confusion"].clone()

    def _counted(self) -> list[tuple[str, AccuracyMatrix | ClassAccuracy]]:
        names = ("matrix", "top5", "task_aware", "classes")
        return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]


_PARTS = ("correct", "total")


class Tally:
    """One row's counts of one worker; nothing leaves the device before ``counts``.

    Args:
        tested: model ids of the classes that each task is tested on.
        num_classes: K.
        task_aware: whether to count hits of restricted scores.
        confused: whether to count the confusion matrix.
    """

    def __init__(self, tested: Sequence[Sequence[int]], num_classes: int, task_aware: bool, confused: bool) -> None:
        self.tested, self.num_classes, self.task_aware, self.confused = tested, num_classes, task_aware, confused
        self._found: list[list[Tensor]] = [[] for _ in tested]
        self._masks: dict[int, Tensor] = {}

    def add(self, column: int, scores: Tensor, targets: Tensor) -> None:
        """Note one batch.

        Args:
            column: the task that the samples are of.
            scores: ``(B, K)``.
            targets: ``(B,)`` int64.
        """
        best, hit = scores.argmax(1), top_k_hits(scores, targets, 1).long()
        top = top_k_hits(scores, targets, _TOP).long() if self.num_classes > _TOP else torch.zeros_like(targets)
        aware = torch.zeros_like(targets)
        if self.task_aware:
            aware = top_k_hits(restricted(scores, self._mask(column, scores)), targets, 1).long()
        self._found[column].append(torch.stack([targets, best, hit, top, aware]))

    def _mask(self, column: int, scores: Tensor) -> Tensor:
        if column not in self._masks:
            mask = torch.zeros(self.num_classes, dtype=torch.bool)
            mask[self.tested[column]] = True
            self._masks[column] = mask.to(scores.device)
        return self._masks[column]

    def counts(self) -> Tensor:
        """Return all counts as one ``(n,)`` int64 on the host, which workers add up."""
        k = self.num_classes
        nothing = torch.zeros(5, 0, dtype=torch.int64)
        found = [torch.cat(parts, 1).cpu() if parts else nothing for parts in self._found]
        columns = torch.stack([torch.cat([torch.tensor([f.shape[1]]), f[2:].sum(1)]) for f in found])
        targets, best, hit = torch.cat(found, 1)[:3]
        right = torch.bincount(targets[hit > 0], minlength=k)
        parts = [columns.flatten(), right, torch.bincount(targets, minlength=k)]
        if self.confused and k > 1:
            parts.append(multiclass_confusion_matrix(best, targets, k, validate_args=False).flatten())
        elif self.confused:
            parts.append(right)
        return torch.cat(parts)

    def split(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the parts of ``counts``.

        Args:
            counts: ``(n,)`` int64, of one worker or added up.

        Returns:
            ``(T, 4)`` samples, hits, hits among the five highest scores and hits of restricted scores; ``(2, K)`` hits
            and samples of each class; ``(K, K)`` the confusion matrix, or None.
        """
        first, k = 4 * len(self._found), self.num_classes
        confusion = counts[first + 2 * k :].reshape(k, k) if self.confused else None
        return counts[:first].reshape(-1, 4), counts[first : first + 2 * k].reshape(2, k), confusion


class EvaluationCounts:
    """Samples, hits and losses of each task, of one pass over the loaders.

    Args:
        task_aware: whether to count hits of scores restricted to each task's classes, too.
    """

    def __init__(self, task_aware: bool) -> None:
        self.task_aware = task_aware
        self._width = 1
        self._masks: Tensor | None = None
        self._counts: Tensor | None = None

    def start(self, data: Any) -> None:
        """Start anew.

        Args:
            data: the data module; None if there is none, and then all loaders are of one task.
        """
        self._counts = None
        self._width = int(getattr(data, "num_tasks", 1))
        homes = data.stream.homes if self.task_aware and hasattr(data, "stream") else None
        if homes is None:
            self._masks = None
            return
        self._masks = torch.zeros(len(homes), data.num_classes, dtype=torch.bool)
        for mask, classes in zip(self._masks, homes, strict=True):
            mask[list(classes)] = True

    def add(self, column: int, scores: Tensor, losses: Tensor, targets: Tensor) -> None:
        """Count one batch of at least one sample.

        Args:
            column: the task that it is of.
            scores: ``(B, K)``, highest for the predicted class.
            losses: 0-dim, the sum of the samples' losses.
            targets: ``(B,)`` int64.
        """
        hits = top_k_hits(scores, targets, 1).sum()
        aware = torch.zeros_like(hits)
        if self._masks is not None:
            self._masks = self._masks.to(scores.device)
            aware = top_k_hits(restricted(scores, self._masks[column]), targets, 1).sum()
        if self._counts is None:
            self._counts = torch.zeros(max(column + 1, self._width), 4, dtype=torch.float64, device=hits.device)
        row = [hits.double(), losses.double(), aware.double(), torch.full_like(hits, len(targets)).double()]
        self._counts[column] += torch.stack(row)

    def values(self, comm: Comm) -> dict[str, float]:
        """Return the means over all workers' samples by the names under which they are logged; every worker asks.

        Args:
            comm: the cluster.

        Returns:
            ``acc`` and ``loss`` of all tasks, ``acc_task_<j>`` of each that has samples, and with ``task_aware``
            ``acc_task_aware``; nothing if there are no samples.
        """
        counts = self._counts
        if counts is None:  # a worker without a single row still takes part in the sum
            counts = torch.zeros(self._width, 4, dtype=torch.float64)
        counts = comm.allreduce(counts.cpu())
        hits, losses, aware, rows = counts.sum(0).tolist()
        if not rows:
            return {}
        values = {"acc": hits / rows, "loss": losses / rows}
        values |= {f"acc_task_{j}": float(c[0] / c[3]) for j, c in enumerate(counts) if c[3] > 0}
        return values if self._masks is None else {**values, "acc_task_aware": aware / rows}
