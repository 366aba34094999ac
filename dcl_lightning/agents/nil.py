"""NIL, naive incremental learning with rehearsal.

Muñoz, Narváez, Cobos, Mendoza and Herrera, "Incremental learning model inspired in Rehearsal for deep
convolutional networks", Knowledge-Based Systems 208:106460, 2020; distributed and managed in the
background as in Bouvier et al., "Efficient Data-Parallel Continual Learning with Asynchronous
Distributed Rehearsal Buffers", CCGrid 2024, arXiv 2406.03285.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor, nn

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.rehearsing import refuse_another_memory
from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["NIL"]


class NIL(ContinualAgent):
    """Cross entropy on new samples and representatives, those weighted by how seldom their class is stored.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        rehearsal: the memory, its draws and who does the work.
        **kwargs: arguments of ``ContinualAgent``.

    Raises:
        ConfigurationError: a value of the memory is not the one that a short name stands for.
    """

    rehearses = True
    boundaries = ("known", "hidden")
    # What a short name stands for; another value is refused.
    fixed: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **kwargs)
        config = RehearsalConfig(**rehearsal) if isinstance(rehearsal, dict) else rehearsal or RehearsalConfig()
        # A whole configuration does not tell what was given from what it has by default.
        given = rehearsal if isinstance(rehearsal, dict) else vars(config)
        for key, value in self.fixed.items():
            neutral = value if isinstance(rehearsal, dict) else getattr(RehearsalConfig, key)
            if given.get(key, value) not in (value, neutral):
                raise ConfigurationError(
                    f"rehearsal.{key}={given[key]}: agent {type(self).__name__} has {key}={value}: take --model nil"
                )
        self.rehearsal = Rehearsal(replace(config, **self.fixed))

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return clock, report and rehearsal, or adopt those that the trainer has already."""
        refuse_another_memory(self.trainer, self.rehearsal, replace(RehearsalConfig(), **self.fixed), self.fixed)
        return [*super().configure_callbacks(), *self.adopt(Rehearsal, "rehearsal")]

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the weighted cross entropy over the step's samples of all workers, and the logits."""
        logits = self(batch.inputs)
        return self.cross_entropy(logits, batch), logits
