"""A-GEM, averaged gradient episodic memory.

Chaudhry, Ranzato, Rohrbach and Elhoseiny, "Efficient Lifelong Learning with A-GEM", ICLR 2019, arXiv 1812.00420,
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.agents.weights import flat_gradient, flat_gradients_of, sum_dtype, trained_parameters, write_gradient
from dcl_lightning.functional.losses import weighted_cross_entropy
from dcl_lightning.functional.regularization import agem_projection
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch, Task

__all__ = ["AGEM"]


class AGEM(RehearsingAgent):
    """Trains on new samples, along a direction that does not raise the loss on representatives of earlier tasks.

    Gradient and reference are those of all workers, and of all batches that a step accumulates.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        rehearsal: values of the memory that differ from the agent's own, as a configuration or a dict.
        **kwargs: arguments of ``ContinualAgent``.
    """

    memory: ClassVar[RehearsalConfig] = RehearsalConfig(
        policy="class_balanced", update="task_end", draw_from="past", loss="sum"
    )
    required: ClassVar[dict[str, Any]] = {"draw_from": "past", "weighting": "none", "loss": "sum"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, **kwargs)
        self._reference: Tensor | None = None

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the new samples of all workers, and the logits of all samples."""
        new, old = slice(batch.num_new), slice(batch.num_new, None)
        seen = batch.inputs.new_zeros(0, self.num_classes)
        if self.clock.task_at(self.current_epoch):
            parameters = trained_parameters(self)
            if self._reference is None:
                size = sum(p.numel() for p in parameters)
                self._reference = torch.zeros(size, dtype=sum_dtype(parameters), device=self.device)
            if len(batch.targets) > batch.num_new:
                seen = self(batch.inputs[old])
                trained, targets = self.trained(seen, batch.targets[old])
                loss = weighted_cross_entropy(trained, targets, batch.weights[old], batch.normalizer)
                self._reference += flat_gradients_of(loss, parameters)
        logits = self(batch.inputs[new])
        return self.cross_entropy(logits, batch, new), torch.cat([logits, seen.detach().to(logits)])

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes; forget the reference of a step that was broken off."""
        super().on_task_start(task)
        self._reference = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Project the gradient, which is that of all workers by now."""
        if self._reference is not None:
            # Every worker takes part, also one that has nothing to rehearse yet.
            reference, self._reference = self.comm.allreduce(self._reference, "mean"), None
            parameters = trained_parameters(self)
            write_gradient(parameters, agem_projection(flat_gradient(parameters).to(reference), reference))
            self._reference = None
