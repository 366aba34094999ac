"""DER and DER++, dark experience replay.

Buzzega, Boschini, Porrello, Abati and Calderara, "Dark Experience for General Continual Learning: a Strong, Simple
Baseline", NeurIPS 2020, arXiv 2004.07211, algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.errors import check_number
from dcl_lightning.functional.losses import logit_matching
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["DER", "DERpp", "DarkReplay"]


class DarkReplay(RehearsingAgent):
    """What DER and DER++ share: the memory stores all K raw logits of each sample's view that was trained on."""

    boundaries = ("known", "hidden")
    memory = RehearsalConfig(loss="sum")
    required = {"weighting": "none", "loss": "sum"}

    def build(self) -> None:
        """Name the column of logits, which has a number for each class."""
        super().build()
        self.row_shapes = {"logits": (self.num_classes,)}
        self._logits = torch.zeros(0, self.num_classes)

    def keep(self, logits: Tensor, batch: Batch) -> None:
        """Keep the logits ``(B, K)`` of a step's new samples for the memory."""
        self._logits = logits[: batch.num_new].detach()

    def columns_of_step(self) -> dict[str, Tensor]:
        """Return the logits of the step's new samples."""
        return {"logits": self._logits}

    def columns_of(self, batch: Batch) -> dict[str, Tensor]:
        """Return the logits of samples as evaluation sees them."""
        return {"logits": self(batch.inputs)}


class DER(DarkReplay):
    """Cross entropy on new samples; on representatives the distance to the logits that were stored with them.

    A sample that comes again while it is stored is stored again, with its present logits.

    Args:
        *args: arguments of ``RehearsingAgent``, by place.
        alpha: factor of the distance, at least 0.
        **kwargs: arguments of ``RehearsingAgent``, by name.

    Raises:
        ConfigurationError: the factor is below 0.
    """

    short_name = "der"
    papers = ("buzzega2020",)

    def __init__(self, *args: Any, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_number("model.alpha", alpha, at_least=0)
        self.alpha = alpha

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the samples of all workers, and the logits."""
        logits, new = self.outputs(batch), batch.num_new
        self.keep(logits, batch)
        loss = self.cross_entropy(logits, batch, slice(new))
        if batch.rehearsed:
            stored = batch.rehearsed["logits"]
            loss = loss + self.alpha * logit_matching(logits[new:], stored, batch.weights[new:], batch.normalizer)
        return loss, logits


class DERpp(DarkReplay):
    """Cross entropy on new samples; on representatives the distance to their stored logits, and cross entropy.

    The paper draws twice at each step, once for either term. Here the one draw serves both, so that ``num_samples``
    is what a step rehearses. With ``update: task_end`` the stored logits are those of the network at the task's end. A
    sample that comes again while it is stored is stored again, with its present logits.

    Args:
        *args: arguments of ``RehearsingAgent``, by place.
        alpha: factor of the distance, at least 0.
        beta: factor of the representatives' cross entropy, at least 0.
        **kwargs: arguments of ``RehearsingAgent``, by name.

    Raises:
        ConfigurationError: a factor is below 0.
    """

    short_name = "derpp"
    papers = ("buzzega2020",)

    def __init__(
        self,
        *args: Any,
        alpha: float = 0.5,
        beta: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("model.alpha", alpha, at_least=0)
        check_number("model.beta", beta, at_least=0)
        self.alpha, self.beta = alpha, beta

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the samples of all workers, and the logits."""
        logits, new, old = self.outputs(batch), slice(batch.num_new), slice(batch.num_new, None)
        self.keep(logits, batch)
        loss = self.cross_entropy(logits, batch, new)
        if batch.rehearsed:
            distance = logit_matching(logits[old], batch.rehearsed["logits"], batch.weights[old], batch.normalizer)
            loss = loss + self.alpha * distance + self.beta * self.cross_entropy(logits, batch, old)
        return loss, logits
