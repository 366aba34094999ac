"""What every agent with a rehearsal memory shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import lightning.pytorch as pl

from dcl_lightning._lightning import callbacks_of
from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.backbones.short_names import Network
from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import SIZES, RehearsalConfig, resolve

__all__ = ["RehearsingAgent"]


class RehearsingAgent(ContinualAgent):
    """A learner whose batches are joined by representatives of earlier ones.

    Args:
        backbone: module that makes features, or its name; for it and for all that is not named here see
            ``ContinualAgent``.
        num_classes: classes of the whole stream, K; the data module's if None.
        rehearsal: values of the memory that differ from ``memory``, as a configuration or a dict.
        **kwargs: arguments of ``ContinualAgent``.

    Raises:
        ConfigurationError: values of the memory contradict each other, or ``required``.
    """

    rehearses = True
    # The method's own memory: what is not said otherwise. A subclass gives what differs from its base's, and has it
    # completed by that.
    memory: ClassVar[RehearsalConfig] = resolve(RehearsalConfig())
    # Values of the memory without which it would be another method.
    required: ClassVar[dict[str, Any]] = {"weighting": "none"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "memory" in vars(cls):
            base: Any = next(kind for kind in cls.__mro__[1:] if "memory" in vars(kind))
            cls.memory = resolve(cls.memory, base.memory, owner=f"agent {base.__name__}")

    def __init__(
        self,
        backbone: Network,
        num_classes: int | None = None,
        rehearsal: RehearsalConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **kwargs)
        self._given = RehearsalConfig.of(rehearsal)
        self.rehearsal = Rehearsal(self._given)
        self._complete(self.rehearsal)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return clock, report and rehearsal, or adopt those that the trainer has already.

        Raises:
            ConfigurationError: a ``Rehearsal`` among the trainer's callbacks contradicts the agent.
        """
        theirs = [c for c in callbacks_of(self.trainer) if isinstance(c, Rehearsal)]
        for rehearsal in theirs or [self.rehearsal]:
            if rehearsal is not self.rehearsal:
                self._refuse_contradiction(rehearsal)
            self._complete(rehearsal)
        return [*super().configure_callbacks(), *self.adopt(Rehearsal, "rehearsal")]

    def _complete(self, rehearsal: Rehearsal) -> None:
        own, owner = (self.memory, self._given), f"agent {type(self).__name__}"
        config = rehearsal.complete(*own, required=self.required, owner=owner)
        if "rehearsal" in self.hparams:  # else a subclass has left it out
            self.save_hyperparameters({"rehearsal": asdict(config)}, logger=self._log_hyperparams)

    def _refuse_contradiction(self, theirs: Rehearsal) -> None:
        for name, value in self._given.explicit.items():
            rivals = SIZES if name in SIZES else (name,)
            for key, other in theirs.given.explicit.items():
                if key in rivals and (key, other) != (name, value):
                    raise ConfigurationError(
                        f"model.rehearsal.{name}={value} and {key}={other} of the Rehearsal among the callbacks "
                        "contradict each other: leave one of them out"
                    )
