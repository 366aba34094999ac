"""The results of a stream's evaluations, and the counts of one pass over evaluation batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcl_lightning.functional.scores import class_ranks, restricted, top_k_hits
from dcl_lightning.metrics.accuracy import AccuracyMatrix, ClassAccuracy
from dcl_lightning.types import StateDict

__all__ = ["EvaluationCounts", "StreamResults"]

_TOP = 5
_MAX_CONFUSED = 1000  # classes; beyond, the confusion matrix would be the largest part of a checkpoint


class EvaluationCounts:
    """One worker's counts of one pass over evaluation batches, kept on the device until ``add_up``.

    Args:
        num_tasks: T, tasks that batches can be from.
        num_classes: K.
        task_classes: model ids of the classes that each task is tested on, to count hits of scores restricted to
            them (task-IL); None to leave these out.
        by_class: whether to count samples and hits of each class.
        confusion: whether to count the confusion matrix.

    Attributes:
        tasks: ``(T, 4)`` int64: samples, hits, hits among the five highest scores, and hits of restricted scores.
        losses: ``(T,)`` float64, sums over samples.
        classes: ``(2, K)`` int64, hits and samples of each class; empty unless counted.
        confusion: ``(K, K)`` int64, samples of class y (row) predicted as k (column); empty unless counted.
    """

    def __init__(
        self,
        num_tasks: int,
        num_classes: int,
        task_classes: Sequence[Sequence[int]] | None = None,
        by_class: bool = False,
        confusion: bool = False,
    ) -> None:
        self.tasks = torch.zeros(num_tasks, 4, dtype=torch.int64)
        self.losses = torch.zeros(num_tasks, dtype=torch.float64)
        self.classes = torch.zeros(2, num_classes if by_class else 0, dtype=torch.int64)
        self.confusion = torch.zeros((num_classes, num_classes) if confusion else (0, 0), dtype=torch.int64)
        self._masks: Tensor | None = None
        if task_classes is not None:
            self._masks = torch.zeros(len(task_classes), num_classes, dtype=torch.bool)
            for mask, classes in zip(self._masks, task_classes, strict=True):
                mask[list(classes)] = True

    def add(self, task: int, scores: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """Count one batch; the host does not wait.

        Args:
            task: the task that it is from.
            scores: ``(B, K)``, highest for the predicted class.
            targets: ``(B,)`` int64.
            loss: 0-dim, the sum of the samples' losses, if they are counted.
        """
        if self.tasks.device != scores.device:
            self.tasks, self.classes = self.tasks.to(scores.device), self.classes.to(scores.device)
            self.confusion = self.confusion.to(scores.device)
            self._masks = None if self._masks is None else self._masks.to(scores.device)
        ranks = class_ranks(scores, targets)
        hits = ranks < 1
        aware = torch.zeros_like(hits)
        if self._masks is not None:
            aware = top_k_hits(restricted(scores, self._masks[task]), targets, 1)
        every = torch.ones_like(hits)
        self.tasks[task] += torch.stack([every, hits, ranks < _TOP, aware]).sum(1)
        if loss is not None:
            self.losses = self.losses.to(loss.device)
            self.losses[task] += loss
        if self.classes.numel():
            self.classes.index_add_(1, targets, torch.stack([hits, every]).long())
        if self.confusion.numel():
            places = targets * len(self.confusion) + scores.argmax(1)
            self.confusion.view(-1).index_add_(0, places, every.long())

    def add_up(self, allreduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the counts by those of all workers, on the host. A collective call.

        Args:
            allreduce: adds up a tensor over all workers; called once.
        """
        parts = (self.tasks, self.losses, self.classes, self.confusion)
        summed = allreduce(torch.cat([part.cpu().double().flatten() for part in parts]))  # exact below 2**53
        self.tasks, self.losses, self.classes, self.confusion = (
            counts.reshape(part.shape).to(part.dtype)
            for counts, part in zip(summed.split([part.numel() for part in parts]), parts, strict=True)
        )

    def values(self) -> dict[str, float]:
        """Return the means under the names that are logged.

        Returns:
            ``acc`` and ``loss`` of all tasks, ``acc_task_<j>`` of each that has samples, and ``acc_task_aware`` if
            restricted scores are counted; nothing without samples.
        """
        samples, hits, _, aware = self.tasks.sum(0).tolist()
        if not samples:
            return {}
        values = {"acc": hits / samples, "loss": float(self.losses.sum()) / samples}
        values |= {f"acc_task_{j}": float(row[1] / row[0]) for j, row in enumerate(self.tasks) if row[0] > 0}
        return values if self._masks is None else {**values, "acc_task_aware": aware / samples}


class StreamResults:
    """The counts of every evaluation of a stream, the same on all workers.

    Args:
        tested: model ids of the classes that each task is tested on.
        num_classes: K, classes of the whole stream.
        task_aware: whether to count accuracy with the scores restricted to each task's classes, too.

    Attributes:
        matrix: the accuracy matrix.
        top5: that of the five highest scores; None with five classes or fewer.
        task_aware: that of restricted scores (task-IL); None unless asked for.
        classes: accuracy of each class after each task.
        baseline: ``(T,)`` float64, the untrained network's accuracies; None unless they were measured.
        confusion: ``(K, K)`` int64, after the last row: samples of class y (row) predicted as k (column); None above
            a thousand classes.
    """

    def __init__(self, tested: Sequence[Sequence[int]], num_classes: int, task_aware: bool = False) -> None:
        self.tested, self.num_classes = [list(classes) for classes in tested], num_classes
        size = len(tested)
        self.matrix = AccuracyMatrix(size)
        self.top5 = AccuracyMatrix(size, top_k=_TOP) if num_classes > _TOP else None
        self.task_aware = AccuracyMatrix(size) if task_aware else None
        self.classes = ClassAccuracy(size, num_classes)
        self.baseline: Tensor | None = None
        kept = num_classes <= _MAX_CONFUSED
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64) if kept else None

    def new_counts(self) -> EvaluationCounts:
        """Return the counts of one row, which are still zero."""
        return EvaluationCounts(
            len(self.tested),
            self.num_classes,
            None if self.task_aware is None else self.tested,
            by_class=True,
            confusion=self.confusion is not None,
        )

    def add(self, row: int, counts: EvaluationCounts, allreduce: Callable[[Tensor], Tensor]) -> None:
        """Write a row. A collective call.

        Args:
            row: the task learnt last.
            counts: this worker's.
            allreduce: adds up a tensor over all workers; called once.
        """
        counts.add_up(allreduce)
        for column, (samples, hits, top, aware) in enumerate(counts.tasks.tolist()):
            self.matrix.add_counts(hits, samples, row, column)
            if self.top5 is not None:
                self.top5.add_counts(top, samples, row, column)
            if self.task_aware is not None:
                self.task_aware.add_counts(aware, samples, row, column)
        self.classes.add_counts(counts.classes[0], counts.classes[1], row)
        if self.confusion is not None:
            self.confusion = counts.confusion

    def state_dict(self) -> StateDict:
        """Return all counts."""
        counts: StateDict = {}
        for name, metric in self._metrics().items():
            counts |= {f"{name}.correct": metric.correct.clone(), f"{name}.total": metric.total.clone()}
        further = {"confusion": self.confusion, "baseline": self.baseline}
        return counts | {name: tensor.clone() for name, tensor in further.items() if tensor is not None}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the counts; those that the state lacks stay as they are."""
        for name, metric in self._metrics().items():
            if f"{name}.correct" in state:
                metric.correct, metric.total = state[f"{name}.correct"].clone(), state[f"{name}.total"].clone()
        if self.confusion is not None and "confusion" in state:
            self.confusion = state["confusion"].clone()
        if "baseline" in state:
            self.baseline = state["baseline"].clone()

    def _metrics(self) -> dict[str, AccuracyMatrix | ClassAccuracy]:
        metrics = {"matrix": self.matrix, "top5": self.top5, "task_aware": self.task_aware, "classes": self.classes}
        return {name: metric for name, metric in metrics.items() if metric is not None}
