"""Counts the samples that training has seen, over all workers."""

from __future__ import annotations

import torch
from torch import Tensor

from dcl_lightning.comm import Comm
from dcl_lightning.types import Batch

__all__ = ["SampleCounts"]


class SampleCounts:
    """Samples in training steps, each as often as it was trained on; rows that only pad a shard are none.

    Attributes:
        seen: ``new`` and ``rehearsed`` samples of all workers, as of the last ``settle``.
    """

    def __init__(self) -> None:
        self.seen = {"new": 0, "rehearsed": 0}
        self._since: Tensor | None = None

    def add(self, batch: Batch, task: int | None) -> None:
        """Note a step's batch on its device, for which the host does not wait.

        Args:
            batch: new samples first.
            task: the present one, where earlier tasks' samples among the new ones are rehearsed; None where they are
                not.
        """
        real = batch.weights > 0
        new = real[: batch.num_new]
        again = new[:0] if task is None else new & (batch.task_ids[: batch.num_new] != task)
        counts = torch.stack([new.sum(), again.sum(), real.sum()])
        self._since = counts if self._since is None else self._since + counts

    def settle(self, comm: Comm) -> dict[str, int]:
        """Add up what all workers have counted since the last time; every worker calls it.

        Args:
            comm: the cluster.

        Returns:
            ``seen``.
        """
        since = torch.zeros(3, dtype=torch.int64) if self._since is None else self._since.cpu()
        new, again, every = comm.allreduce(since).tolist()
        self._since = None
        self.seen = {
            "new": self.seen["new"] + new - again,
            "rehearsed": self.seen["rehearsed"] + every - new + again,
        }
        return self.seen
