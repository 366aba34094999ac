"""Words that every part of the package shares: a task, a batch, the shape of an input, the clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Batch", "Clock", "InputSpec", "Task"]


class InputSpec(NamedTuple):
    """Shape of one sample as the network sees it.

    Args:
        channels: number of channels, at least 1.
        height: rows in pixels; 1 for vectors.
        width: columns in pixels; the length of the vector for vectors.
    """

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Task:
    """One unit of the stream.

    Args:
        index: 0-based place in the stream.
        num_tasks: length of the stream.
        classes: model ids of the classes in the task, ascending.
        labels: their original labels, in the same order.
        num_samples: training samples of the task, over all workers.
        epochs: planned number of epochs.
    """

    index: int
    num_tasks: int
    classes: tuple[int, ...]
    labels: tuple[int | str, ...]
    num_samples: int
    epochs: int


class Batch(NamedTuple):
    """What a training or evaluation step receives.

    Args:
        inputs: ``(B, C, H, W)`` or ``(B, D)``; uint8 on the host, float32 once on the device.
        targets: ``(B,)`` int64 model ids.
        task_ids: ``(B,)`` int64, the task that each sample came with.
        sample_ids: ``(B,)`` int64, index in the split's data set.
        weights: ``(B,)`` float32; 0 for rows that only pad a shard, else 1.
        normaliser: 0-dim float32, the step's weights summed over all workers, divided by their
            number: a worker's loss is ``(weights * losses).sum() / normaliser``.
        draw_ids: ``(B,)`` int64, what augmentation draws are keyed by: the sample id of a new sample, another
            number at each step for a rehearsed one.
        num_new: new samples, which come first; the rest are rehearsed.
    """

    inputs: Tensor
    targets: Tensor
    task_ids: Tensor
    sample_ids: Tensor
    weights: Tensor
    normaliser: Tensor
    draw_ids: Tensor
    num_new: int


@runtime_checkable
class Clock(Protocol):
    """Knows which task an epoch belongs to."""

    def task_at(self, epoch: int) -> int:
        """Return the 0-based task of an epoch of the whole stream."""
        ...
