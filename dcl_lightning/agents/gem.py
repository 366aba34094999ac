"""GEM, gradient episodic memory.

Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, arXiv 1706.08840, algorithm 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from dcl_lightning.agents.rehearsing import RehearsingAgent
from dcl_lightning.agents.weights import flat_gradient, flat_gradients_of, sum_dtype, trained_parameters, write_gradient
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional.projections import gem_projection
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["GEM"]


class GEM(RehearsingAgent):
    """Trains on new samples, along the nearest direction that raises the loss on no earlier task.

    The loss on a task is that of its representatives of this step, over all workers. The paper takes all that are
    stored: give ``num_samples`` as large as the memory. A step costs a backward pass and P numbers for each earlier
    task. With accumulated batches the references are the last one's.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        rehearsal: the memory, its draws and who does the work.
        margin: least share of each earlier task's gradient where the direction is changed, at least 0.
        **kwargs: arguments of ``ContinualAgent``.

    Raises:
        ConfigurationError: the margin is below 0.
    """

    memory: ClassVar[RehearsalConfig] = RehearsalConfig(
        policy="class_balanced", update="task_end", rehearse="past", weighting="none", loss="sum"
    )
    required: ClassVar[dict[str, Any]] = {"rehearse": "past", "weighting": "none", "loss": "sum"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig = memory,
        margin: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, **kwargs)
        if margin < 0:
            raise ConfigurationError(f"model.margin={margin}: give at least 0")
        self.margin = margin
        self._references: Tensor | None = None

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the new samples of all workers, and the logits of all samples."""
        new = slice(batch.num_new)
        self._references, seen = self._gradients_of_tasks(batch)
        logits = self(batch.inputs[new])
        return self.cross_entropy(logits, batch, new), torch.cat([logits, seen.to(logits)])

    def _gradients_of_tasks(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """Return a row for each earlier task that is rehearsed, ``(t, P)``, and the representatives' logits."""
        old, seen = slice(batch.num_new, None), batch.inputs.new_zeros(0, self.num_classes)
        past = self.clock.task_at(self.current_epoch)
        if not past:
            return None, seen
        parameters = trained_parameters(self)
        # The last column counts samples; every worker takes part, also one that has nothing to rehearse.
        width = sum(p.numel() for p in parameters) + 1
        sums = torch.zeros(past, width, dtype=sum_dtype(parameters), device=self.device)
        if len(batch.targets) > batch.num_new:
            seen = self(batch.inputs[old])
            losses = F.cross_entropy(*self.trained(seen, batch.targets[old]), reduction="none")
            for task in range(past):
                chosen = batch.task_ids[old] == task
                sums[task, :-1] = flat_gradients_of((losses * chosen).sum(), parameters, keep_graph=True)
                sums[task, -1] = chosen.sum()
        sums = self.comm.allreduce(sums)
        there = sums[:, -1] > 0
        return sums[there, :-1] / sums[there, -1:], seen.detach()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Project the gradient, which is that of all workers by now."""
        if self._references is not None:
            parameters = trained_parameters(self)
            gradient = flat_gradient(parameters).to(self._references)
            write_gradient(parameters, gem_projection(gradient, self._references, self.margin))
            self._references = None
