"""A message that all workers exchange at every step, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

__all__ = ["StepMessage", "step_is_whole"]


class StepMessage:
    """A few integers, summed over the workers: on its way while a step computes, read at the step's end.

    Args:
        name: of the operation; the same on all workers, and another for each message.
    """

    def __init__(self, name: str) -> None:
        import horovod.torch as hvd

        self._hvd, self._name = hvd, name
        self._pending: Any = None
        self._step = 0

    def start(self, trainer: pl.Trainer, values: Sequence[int]) -> None:
        """Send this worker's part, as the step begins.

        Args:
            trainer: the trainer.
            values: as many as every worker sends.
        """
        if self._pending is not None:  # of a batch that the module left out
            self._hvd.synchronize(self._pending)
        self._step = trainer.global_step
        mine = torch.tensor(values, dtype=torch.int32)
        self._pending = self._hvd.allreduce_async_(mine, op=self._hvd.Sum, name=self._name)

    def read(self) -> list[int] | None:
        """Return the sums, or None if nothing was sent."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        sums: list[int] = self._hvd.synchronize(pending).tolist()
        return sums

    def forget(self) -> None:
        """Let go of what is on its way, after a failure."""
        self._pending = None

    def may_stop(self, trainer: pl.Trainer) -> bool:
        """Return whether the step is whole.

        Args:
            trainer: the trainer.
        """
        return step_is_whole(trainer, self._step)


def step_is_whole(trainer: pl.Trainer, began_at: int) -> bool:
    """Return whether the step that ends is whole: within an accumulation the gradients so far would be lost.

    Args:
        trainer: the trainer.
        began_at: ``global_step`` when the batch came.
    """
    return trainer.accumulate_grad_batches == 1 or trainer.global_step != began_at
