"""Extra columns: what an agent stores with a sample, such as its logits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dcl_lightning.callbacks.evaluation import evaluation_batches
from dcl_lightning.memory.manager import Offer
from dcl_lightning.types import Batch, StoresMore

__all__ = ["ExtraColumns"]


class ExtraColumns:
    """Declares the columns when the memory is made, and fills them in once the agent knows them.

    Args:
        module: the module that is trained; one that is no ``StoresMore`` stores nothing more.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._agent: Any = module
        self.shapes = module.row_shapes if isinstance(module, StoresMore) else {}

    def no_rows(self) -> dict[str, Tensor]:
        """Return the columns without rows."""
        return {name: torch.zeros(0, *shape, dtype=torch.float32) for name, shape in self.shapes.items()}

    def with_step(self, offer: Offer, weights: Tensor) -> Offer:
        """Return an offer with the columns of the step that it comes from.

        Args:
            offer: new samples that count.
            weights: ``(b,)`` on the host, of the batch's samples; those of weight 0 do not count.
        """
        if not self.shapes:
            return offer
        columns = self._checked(self._agent.columns_of_step())
        if not weights.all():
            real = weights > 0
            columns = {name: column[real.to(column.device)] for name, column in columns.items()}
        return offer._replace(rows={**offer.rows, **columns})

    def with_evaluation(self, offer: Offer, batch: Batch) -> Offer:
        """Return an offer with the columns of a batch that is not trained on.

        Args:
            offer: the batch's samples.
            batch: as the loader gave it.
        """
        if not self.shapes:
            return offer
        # Of the network that is trained, as the columns of a step are.
        for prepared in evaluation_batches(self._agent, [batch], averaged=False):
            columns = self._checked(self._agent.columns_of(prepared))
        return offer._replace(rows={**offer.rows, **columns})

    def _checked(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: columns[name].detach().float() for name in self.shapes}
