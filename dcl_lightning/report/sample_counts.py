"""How many samples training has seen, over all workers."""

from __future__ import annotations

import torch
from torch import Tensor

from dcl_lightning.comm import Comm
from dcl_lightning.types import Batch

__all__ = ["SampleCounts"]

_STEPS_AT_ONCE = 256


class SampleCounts:
    """Samples in training steps, each as often as it was trained on; rows that only pad a shard are none.

    Attributes:
        seen: ``new`` and ``rehearsed`` samples of all workers, as of the last ``settle``.
    """

    def __init__(self) -> None:
        self.seen = {"new": 0, "rehearsed": 0}
        self._steps: list[tuple[Tensor, Tensor, int, int | None]] = []
        self._since: Tensor | None = None

    def add(self, batch: Batch, task: int | None) -> None:
        """Note a step's batch on its device, for which the host does not wait.

        Args:
            batch: new samples first.
            task: the present one, where earlier tasks' samples among the new ones are rehearsed; None where they are
                not.
        """
        # Counted for many steps at once: a few operations more are seen in the step of a small network.
        self._steps.append((batch.weights, batch.task_ids, batch.num_new, task))
        if len(self._steps) == _STEPS_AT_ONCE:
            self._count()

    def _count(self) -> None:
        new, again, every = [], [], []
        for weights, task_ids, num_new, task in self._steps:
            every.append(weights)
            new.append(weights[:num_new])
            if task is not None:
                again.append(new[-1] * (task_ids[:num_new] != task))
        self._steps = []
        none = every[0][:0]
        counts = torch.stack([(torch.cat([none, *part]) > 0).sum() for part in (new, again, every)])
        self._since = counts if self._since is None else self._since + counts

    def settle(self, comm: Comm) -> dict[str, int]:
        """Add up what all workers have counted since the last time; every worker calls it.

        Args:
            comm: the cluster.

        Returns:
            ``seen``.
        """
        if self._steps:
            self._count()
        since = torch.zeros(3, dtype=torch.int64) if self._since is None else self._since.cpu()
        new, again, every = comm.allreduce(since).tolist()
        self._since = None
        self.seen = {
            "new": self.seen["new"] + new - again,
            "rehearsed": self.seen["rehearsed"] + every - new + again,
        }
        return self.seen
