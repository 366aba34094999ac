"""DER and DER++, dark experience replay.

Buzzega, Boschini, Porrello, Abati and Calderara, "Dark Experience for General Continual Learning: a Strong, Simple
Baseline", NeurIPS 2020, arXiv 2004.07211, algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.errors import ConfigurationError, check_number
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

    With ``update: task_end`` the stored logits are those of the network at the task's end. A sample that comes again
    while it is stored is stored again, with its present logits.

    Args:
        *args: arguments of ``RehearsingAgent``, by place.
        alpha: factor of the distance, at least 0.
        beta: factor of the representatives' cross entropy, at least 0.
        draws: whether all of a step's ``num_samples`` representatives serve both terms (``shared``), or each term has
            half of them, which has to be a whole number (``separate``; algorithm 2 of the paper, which draws twice).
            Where an odd number is stored so far, the distance has one more. Either term is a mean over its own
            representatives on all workers.
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
        draws: Literal["shared", "separate"] = "shared",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("model.alpha", alpha, at_least=0)
        check_number("model.beta", beta, at_least=0)
        self.alpha, self.beta, self.draws = alpha, beta, draws

    def setup(self, stage: str) -> None:
        """Refuse a number of representatives that has no halves, where each term has one of them.

        Raises:
            ConfigurationError: with the remedy.
        """
        super().setup(stage)
        number = self.rehearsal.config.num_samples
        if stage == "fit" and self.draws == "separate" and number % 2:
            raise ConfigurationError(
                f"rehearsal.num_samples={number} has no halves, of which model.draws=separate gives one to each term: "
                "give an even number"
            )

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the samples of all workers, and the logits."""
        logits, new = self.outputs(batch), batch.num_new
        self.keep(logits, batch)
        loss = self.cross_entropy(logits, batch, slice(new))
        # Halves take turns, since draws over the memories of all workers come in the order of the workers.
        stride = 2 if self.draws == "separate" else 1
        matched, labelled = slice(new, None, stride), slice(new + stride - 1, None, stride)
        alpha, beta = self._factors(batch, matched, labelled)
        if batch.rehearsed:
            stored = batch.rehearsed["logits"][::stride]
            distance = logit_matching(logits[matched], stored, batch.weights[matched], batch.normalizer)
            loss = loss + alpha * distance + beta * self.cross_entropy(logits, batch, labelled)
        return loss, logits

    def _factors(self, batch: Batch, matched: slice, labelled: slice) -> tuple[Tensor | float, Tensor | float]:
        """Return the factors of both terms; those of halves also turn sums over all representatives into means.

        Every worker takes part at each step, also one without representatives.
        """
        if self.draws == "shared":
            return self.alpha, self.beta
        counts = torch.stack([(batch.weights[rows] > 0).sum() for rows in (matched, labelled)])
        counts = self.comm.allreduce(counts)
        of_matched, of_labelled = counts.sum() / counts.clamp(min=1)
        return self.alpha * of_matched, self.beta * of_labelled
