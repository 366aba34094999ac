"""EWC, elastic weight consolidation, in its online form.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796, equation 3;
one penalty for all tasks as in Schwarz et al., "Progress & Compress", ICML 2018, arXiv 1805.06370, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.weights import flat_weights, trained_parameters
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional.penalties import merged_fisher, quadratic_penalty
from dcl_lightning.types import Batch, Task

__all__ = ["EWC"]

_CHUNK = 16  # samples whose gradients are held at once


class EWC(ContinualAgent):
    """Cross entropy, and a penalty on moving weights by how much the outputs on earlier tasks depended on them.

    How much is the diagonal of the Fisher information, from the gradients of single samples with their labels in
    evaluation mode, over the taskset of all workers. It keeps no samples.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        strength: factor of half the penalty, the papers' lambda, at least 0. A step is stable where ``lr`` times this
            times the largest Fisher information stays below 2; what is well trained has little, and bears more.
        decay: what is kept of the Fisher information at each further task, gamma, in [0, 1].
        fisher_samples: samples of a taskset that it is estimated from; all if None.
        **kwargs: arguments of ``ContinualAgent``.

    Raises:
        ConfigurationError: one of the three is out of range.
    """

    fisher: Tensor
    anchor: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        strength: float = 1.0,
        decay: float = 1.0,
        fisher_samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **kwargs)
        if strength < 0 or not 0 <= decay <= 1 or (fisher_samples is not None and fisher_samples < 1):
            raise ConfigurationError(
                f"model.strength={strength} must be at least 0, decay={decay} in [0, 1], "
                f"fisher_samples={fisher_samples} at least 1, or None for all"
            )
        self.strength, self.decay, self.fisher_samples = strength, decay, fisher_samples
        size = sum(p.numel() for p in trained_parameters(self))
        self.register_buffer("fisher", torch.zeros(size))
        self.register_buffer("anchor", torch.zeros(size))

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the samples of all workers, and the logits."""
        logits = self(batch.inputs)
        loss = self.cross_entropy(logits, batch)
        if self.clock.task_at(self.current_epoch):
            weights = flat_weights(trained_parameters(self))
            loss = loss + self.strength / 2 * quadratic_penalty(weights, self.anchor, self.fisher)
        return loss, logits

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes; at the start of a stream forget what mattered to an earlier one."""
        super().on_task_start(task)
        if task.index == 0:
            self.fisher.zero_()

    def on_task_end(self, task: Task) -> None:
        """Measure what the task's outputs depend on, and hold on to the present weights."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        ids = data.train_indices(task.index)
        if self.fisher_samples is not None:
            order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(task.index))
            ids = ids[order[: self.fisher_samples]]
        was_training = self.training
        self.eval()
        total = torch.zeros_like(self.fisher)
        for batch in data.train_eval_loader(ids):
            batch = data.prepare_batch(move_data_to_device(batch, self.device), train=False, epoch=0)
            for inputs, targets in zip(batch.inputs.split(_CHUNK), batch.targets.split(_CHUNK), strict=True):
                total += self._squares(inputs, targets)
        self.train(was_training)
        self.fisher.copy_(merged_fisher(self.fisher, self.comm.allreduce(total) / len(ids), self.decay))
        self.anchor.copy_(flat_weights(trained_parameters(self)).detach())

    def _squares(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared gradients ``(P,)`` of the samples' log-likelihoods, summed over the samples."""
        weights = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

        def loss(weights: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
            logits = functional_call(self, weights, (image[None],))
            trained, places = self.trained(logits, target[None])
            return F.cross_entropy(trained, places)

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, inputs, targets)
        return torch.cat([gradients[name].square().sum(0).reshape(-1) for name in weights])
