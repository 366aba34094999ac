"""What every agent with a rehearsal memory shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor, nn

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional.losses import weighted_cross_entropy
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["RehearsingAgent"]


class RehearsingAgent(ContinualAgent):
    """A learner whose batches are joined by representatives of earlier ones.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        rehearsal: the memory, its draws and who does the work; or a dict of what differs from ``memory``.
        **kwargs: arguments of ``ContinualAgent``.

    Raises:
        ConfigurationError: a value of the memory contradicts ``required``.
    """

    rehearses = True
    # The method's own memory: what is not said otherwise. One with another gives it as its constructor's default, too,
    # where the command line looks for it.
    memory: ClassVar[RehearsalConfig] = RehearsalConfig(policy="reservoir", weighting="none")
    # Values of the memory without which it would be another method.
    required: ClassVar[dict[str, Any]] = {"weighting": "none"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig = memory,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **kwargs)
        # The command line reads one class; Python and checkpoints give dicts, too.
        config = replace(self.memory, **rehearsal) if isinstance(rehearsal, Mapping) else rehearsal
        for key, value in self.required.items():
            if getattr(config, key) != value:
                raise ConfigurationError(
                    f"rehearsal.{key}={getattr(config, key)}: agent {type(self).__name__} has {key}={value}"
                )
        self.rehearsal = Rehearsal(config)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return clock, report and rehearsal, or adopt those that the trainer has already."""
        return [*super().configure_callbacks(), *self.adopt(Rehearsal, "rehearsal")]

    def cross_entropy(self, logits: Tensor, batch: Batch, part: slice) -> Tensor:
        """Return the weighted cross entropy of some rows of a batch, 0-dim, over the step's samples of all workers.

        Args:
            logits: ``(B, K)`` of the whole batch.
            batch: B samples.
            part: its rows.
        """
        trained, targets = self.trained(logits[part], batch.targets[part])
        return weighted_cross_entropy(trained, targets, batch.weights[part], batch.normaliser)
