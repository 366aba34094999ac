"""Joins new samples and representatives into one augmented batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from dcl_lightning.types import Batch

__all__ = ["Room", "columns_of", "join"]


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
    normalizer = batch.normalizer + share
    if loss == "sum":
        # mean over the new + mean over the rehearsed = (sum new + sum rehearsed * new / rehearsed) / new
        weights, normalizer = weights * (batch.normalizer / share), batch.normalizer
    ids = rows["sample_ids"]
    return Batch(
        inputs=torch.cat([batch.inputs, rows["inputs"]]) if inputs is None else inputs,
        targets=torch.cat([batch.targets, rows["targets"]]),
        task_ids=torch.cat([batch.task_ids, rows["task_ids"]]),
        sample_ids=torch.cat([batch.sample_ids, ids]),
        weights=torch.cat([batch.weights, weights]),
        normalizer=normalizer,
        draw_ids=torch.cat([batch.draw_ids, ids + ((step + 1) << 32)]),
        num_new=batch.num_new,
        rehearsed={name: rows[name] for name in extra},
    )


class Room:
    """Inputs on the device with room in front of them, so that a new batch is all that a step copies.

    Each draw has its own: a batch may be in use after its step, by whoever kept it.

    Args:
        num_new: b, the most new samples of a batch.
        inputs: ``(r, ...)`` of the representatives.
        device: where the room is.

    Attributes:
        rehearsed: the representatives' inputs, where they are now.
    """

    def __init__(self, num_new: int, inputs: Tensor, device: torch.device) -> None:
        self._num_new = num_new
        self._all = torch.empty((num_new + len(inputs), *inputs.shape[1:]), dtype=inputs.dtype, device=device)
        self.rehearsed = self._all[num_new:].copy_(inputs, non_blocking=True)

    def beside(self, new: Tensor) -> Tensor | None:
        """Copy new inputs in front of the representatives'; return both, None if there are too many.

        Args:
            new: ``(n, ...)``, n at most b.

        Returns:
            ``(n + r, ...)``.
        """
        if len(new) > self._num_new:
            return None
        both = self._all[self._num_new - len(new) :]
        both[: len(new)].copy_(new, non_blocking=True)
        return both
