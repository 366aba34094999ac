"""Images in files, read on demand, a few batches ahead, by reader processes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.data.images.decode import read_images
from dcl_lightning.data.images.pool import Readers
from dcl_lightning.types import Batch

__all__ = ["ImageFiles"]

# Batches that are read while another is trained on.
_AHEAD = 2


class ImageFiles:
    """The images of a split, in the place of a tensor ``(n, 3, size, size)`` uint8.

    Each batch is read by all processes together, so that the first one of a task comes as soon as any other.

    Args:
        folder: where the files lie.
        names: their names, relative to the folder.
        size: side of an image as the network sees it.
        resize: length of the shorter side before evaluation takes the middle; ``size`` x 256 / 224 if None.
        random_crop: whether training takes random crops of 8 to 100 % of the area; else it sees what evaluation sees.

    Attributes:
        readers: the processes that read; none until a data module gives its own.
    """

    def __init__(
        self, folder: str, names: Sequence[str], size: int, *, resize: int | None = None, random_crop: bool = True
    ) -> None:
        self.folder, self.size, self.random_crop = folder, size, random_crop
        self.resize = resize if resize is not None else round(size * 256 / 224)
        # Strings of a million files, each an object, would be copied into every forked process at a touch.
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])
        self.readers = Readers(0)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the tensor that this stands for."""
        return len(self), 3, self.size, self.size

    def path(self, row: int) -> str:
        """Return the file of an image.

        Args:
            row: from 0 to below ``len(self)``.
        """
        return os.path.join(self.folder, os.fsdecode(self._names[self._ends[row] : self._ends[row + 1]]))

    def fill(
        self, batches: Iterable[Batch], key: tuple[int, int] | None = None, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """Yield batches with their inputs ``(B, 3, size, size)`` uint8, in their order.

        Args:
            batches: batches of which ``sample_ids`` and ``draw_ids`` are read.
            key: seed and epoch of training's crops; None for what evaluation sees.
            pin_memory: whether inputs lie in page-locked memory, from which a GPU fetches them by itself.

        Raises:
            DataError: an image that cannot be read, by its file.
        """
        key = key if self.random_crop else None
        waiting: deque[tuple[Batch, list[Future[Tensor]]]] = deque()
        ahead = _AHEAD if self.readers.num_workers else 0
        try:
            for batch in batches:
                waiting.append((batch, self._ask(batch.sample_ids, batch.draw_ids, key)))
                if len(waiting) > ahead:
                    yield self._finish(*waiting.popleft(), pin_memory)
            while waiting:
                yield self._finish(*waiting.popleft(), pin_memory)
        finally:
            for _, parts in waiting:
                for part in parts:
                    part.cancel()

    def read(self, rows: Tensor, epochs: Tensor, seed: int) -> Tensor:
        """Return images as they were at other times.

        Args:
            rows: ``(n,)`` int64.
            epochs: ``(n,)`` int64, of whose random crop each is; below 0 for what evaluation sees.
            seed: of the crops.

        Returns:
            ``(n, 3, size, size)`` uint8.

        Raises:
            DataError: an image that cannot be read, by its file.
        """
        images = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
        asked = []
        for epoch in epochs.unique().tolist():
            places = torch.nonzero(epochs == epoch).flatten()
            key = (seed, epoch) if epoch >= 0 and self.random_crop else None
            asked.append((places, self._ask(rows[places], rows[places], key)))
        for places, parts in asked:
            images[places] = torch.cat([self.readers.result(part) for part in parts])
        return images

    def _ask(self, ids: Tensor, draws: Tensor, key: tuple[int, int] | None) -> list[Future[Tensor]]:
        rows, draw_ids = ids.tolist(), draws.tolist()
        step = -(-len(rows) // max(1, self.readers.num_workers)) or 1
        return [
            self.readers.submit(
                read_images,
                [self.path(row) for row in rows[low : low + step]],
                self.size,
                self.resize,
                key,
                draw_ids[low : low + step],
            )
            for low in range(0, len(rows), step)
        ]

    def _finish(self, batch: Batch, parts: list[Future[Tensor]], pin_memory: bool) -> Batch:
        inputs = torch.empty((len(batch.sample_ids), *self.shape[1:]), dtype=torch.uint8, pin_memory=pin_memory)
        if parts:
            torch.cat([self.readers.result(part) for part in parts], out=inputs)
        return batch._replace(inputs=inputs)
