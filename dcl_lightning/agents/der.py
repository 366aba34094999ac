"""DER and DER++, dark experience replay.

Buzzega, Boschini, Porrello, Abati and Calderara, "Dark Experience for General Continual Learning: a Strong, Simple
Baseline", NeurIPS 2020, arXiv 2004.07211, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dcl_lightning.agents.replay import DarkReplay
from dcl_lightning.errors import check_number
from dcl_lightning.functional.losses import logit_matching
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["DER", "DERpp"]


class DER(DarkReplay):
    """Cross entropy on new samples; on representatives the distance to the logits that were stored with them.

    Stored are all K raw logits of the augmented view that was trained on. A sample that comes again while it is stored
    is stored anew, with the logits of then.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        rehearsal: values of the memory that differ from the agent's own, as a configuration or a dict.
        alpha: factor of the distance, at least 0.
        **kwargs: arguments of ``ContinualAgent``.

    Raises:
        ConfigurationError: the factor is below 0.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig | Mapping[str, Any] | None = None,
        alpha: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, **kwargs)
        check_number("model.alpha", alpha, at_least=0)
        self.alpha = alpha

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the samples of all workers, and the logits."""
        logits, new = self(batch.inputs), batch.num_new
        self.keep(logits, batch)
        loss = self.cross_entropy(logits, batch, slice(new))
        if batch.rehearsed:
            stored = batch.rehearsed["logits"]
            loss = loss + self.alpha * logit_matching(logits[new:], stored, batch.weights[new:], batch.normalizer)
        return loss, logits


class DERpp(DarkReplay):
    """Cross entropy on new samples; on representatives the distance to their stored logits, and cross entropy.

    The paper draws twice at each step, once for either term. Here the one draw serves both, so that ``num_samples``
    is what a step rehearses. Stored are all K raw logits of the augmented view that was trained on; with
    ``update: task_end`` those of the network at the task's end. A sample that comes again while it is stored is stored
    anew, with the logits of then.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        rehearsal: values of the memory that differ from the agent's own, as a configuration or a dict.
        alpha: factor of the distance, at least 0.
        beta: factor of the representatives' cross entropy, at least 0.
        **kwargs: arguments of ``ContinualAgent``.

    Raises:
        ConfigurationError: a factor is below 0.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig | Mapping[str, Any] | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, **kwargs)
        check_number("model.alpha", alpha, at_least=0)
        check_number("model.beta", beta, at_least=0)
        self.alpha, self.beta = alpha, beta

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the samples of all workers, and the logits."""
        logits, new, old = self(batch.inputs), slice(batch.num_new), slice(batch.num_new, None)
        self.keep(logits, batch)
        loss = self.cross_entropy(logits, batch, new)
        if batch.rehearsed:
            distance = logit_matching(logits[old], batch.rehearsed["logits"], batch.weights[old], batch.normalizer)
            loss = loss + self.alpha * distance + self.beta * self.cross_entropy(logits, batch, old)
        return loss, logits
