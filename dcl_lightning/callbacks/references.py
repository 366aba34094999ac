"""Index rows: a memory that stores sample ids and reads the inputs from the data set when they are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcl_lightning.data.images import ImageFiles
from dcl_lightning.data.transforms import TransformedInputs
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.joining import columns_of
from dcl_lightning.types import Batch

__all__ = ["AS_EVALUATED", "References"]

# In the place of an epoch, of inputs without random crops.
AS_EVALUATED = -1


class References:
    """Rows without inputs, and their inputs as the loader gave them when the row was stored.

    Args:
        data: the data module; every worker reads the same data set.
        pin_memory: whether inputs lie in page-locked memory, from which a GPU fetches them while the host goes on.

    Raises:
        ConfigurationError: it is not ours, there is none, or its samples cannot be read again as they were.
    """

    def __init__(self, data: Any, pin_memory: bool = False) -> None:
        if not hasattr(data, "train_inputs"):
            raise ConfigurationError("rehearsal.row_format=index needs a ContinualDataModule: give row_format=inputs")
        if isinstance(data.train_inputs, TransformedInputs):
            raise ConfigurationError(
                "rehearsal.row_format=index reads samples again, which a scenario's transformations may change: give "
                "row_format=inputs"
            )
        self._data, self._pin_memory = data, pin_memory

    def columns(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """Return the columns that are stored of a batch.

        Args:
            batch: new samples.
            epoch: of the whole stream, that they come from; ``AS_EVALUATED`` if they are not cropped.
        """
        columns = columns_of(batch)
        del columns["inputs"]
        return {**columns, "epochs": torch.full_like(batch.sample_ids, epoch)}

    def complete(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return rows with their inputs.

        Args:
            rows: columns as ``columns`` names them.

        Raises:
            DataError: an image that cannot be read, by its file.
        """
        source, ids = self._data.train_inputs, rows["sample_ids"].cpu()
        if isinstance(source, ImageFiles):
            epochs = rows["epochs"].cpu() if self._data.augment else torch.full_like(ids, AS_EVALUATED)
            inputs = source.read(ids, epochs, self._data.seed)
        else:
            inputs = source[ids]
        return {"inputs": inputs.pin_memory() if self._pin_memory else inputs, **rows}
