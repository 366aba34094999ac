"""ER-ACE, experience replay with an asymmetric cross entropy.

Caccia, Aljundi, Asadi, Tuytelaars, Pineau and Belilovsky, "New Insights on Reducing Abrupt Representation Change in
Online Continual Learning", ICLR 2022, arXiv 2104.05025, equations 4 and 5.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.functional.losses import asymmetric_cross_entropy
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["ERACE"]


class ERACE(RehearsingAgent):
    """New samples are told apart from one another only, representatives from everything.

    So new classes do not push the outputs of old ones down. The classes of the new samples are those of the step's
    samples on all workers, so that N workers have the loss of one process with the N-fold batch.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        rehearsal: values of the memory that differ from the agent's own, as a configuration or a dict.
        **kwargs: arguments of ``ContinualAgent``.
    """

    boundaries = ("known", "hidden")
    memory: ClassVar[RehearsalConfig] = RehearsalConfig(loss="sum")
    required: ClassVar[dict[str, Any]] = {"weighting": "none", "loss": "sum"}

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of both cross entropies, each a mean over the samples of all workers, and the logits."""
        logits, new = self(batch.inputs), slice(batch.num_new)
        # Rows of weight 0 only pad this worker's share: their classes need not be among the step's.
        samples = batch.weights.new_zeros(self.num_classes)
        samples = self.comm.allreduce(samples.index_add_(0, batch.targets[new], batch.weights[new]))
        present = samples > 0
        loss = asymmetric_cross_entropy(logits[new], batch.targets[new], present, batch.weights[new], batch.normalizer)
        return loss + self.cross_entropy(logits, batch, slice(batch.num_new, None)), logits
