"""Row codecs: what a sample leaves in the memory, and how a stored row joins a later batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dcl_lightning.memory.pytree import concat, map_tensors, num_rows
from dcl_lightning.types import Batch, PyTree

__all__ = ["BatchBuffer", "BatchCodec", "Candidates", "NestCodec", "Representatives", "RowCodec"]


class Candidates(NamedTuple):
    """New samples of one step, offered to the memory.

    Args:
        rows: nest of columns, ``(b, ...)`` each.
        labels: ``(b,)`` int64 model ids; zeros without labels.
        ids: ``(b,)`` int64 ids of the samples; -1 for a sample without one.
    """

    rows: PyTree
    labels: Tensor
    ids: Tensor


class Representatives(NamedTuple):
    """Stored rows that were drawn for one step.

    Args:
        rows: nest of columns, ``(r', ...)`` each, r' at most r.
        labels: ``(r',)`` int64.
        weights: ``(r',)`` float32.
        weight_share: the weights of all workers' representatives, divided by the number of workers.
    """

    rows: PyTree
    labels: Tensor
    weights: Tensor
    weight_share: float


class BatchBuffer:
    """Representatives' inputs on the device with free space in front, so that a step copies its new inputs only.

    Each draw has a buffer of its own: a batch may still be in use after its step.

    Args:
        batch_size: b, the most new samples of a batch.
        inputs: ``(r, ...)`` of the representatives.
        device: of the buffer.

    Attributes:
        rehearsed: ``(r, ...)``, the representatives' inputs within the buffer.
    """

    def __init__(self, batch_size: int, inputs: Tensor, device: torch.device) -> None:
        self._batch_size = batch_size
        self._all = torch.empty((batch_size + len(inputs), *inputs.shape[1:]), dtype=inputs.dtype, device=device)
        self.rehearsed = self._all[batch_size:].copy_(inputs, non_blocking=True)

    def fill(self, new: Tensor) -> Tensor | None:
        """Copy new inputs in front of the representatives' and return both; None if the new ones do not fit.

        Args:
            new: ``(n, ...)``, n at most b.

        Returns:
            ``(n + r, ...)``.
        """
        if len(new) > self._batch_size:
            return None
        both = self._all[self._batch_size - len(new) :]
        both[: len(new)].copy_(new, non_blocking=True)
        return both


class RowCodec(ABC):
    """Turns the samples of a batch into rows of the memory, and joins rows to a later batch.

    Attributes:
        extra: name and shape of a row of each column that the agent adds, all float32.
    """

    extra: Mapping[str, tuple[int, ...]] = {}

    @abstractmethod
    def example(self, batch: PyTree) -> PyTree:
        """Return the columns that the memory stores of a batch, without rows."""

    @abstractmethod
    def encode(self, batch: PyTree, epoch: int) -> Candidates:
        """Return the samples of a batch as the memory stores them, but for the extra columns.

        Args:
            batch: new samples.
            epoch: of the whole stream, from which the batch comes.
        """

    def decode(self, rows: PyTree) -> PyTree:
        """Return drawn rows with their inputs."""
        return rows

    @abstractmethod
    def join(
        self, batch: PyTree, drawn: Representatives | None, step: int, buffer: BatchBuffer | None = None
    ) -> PyTree:
        """Return new samples and representatives as one batch, new ones first.

        Args:
            batch: b new samples, on the device.
            drawn: representatives, on the device; None if there are none.
            step: of the whole run.
            buffer: holds the representatives' inputs.
        """


class NestCodec(RowCodec):
    """Stores batches of any module as they are.

    Args:
        label: key or position of the labels in a batch; None without labels.
    """

    def __init__(self, label: int | str | None = None) -> None:
        self.label = label

    def example(self, batch: PyTree) -> PyTree:
        """Return the columns of a batch, without rows."""
        return _without_rows(batch)

    def encode(self, batch: PyTree, epoch: int) -> Candidates:
        """Return a copy of a batch, since the module may write into it; its samples have no ids."""
        count = num_rows(batch)
        labels = torch.zeros(count, dtype=torch.int64) if self.label is None else batch[self.label].long().cpu()
        return Candidates(map_tensors(torch.clone, batch), labels, torch.full((count,), -1))

    def join(
        self, batch: PyTree, drawn: Representatives | None, step: int, buffer: BatchBuffer | None = None
    ) -> PyTree:
        """Return the rows of the batch, followed by the representatives."""
        return batch if drawn is None else concat(batch, drawn.rows)


class BatchCodec(RowCodec):
    """Stores the columns of a ``Batch``, and what the agent adds.

    Args:
        loss: one ``mean`` over all samples, or the ``sum`` of the means over new and over rehearsed ones.
        extra: name and shape of a row of each column that the agent adds.
        read: for ``row_format: index``, returns the inputs of sample ids ``(n,)`` as the loader gave them in epochs
            ``(n,)``; inputs are stored if None.
    """

    def __init__(
        self,
        loss: Literal["mean", "sum"] = "mean",
        extra: Mapping[str, tuple[int, ...]] | None = None,
        read: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.loss, self.extra, self._read = loss, extra or {}, read

    @property
    def stores_inputs(self) -> bool:
        """Whether a row has the inputs themselves, and not the id of their sample."""
        return self._read is None

    def example(self, batch: Batch) -> dict[str, Tensor]:
        """Return the columns that the memory stores of a batch, without rows."""
        more = {name: torch.zeros(0, *shape, dtype=torch.float32) for name, shape in self.extra.items()}
        return _without_rows(self._columns(batch, 0)) | more

    def encode(self, batch: Batch, epoch: int) -> Candidates:
        """Return the samples of a batch that count, those of weight above 0."""
        columns = _counted(self._columns(batch, epoch), batch.weights)
        return Candidates(columns, columns["targets"], columns["sample_ids"])

    def add_columns(self, candidates: Candidates, columns: Mapping[str, Tensor], weights: Tensor) -> Candidates:
        """Return candidates with the agent's columns.

        Args:
            candidates: as ``encode`` returned them.
            columns: ``(b, ...)`` each, of all samples of the batch.
            weights: ``(b,)`` on the host, of the batch.
        """
        more = _counted({name: columns[name].detach().float() for name in self.extra}, weights)
        return candidates._replace(rows=candidates.rows | more)

    def decode(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return drawn rows with their inputs.

        Raises:
            DataError: an image that cannot be read, by its file.
        """
        if self._read is None:
            return rows
        return {"inputs": self._read(rows["sample_ids"].cpu(), rows["epochs"].cpu()), **rows}

    def join(self, batch: Batch, drawn: Representatives | None, step: int, buffer: BatchBuffer | None = None) -> Batch:
        """Return new samples and representatives as one batch, before augmentation.

        Its loss is one mean over all samples, or the sum of the means over new and over rehearsed ones. Augmentation of
        a representative differs from step to step.
        """
        if drawn is None:
            # The module may write into its batch, which the memory reads after the step.
            return batch._replace(inputs=batch.inputs.clone())
        rows, weights, share = drawn.rows, drawn.weights, drawn.weight_share
        normalizer = batch.normalizer + share
        if self.loss == "sum":
            # mean over the new + mean over the rehearsed = (sum new + sum rehearsed * new / rehearsed) / new
            weights, normalizer = weights * (batch.normalizer / share), batch.normalizer
        inputs = None if buffer is None else buffer.fill(batch.inputs)
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
            rehearsed={name: rows[name] for name in self.extra},
            passes_left=batch.passes_left,
        )

    def _columns(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        columns = {"targets": batch.targets, "task_ids": batch.task_ids, "sample_ids": batch.sample_ids}
        if self._read is None:
            return {"inputs": batch.inputs, **columns}
        return {**columns, "epochs": torch.full_like(batch.sample_ids, epoch)}


def _without_rows(nest: PyTree) -> PyTree:
    return map_tensors(lambda column: column[:0], nest)


def _counted(columns: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Return the rows whose weight is above 0; the others pad a batch."""
    if weights.all():
        return columns
    real = weights > 0
    return {name: column[real.to(column.device)] for name, column in columns.items()}
