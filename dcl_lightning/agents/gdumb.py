"""GDumb, a greedy sampler and a dumb learner.

Prabhu, Torr and Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", ECCV 2020,
algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.agents.weights import flat_weights, trained_parameters
from dcl_lightning.functional.losses import weighted_cross_entropy
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["GDumb"]


class GDumb(RehearsingAgent):
    """Trains on what is stored alone, from the initial weights at each task.

    The paper trains when it is asked for a prediction, over a memory that is full. Here that is each task's epochs,
    and the first of them also fills the memory: of a task it needs a second epoch or more. New samples train nothing,
    the statistics of batch normalisation included. The paper's CutMix and its schedule are not part of it.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        rehearsal: values of the memory that differ from the agent's own, as a configuration or a dict.
        **kwargs: arguments of ``ContinualAgent``.
    """

    memory: ClassVar[RehearsalConfig] = RehearsalConfig(policy="greedy", quota="adaptive", loss="sum")
    required: ClassVar[dict[str, Any]] = {"update": "step", "draw_from": "seen", "weighting": "none", "loss": "sum"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, reset_state_dict=True, **kwargs)
        self.hparams.pop("reset_state_dict", None)  # part of the method, not to be given when a checkpoint is loaded

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the representatives of all workers, and their logits."""
        old = slice(batch.num_new, None)
        if not len(batch.targets[old]):  # nothing is stored yet; the step still has a gradient, which is 0
            return 0.0 * flat_weights(trained_parameters(self)).sum(), batch.inputs.new_zeros(0, self.num_classes)
        logits = self(batch.inputs[old])
        trained, targets = self.trained(logits, batch.targets[old])
        return weighted_cross_entropy(trained, targets, batch.weights[old], batch.normalizer), logits
