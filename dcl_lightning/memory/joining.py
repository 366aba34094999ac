"""From a batch of new samples and representatives to one augmented batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from dcl_lightning.types import Batch

__all__ = ["Rooms", "columns_of", "join"]


def columns_of(batch: Batch) -> dict[str, Tensor]:
    """Return the columns of a batch that the memory stores."""
    return {
        "inputs": batch.inputs,
        "targets": batch.targets,
        "task_ids": batch.task_ids,
        "sample_ids": batch.sample_ids,
    }


def join(
    batch: Batch,
    rows: dict[str, Tensor],
    weights: Tensor,
    share: float,
    loss: Literal["mean", "sum"],
    step: int,
    inputs: Tensor | None = None,
    extra: Iterable[str] = (),
) -> Batch:
    """Return new and rehearsed samples as one batch, new ones first, before augmentation.

    Args:
        batch: b new samples.
        rows: columns of the representatives, as ``columns_of`` names them.
        weights: ``(r,)`` float32, of the representatives.
        share: the weights of all workers' representatives, divided by the number of workers.
        loss: one mean over all samples, or the sum of the means over new and over rehearsed ones.
        step: of the whole run; a representative is augmented otherwise at each.
        inputs: ``(b + r, ...)``, where they lie side by side already; joined here if None.
        extra: names of the columns that the representatives have beside those of ``columns_of``.
    """
    normaliser = batch.normaliser + share
    if loss == "sum":
        # mean over the new + mean over the rehearsed = (sum new + sum rehearsed * new / rehearsed) / new
        weights, normaliser = weights * (batch.normaliser / share), batch.normaliser
    ids = rows["sample_ids"]
    return Batch(
        inputs=torch.cat([batch.inputs, rows["inputs"]]) if inputs is None else inputs,
        targets=torch.cat([batch.targets, rows["targets"]]),
        task_ids=torch.cat([batch.task_ids, rows["task_ids"]]),
        sample_ids=torch.cat([batch.sample_ids, ids]),
        weights=torch.cat([batch.weights, weights]),
        normaliser=normaliser,
        draw_ids=torch.cat([batch.draw_ids, ids + ((step + 1) << 32)]),
        num_new=batch.num_new,
        rehearsed={name: rows[name] for name in extra},
    )


class Rooms:
    """Two rooms of b + r inputs on the device: representatives wait in the tail of one while the other is trained on.

    Args:
        batch_size: b, the most new samples of a batch.
        num_samples: r, the most representatives.
        device: where the rooms are.
    """

    def __init__(self, batch_size: int, num_samples: int, device: torch.device) -> None:
        self.batch_size, self.num_samples, self.device = batch_size, num_samples, device
        self._rooms: list[Tensor] = []
        self._turn = 0

    def settle(self, inputs: Tensor) -> Tensor:
        """Copy representatives into the tail of the next room; return them where they are now.

        Args:
            inputs: ``(r', ...)``, r' at most r.
        """
        if not self._rooms:
            shape = (self.batch_size + self.num_samples, *inputs.shape[1:])
            self._rooms = [torch.empty(shape, dtype=inputs.dtype, device=self.device) for _ in range(2)]
        self._turn = 1 - self._turn
        tail = self._rooms[self._turn][self.batch_size : self.batch_size + len(inputs)]
        return tail.copy_(inputs, non_blocking=True)

    def beside(self, new: Tensor, settled: Tensor) -> Tensor | None:
        """Copy new inputs in front of settled ones; return both, ``(n + r', ...)``; None if these are in no room.

        Args:
            new: ``(n, ...)``, n at most b.
            settled: what ``settle`` returned.
        """
        for room in self._rooms:
            tail = room[self.batch_size :]
            if settled.data_ptr() == tail.data_ptr() and len(new) <= self.batch_size:
                start = self.batch_size - len(new)
                room[start : self.batch_size].copy_(new, non_blocking=True)
                return room[start : self.batch_size + len(settled)]
        return None
