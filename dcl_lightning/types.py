"""Types that all parts of the package share: a task, a batch, the shape of an input, the clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Batch", "Clock", "InputSpec", "MemoryRows", "NetworkInputs", "Prediction", "PyTree", "ReplaySource", "StateDict",
    "StoresExtraColumns", "Task",
]  # fmt: skip

PyTree: TypeAlias = Any  # tensors, in lists, tuples and dicts of any depth
StateDict: TypeAlias = dict[str, Any]  # what an object's ``state_dict`` returns


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


class NetworkInputs(NamedTuple):
    """Images as a network takes them, which a data module makes of its own.

    Args:
        spec: shape to which they are brought; grey ones are repeated in each channel.
        interpolation: ``bilinear`` or ``bicubic``, with which they are resized.
        normalisation: mean and deviation of each channel, in units of images in [0, 1]; None for those of the data.
    """

    spec: InputSpec
    interpolation: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None


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
        leaked: model ids of classes of which a few samples come in this task and which are tested in another's.
    """

    index: int
    num_tasks: int
    classes: tuple[int, ...]
    labels: tuple[int | str, ...]
    num_samples: int
    epochs: int
    leaked: tuple[int, ...] = ()

    @property
    def tested(self) -> tuple[int, ...]:
        """Model ids of the classes that the task's test set is of, ascending."""
        return tuple(y for y in self.classes if y not in self.leaked)


class Batch(NamedTuple):
    """What a training or evaluation step receives.

    Args:
        inputs: ``(B, C, H, W)`` or ``(B, D)``; uint8 on the host, float32 once on the device.
        targets: ``(B,)`` int64 model ids.
        task_ids: ``(B,)`` int64, the task that each sample came with.
        sample_ids: ``(B,)`` int64, index in the split's data set.
        weights: ``(B,)`` float32; 0 for rows that only pad a shard, else 1.
        normalizer: 0-dim float32, the step's weights summed over all workers, divided by their
            number: a worker's loss is ``(weights * losses).sum() / normalizer``.
        draw_ids: ``(B,)`` int64, what augmentation draws are keyed by: the sample id of a new sample, another
            number in each further pass over it, and at each step for a rehearsed one.
        num_new: new samples, which come first; the rest, r of them, are rehearsed.
        rehearsed: what the agent stored of the rehearsed samples beside themselves, ``(r, ...)`` each, by name.
        passes_left: further passes over the new samples that follow this one, of ``data.passes`` in a row.
        plain: inputs of the same samples as evaluation sees them, in training of a module with ``two_views``.
    """

    inputs: Tensor
    targets: Tensor
    task_ids: Tensor
    sample_ids: Tensor
    weights: Tensor
    normalizer: Tensor
    draw_ids: Tensor
    num_new: int
    rehearsed: dict[str, Tensor] = {}  # never written to
    passes_left: int = 0
    plain: Tensor | None = None


class Prediction(NamedTuple):
    """Prediction of a batch of B samples.

    Args:
        labels: B predicted labels as they stand in the data; model ids if the agent has never seen these.
        class_ids: ``(B,)`` int64, their model ids.
        probabilities: ``(B, K)`` float32, softmax of the agent's scores, a column for each model id; 0 for classes not
            seen. For agents that score by distances they rank the classes, but are not calibrated.
        sample_ids: ``(B,)`` int64, indices in the data set; -1 where they are not known.
        targets: ``(B,)`` int64, model ids of the true classes; -1 where they are not known.
    """

    labels: list[int | str]
    class_ids: Tensor
    probabilities: Tensor
    sample_ids: Tensor
    targets: Tensor


class MemoryRows(NamedTuple):
    """What a worker's memory holds, as a method ``memory_rows()`` of who manages it tells the report.

    Args:
        capacity: rows that there is room for.
        num_bytes: bytes that it takes.
        sample_ids: ``(n,)`` int64, indices in the training set, of each row stored.
        ages: ``(n,)`` int64, training steps (batches offered) since the row entered.
        drawn: ``(n,)`` int64, how often the row was drawn since; None if that is not counted.
        shared: whether all workers hold this one memory; each has its own otherwise.
    """

    capacity: int
    num_bytes: int
    sample_ids: Tensor
    ages: Tensor
    drawn: Tensor | None
    shared: bool


@runtime_checkable
class Clock(Protocol):
    """Knows which task an epoch belongs to."""

    def task_at(self, epoch: int) -> int:
        """Return the 0-based task of an epoch of the whole stream."""
        ...


@runtime_checkable
class ReplaySource(Protocol):
    """Adds samples to the training batches of a data module, which asks for them when it makes a loader."""

    @property
    def replayed_per_batch(self) -> int | None:
        """Replayed samples that join each batch of a worker; None if they are part of the task's training set."""
        ...

    @property
    def loads_ahead(self) -> bool:
        """Whether a thread prepares each batch while the one before it is trained on."""
        ...

    def replayed_ids(self, task: int) -> Tensor:
        """Return the sample ids ``(m,)`` int64 that a 0-based task trains on in addition to its own."""
        ...


@runtime_checkable
class StoresExtraColumns(Protocol):
    """An agent that stores columns of its own with each sample, such as logits."""

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of a row of each extra column, all float32; declared before the memory is made."""
        ...

    def columns_of_step(self) -> dict[str, Tensor]:
        """Return the columns ``(b, ...)`` of the new samples of the step whose loss was computed last."""
        ...

    def columns_of(self, batch: Batch) -> dict[str, Tensor]:
        """Return the columns ``(b, ...)`` of samples that no step has computed, in evaluation mode."""
        ...
