"""SI, synaptic intelligence.

Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017, arXiv 1703.04200, equations 3
to 5.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.optimization import (
    fit_vectors,
    flat_gradient,
    flat_weights,
    trained_parameters,
    trained_part,
)
from dcl_lightning.errors import check_number
from dcl_lightning.functional.regularization import (
    quadratic_penalty,
    quadratic_penalty_gradient,
    si_importance,
    si_path,
)
from dcl_lightning.types import Batch, Task

__all__ = ["SI"]

_VECTORS = ("importance", "anchor", "path")


class SI(ContinualAgent):
    """Cross entropy, and a penalty on moving weights by how much their path has lowered the loss of earlier tasks.

    The path is that of the weights after each step of the optimizer, the gradient that of all workers. SI keeps no
    samples, but three numbers for each weight. A frozen weight has no path.

    Args:
        *args: arguments of ``ContinualAgent``, by place.
        strength: factor of the penalty, the paper's c, at least 0.
        damping: the paper's xi, above 0.
        **kwargs: arguments of ``ContinualAgent``, by name.

    Raises:
        ConfigurationError: one of the two is out of range.
    """

    heads = ("linear", "cosine", "per_task")
    short_name = "si"
    papers = ("zenke2017",)
    needs_whole_weights = "follows the path of all weights"
    importance: Tensor
    anchor: Tensor
    path: Tensor

    def __init__(
        self,
        *args: Any,
        strength: float = 0.1,
        damping: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("model.strength", strength, at_least=0)
        check_number("model.damping", damping, above=0)
        self.strength, self.damping = strength, damping
        self._before: tuple[Tensor, Tensor] | None = None
        self._accumulated = 0  # batches whose gradients are summed up for the next step

    def build(self) -> None:
        """Make the vectors, with a number for each weight."""
        super().build()
        for name in _VECTORS:
            self.register_buffer(name, torch.zeros(0))
        fit_vectors(self, *_VECTORS)

    def setup(self, stage: str) -> None:
        """Count the weights anew: the network may have been changed since it was given."""
        super().setup(stage)
        if self.is_built:
            fit_vectors(self, *_VECTORS)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the samples of all workers, and the logits."""
        logits = self(batch.inputs)
        loss = self.cross_entropy(logits, batch)
        self._accumulated += 1
        if self.clock.task_at(self.current_epoch):
            weights = flat_weights(trained_parameters(self))
            anchor, importance = (trained_part(vector, self) for vector in (self.anchor, self.importance))
            loss = loss + self.strength * quadratic_penalty(weights, anchor, importance)
        return loss, logits

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes and where its path begins."""
        super().on_task_start(task)
        if task.index == 0:
            self.importance.zero_()
        self.path.zero_()
        self.anchor.copy_(flat_weights(self.parameters()).detach())
        self._before, self._accumulated = None, 0

    def on_task_end(self, task: Task) -> None:
        """Add what each weight did for the task to what it did before."""
        weights = flat_weights(self.parameters()).detach()
        self.importance.copy_(si_importance(self.importance, self.path, weights, self.anchor, self.damping))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return optimizer and schedule; note the path after each step."""
        configured: Any = super().configure_optimizers()
        configured["optimizer"].register_step_post_hook(self._after_step)
        return configured

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note weights and gradient, which is that of all workers by now, less the penalty's own."""
        weights, gradient = flat_weights(self.parameters()).detach(), flat_gradient(self.parameters())
        # The last step of an epoch may sum up fewer batches than the others, each divided by the same number.
        share, self._accumulated = self._accumulated / self.trainer.accumulate_grad_batches, 0
        if self.clock.task_at(self.current_epoch):
            pull = quadratic_penalty_gradient(weights, self.anchor, self.importance)
            gradient -= share * self.strength * pull
        self._before = weights, gradient

    def _after_step(self, *_: object) -> None:
        if self._before is not None:
            (before, gradient), self._before = self._before, None
            after = flat_weights(self.parameters()).detach()
            self.path.copy_(si_path(self.path, gradient, before, after))
