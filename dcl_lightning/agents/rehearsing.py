"""What every agent with a rehearsal memory shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["DarkReplay", "RehearsingAgent", "refuse_another_memory"]


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
        refuse_another_memory(self.trainer, self.rehearsal, self.memory, self.required)
        return [*super().configure_callbacks(), *self.adopt(Rehearsal, "rehearsal")]


def refuse_another_memory(
    trainer: pl.Trainer, own: Rehearsal, by_default: RehearsalConfig, required: Mapping[str, Any]
) -> None:
    """Refuse a ``Rehearsal`` among the trainer's callbacks that contradicts the agent's own memory.

    Args:
        trainer: has the callbacks.
        own: the agent's.
        by_default: the agent's memory where nothing is said.
        required: values without which it would be another method.

    Raises:
        ConfigurationError: both values are named.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, Rehearsal) or callback is own:
            continue
        for field in fields(RehearsalConfig):
            key = field.name
            ours, theirs = getattr(own.config, key), getattr(callback.config, key)
            if ours != theirs and (ours != getattr(by_default, key) or key in required):
                raise ConfigurationError(
                    f"model.rehearsal.{key}={ours} and {key}={theirs} of the Rehearsal among the callbacks contradict "
                    "each other: leave one of them out"
                )


class DarkReplay(RehearsingAgent):
    """What DER and DER++ share: all K raw logits of the augmented view that was trained on are stored with each sample.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        rehearsal: the memory, its draws and who does the work.
        **kwargs: arguments of ``ContinualAgent``.
    """

    boundaries = ("known", "hidden")
    memory: ClassVar[RehearsalConfig] = RehearsalConfig(policy="reservoir", weighting="none", loss="sum")
    required: ClassVar[dict[str, Any]] = {"weighting": "none", "loss": "sum"}

    def __init__(
        self, backbone: nn.Module, num_classes: int, rehearsal: RehearsalConfig = memory, **kwargs: Any
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, **kwargs)
        self.row_shapes = {"logits": (num_classes,)}
        self._logits = torch.zeros(0, num_classes)

    def keep(self, logits: Tensor, batch: Batch) -> None:
        """Keep the logits ``(B, K)`` of a step's new samples for the memory."""
        self._logits = logits[: batch.num_new].detach()

    def columns_of_step(self) -> dict[str, Tensor]:
        """Return the logits of the step's new samples."""
        return {"logits": self._logits}

    def columns_of(self, batch: Batch) -> dict[str, Tensor]:
        """Return the logits of samples as evaluation sees them."""
        return {"logits": self(batch.inputs)}
