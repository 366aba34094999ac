"""Fine-tuning: train on each task as it comes.

The naive lower bound. With ``data.concatenate_tasksets`` it is the transfer baseline, and with
``reset_state_dict`` as well the scratch baseline.
"""

from __future__ import annotations

from torch import Tensor

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.types import Batch

__all__ = ["FineTuning"]


class FineTuning(ContinualAgent):
    """Cross entropy on the new samples alone; arguments as in ``ContinualAgent``."""

    heads = ("linear", "cosine", "per_task")
    short_name = "base"
    papers = ()
    boundaries = ("known", "hidden")

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy, averaged over the step's samples of all workers, and the logits."""
        logits = self(batch.inputs)
        return self.cross_entropy(logits, batch), logits
