"""What validation and test log: hits and losses, counted on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcl_lightning.comm import Comm
from dcl_lightning.functional.scores import restricted, top_k_hits

__all__ = ["EvaluationCounts"]


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
