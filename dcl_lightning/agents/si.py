"""SI, synaptic intelligence.

Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017, arXiv 1703.04200, equations 3
to 5.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.weights import flat_gradient, flat_weights, trained_parameters
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional.penalties import (
    quadratic_penalty,
    quadratic_penalty_gradient,
    si_importance,
    si_path,
)
from dcl_lightning.types import Batch, Task

__all__ = ["SI"]


class SI(ContinualAgent):
    """Cross entropy, and a penalty on moving weights by how much they lowered the loss of earlier tasks on their way.

    The way is that of the weights after each step of the optimizer, the gradient that of all workers. It keeps no
    samples.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        strength: factor of the penalty, the paper's c, at least 0.
        damping: the paper's xi, above 0.
        **kwargs: arguments of ``ContinualAgent``.

    Raises:
        ConfigurationError: one of the two is out of range.
    """

    importance: Tensor
    anchor: Tensor
    path: Tensor

    def __init__(
        self, backbone: nn.Module, num_classes: int, strength: float = 0.1, damping: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(backbone, num_classes, **kwargs)
        if strength < 0 or damping <= 0:
            raise ConfigurationError(f"model.strength={strength} must be at least 0, damping={damping} above 0")
        self.strength, self.damping = strength, damping
        size = sum(p.numel() for p in trained_parameters(self))
        for name in ("importance", "anchor", "path"):
            self.register_buffer(name, torch.zeros(size))
        self._before: tuple[Tensor, Tensor] | None = None

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the samples of all workers, and the logits."""
        logits = self(batch.inputs)
        loss = self.cross_entropy(logits, batch)
        if self.clock.task_at(self.current_epoch):
            weights = flat_weights(trained_parameters(self))
            loss = loss + self.strength * quadratic_penalty(weights, self.anchor, self.importance)
        return loss, logits

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes and where its way begins."""
        super().on_task_start(task)
        if task.index == 0:
            self.importance.zero_()
        self.path.zero_()
        self.anchor.copy_(flat_weights(trained_parameters(self)).detach())

    def on_task_end(self, task: Task) -> None:
        """Add what each weight did for the task to what it did before."""
        weights = flat_weights(trained_parameters(self)).detach()
        self.importance.copy_(si_importance(self.importance, self.path, weights, self.anchor, self.damping))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return optimizer and schedule, with a look at the weights after each step."""
        configured: Any = super().configure_optimizers()
        configured["optimizer"].register_step_post_hook(self._after_step)
        return configured

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note weights and gradient, which is that of all workers by now, less the penalty's own."""
        parameters = trained_parameters(self)
        weights = flat_weights(parameters).detach()
        gradient = flat_gradient(parameters)
        if self.clock.task_at(self.current_epoch):
            gradient -= self.strength * quadratic_penalty_gradient(weights, self.anchor, self.importance)
        self._before = weights, gradient

    def _after_step(self, *_: Any) -> None:
        if self._before is not None:
            (before, gradient), self._before = self._before, None
            after = flat_weights(trained_parameters(self)).detach()
            self.path.copy_(si_path(self.path, gradient, before, after))
