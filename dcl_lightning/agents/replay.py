"""What every agent with a rehearsal memory shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from dcl_lightning._lightning import callbacks_of, synchronises_batchnorm
from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.backbones.short_names import Network
from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import SIZES, RehearsalConfig, resolve
from dcl_lightning.types import Batch

__all__ = ["RehearsingAgent"]


class RehearsingAgent(ContinualAgent):
    """A learner whose batches are joined by representatives of earlier ones.

    Args:
        backbone: module that makes features, or its name; for it and for all that is not named here see
            ``ContinualAgent``.
        num_classes: classes of the whole stream, K; the data module's if None.
        rehearsal: values of the memory that differ from ``memory``, as a configuration or a dict.
        forward: new and rehearsed rows go through the network together (``joint``), or the new ones first and the
            rehearsed ones after them (``separate``): batch normalisation then has statistics of its own for each, as in
            the programs of ER-ACE (Caccia et al. 2022) and DER (Buzzega et al. 2020).
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
        *,
        forward: Literal["joint", "separate"] = "joint",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **kwargs)
        self._two_passes = forward == "separate"
        self._given = RehearsalConfig.of(rehearsal)
        self.rehearsal = Rehearsal(self._given)
        self._complete(self.rehearsal)

    def outputs(self, batch: Batch, network: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the logits ``(B, K)`` of a training batch, from one pass through the network or, by ``forward``, two.

        Every method that trains on both kinds of rows in one loss takes its logits from here.

        Args:
            batch: of training.
            network: what makes outputs ``(B, d)`` of inputs, if not the agent itself.
        """
        new, network = batch.num_new, network or self
        if not self._two_passes or new == len(batch.targets):
            return network(batch.inputs)
        return torch.cat([network(batch.inputs[:new]), network(batch.inputs[new:])])

    def class_counts(self, batch: Batch, rows: slice = slice(None)) -> Tensor:
        """Return the samples ``(K,)`` of each class in a batch on all workers; every worker calls it.

        Args:
            batch: of training; rows of weight 0 only pad this worker's share and do not count.
            rows: those of the batch that count.
        """
        counts = batch.weights.new_zeros(self.num_classes)
        return self.comm.allreduce(counts.index_add_(0, batch.targets[rows], (batch.weights[rows] > 0).to(counts)))

    def stored_ids(self) -> Tensor:
        """Return the sample ids ``(n,)`` int64 of what all workers store, ascending; every worker calls it."""
        manager, replay = self.rehearsal.manager, self.rehearsal.replay
        assert manager is not None
        if replay is not None:
            replay.wait()
        stored = manager.memory_rows()
        assert stored is not None
        return torch.cat(self.comm.allgather(stored.sample_ids.cpu())).unique()

    def setup(self, stage: str) -> None:
        """Refuse two passes where workers wait for each other in each: a worker without representatives makes only one.

        Raises:
            ConfigurationError: with the remedy.
        """
        super().setup(stage)
        if stage == "fit" and self._two_passes and synchronises_batchnorm(self.trainer) and self.trainer.world_size > 1:
            raise ConfigurationError(
                "model.forward=separate does not go with trainer.sync_batchnorm=true: a worker without representatives "
                "makes no second pass, and the others would wait for it; give model.forward=joint, or leave "
                "sync_batchnorm out"
            )

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
