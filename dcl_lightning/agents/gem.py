"""GEM and A-GEM, gradient episodic memory and its averaged form.

Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, arXiv 1706.08840, algorithm 1.
Chaudhry, Ranzato, Rohrbach and Elhoseiny, "Efficient Lifelong Learning with A-GEM", ICLR 2019, arXiv 1812.00420,
algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from dcl_lightning.agents.optimization import (
    flat_gradient,
    flat_gradients_of,
    sum_dtype,
    trained_parameters,
    write_gradient,
)
from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.errors import check_number
from dcl_lightning.functional.losses import weighted_cross_entropy
from dcl_lightning.functional.regularization import agem_projection, gem_projection
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch, Task

__all__ = ["AGEM", "GEM"]

_MEMORY = RehearsalConfig(policy="class_balanced", update="task_end", draw_from="past", loss="sum")
_REQUIRED = {"draw_from": "past", "weighting": "none", "loss": "sum"}


class AGEM(RehearsingAgent):
    """Trains on new samples, along a direction that does not raise the loss on representatives of earlier tasks.

    Gradient and reference are those of all workers, and of all batches that a step accumulates. Rehearsed and new
    samples go through the network apart, the rehearsed ones first. Arguments as in ``RehearsingAgent``.
    """

    fixed_arguments = ("forward",)
    heads = ("linear", "cosine", "per_task")
    short_name = "agem"
    papers = ("chaudhry2019agem",)
    needs_whole_weights = "projects the gradient of all weights at once"
    memory = _MEMORY
    required = _REQUIRED
    _reference: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, forward="joint", **kwargs)

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
                trained, targets = self.restrict_to_trained(seen, batch.targets[old])
                loss = weighted_cross_entropy(trained, targets, batch.weights[old], batch.normalizer)
                self._reference += flat_gradients_of(loss, parameters)
        logits = self(batch.inputs[new])
        return self.cross_entropy(logits, batch, new), torch.cat([logits, seen.detach().to(logits)])

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes; drop the reference of a step that was broken off."""
        super().on_task_start(task)
        self._reference = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Project the gradient, which is that of all workers by now."""
        if self._reference is not None:
            # Every worker takes part, also one that has nothing to rehearse yet.
            reference, self._reference = self.comm.allreduce(self._reference, "mean"), None
            parameters = trained_parameters(self)
            write_gradient(parameters, agem_projection(flat_gradient(parameters).to(reference), reference))


class GEM(RehearsingAgent):
    """Trains on new samples, along the nearest direction that raises the loss on no earlier task.

    The loss on a task is that of its representatives of this step, over all workers. The paper takes all that are
    stored: give ``num_samples`` as large as the memory. A step costs a backward pass and P numbers for each earlier
    task. The representatives of all batches that a step accumulates count. Rehearsed and new samples go through the
    network apart, the rehearsed ones first.

    Args:
        *args: arguments of ``RehearsingAgent``, by place.
        margin: least share of each earlier task's gradient where the direction is changed, at least 0.
        **kwargs: arguments of ``RehearsingAgent``, by name.

    Raises:
        ConfigurationError: the margin is below 0.
    """

    fixed_arguments = ("forward",)
    heads = ("linear", "cosine", "per_task")
    keeps_graph = True
    short_name = "gem"
    papers = ("lopezpaz2017",)
    needs_whole_weights = "projects the gradient of all weights at once"
    memory = _MEMORY
    required = _REQUIRED
    # Gradients of each earlier task's samples, in the last column their number.
    _sums: Tensor | None = None

    def __init__(self, *args: Any, margin: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, forward="joint", **kwargs)
        check_number("model.margin", margin, at_least=0)
        self.margin = margin

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the new samples of all workers, and the logits of all samples."""
        new = slice(batch.num_new)
        seen = self._add_gradients_of_tasks(batch)
        logits = self(batch.inputs[new])
        return self.cross_entropy(logits, batch, new), torch.cat([logits, seen.to(logits)])

    def _add_gradients_of_tasks(self, batch: Batch) -> Tensor:
        """Add the gradients of each earlier task's representatives to the step's, and return their logits."""
        old, seen = slice(batch.num_new, None), batch.inputs.new_zeros(0, self.num_classes)
        past = self.clock.task_at(self.current_epoch)
        if not past:
            return seen
        parameters = trained_parameters(self)
        if self._sums is None:
            width = sum(p.numel() for p in parameters) + 1
            self._sums = torch.zeros(past, width, dtype=sum_dtype(parameters), device=self.device)
        if len(batch.targets) > batch.num_new:
            seen = self(batch.inputs[old])
            losses = F.cross_entropy(*self.restrict_to_trained(seen, batch.targets[old]), reduction="none")
            for task in range(past):
                chosen = batch.task_ids[old] == task
                self._sums[task, :-1] += flat_gradients_of((losses * chosen).sum(), parameters, keep_graph=True)
                self._sums[task, -1] += chosen.sum()
        return seen.detach()

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes; drop the gradients of a step that was broken off."""
        super().on_task_start(task)
        self._sums = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Project the gradient, which is that of all workers by now."""
        if self._sums is not None:
            # Every worker takes part, also one that has nothing to rehearse.
            sums, self._sums = self.comm.allreduce(self._sums), None
            stored = sums[:, -1] > 0
            references = sums[stored, :-1] / sums[stored, -1:]
            parameters = trained_parameters(self)
            gradient = flat_gradient(parameters).to(references)
            write_gradient(parameters, gem_projection(gradient, references, self.margin))
