"""BiC, bias correction.

Wu, Chen, Wang, Ye, Liu, Guo and Fu, "Large Scale Incremental Learning", CVPR 2019, arXiv 1905.13260.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dcl_lightning._lightning import datamodule_of
from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.agents.teacher import Teacher
from dcl_lightning.callbacks.evaluation import limited_ids
from dcl_lightning.errors import check_number
from dcl_lightning.functional.losses import distillation_share, tempered_distillation, weighted_cross_entropy
from dcl_lightning.functional.scores import SMALLEST_SCALE, fitted_bias, held_out
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch, Task

__all__ = ["BiC"]


class _Bias(nn.Module):
    """A linear function of each class's logit, the identity at first."""

    alpha: Tensor
    beta: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.ones(num_classes))
        self.register_buffer("beta", torch.zeros(num_classes))

    def forward(self, logits: Tensor) -> Tensor:
        """Return corrected logits ``(B, K)``."""
        return logits * self.alpha + self.beta


class BiC(RehearsingAgent):
    """Cross entropy and distillation; at the end of a task the logits of its classes are scaled and shifted.

    Scale and shift are fitted to samples that are held out of training: a share of all samples by their ids, of which
    those in the memories count. They are gathered, so that any number of workers finds the same from the same ones.
    Held-out samples go through the network with the others and train nothing, but for the statistics of batch
    normalisation. The scale is positive, see ``fitted_bias``; a warning says where it had to be kept so, and where too
    few held-out samples are stored to fit anything.

    Args:
        *args: arguments of ``RehearsingAgent``, by place.
        temperature: T of both softmaxes of the distillation, above 0.
        held_out: share of the samples that the correction is fitted to, in (0, 1).
        **kwargs: arguments of ``RehearsingAgent``, by name.

    Raises:
        ConfigurationError: one of the two is out of range.
    """

    scenarios = ("class",)
    short_name = "bic"
    papers = ("wu2019",)
    memory = RehearsalConfig(policy="class_balanced", quota="adaptive")
    required = {"update": "step", "weighting": "none"}

    def __init__(
        self,
        *args: Any,
        temperature: float = 2.0,
        held_out: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("model.temperature", temperature, above=0)
        check_number("model.held_out", held_out, above=0, below=1)
        self.temperature, self.held_out = temperature, held_out

    def build(self) -> None:
        """Make the correction, and the teacher."""
        super().build()
        self.bias = _Bias(self.num_classes)
        self.teacher = Teacher(self.backbone, self.head, self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return corrected logits ``(B, K)``."""
        return self.bias(super().forward(inputs))

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the samples of all workers that are not held out, and the logits."""
        logits, weights = self.outputs(batch), self._shares(batch)
        trained, targets = self.restrict_to_trained(logits, batch.targets)
        loss = weighted_cross_entropy(trained, targets, weights, 1.0)
        num_old, num_new = self._counts()
        if num_old:
            old = self.seen_classes & ~self.current_classes
            taught = self.teacher(batch.inputs)[:, old]
            kept = tempered_distillation(logits[:, old], taught, weights, 1.0, self.temperature)
            share = distillation_share(num_old, num_new)
            loss = (1 - share) * loss + share * kept
        return loss, logits

    def _shares(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` the weights of a batch's samples in the mean over all workers' that are not held out."""
        weights, new = batch.weights * ~self._held(batch.sample_ids), slice(batch.num_new)
        sums = self.comm.allreduce(torch.stack([weights[new].sum(), weights.sum()]), "mean")
        of_new, of_all = sums
        if self.rehearsal.config.loss == "mean":
            return weights / torch.where(of_all > 0, of_all, 1.0)
        # The sum of two means, over the new samples and over the representatives.
        of_old = of_all - of_new
        return torch.cat(
            [
                weights[new] / torch.where(of_new > 0, of_new, 1.0),
                weights[batch.num_new :] / torch.where(of_old > 0, of_old, 1.0),
            ]
        )

    def _counts(self) -> tuple[int, int]:
        # From the clock, which is on the host: a step does not wait for the device.
        present = self.clock.task_at(self.current_epoch)
        return sum(len(t.classes) for t in self.clock.tasks[:present]), len(self.clock.tasks[present].classes)

    def _held(self, ids: Tensor) -> Tensor:
        """Return ``(n,)`` bool, whether samples are held out."""
        return held_out(ids, self.held_out)

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes; at the start of a stream forget the corrections of an earlier one."""
        super().on_task_start(task)
        if task.index == 0:
            self.bias.alpha.fill_(1)
            self.bias.beta.zero_()

    def on_task_end(self, task: Task) -> None:
        """Correct the task's classes, and make the present network the teacher of the next."""
        if task.index:
            logits, targets = self._held_out_logits()
            columns = torch.nonzero(self.seen_classes).flatten().cpu()
            places = (self.seen_classes.cumsum(0) - 1).cpu()[targets]
            new = self.current_classes.cpu()[columns]
            alpha, beta = fitted_bias(logits[:, columns], places, new)
            self._warn_of_poor_fit(task, alpha, new[places])
            self.bias.alpha[self.current_classes], self.bias.beta[self.current_classes] = alpha, beta
        self.teacher.renew(self.backbone, self.head, self.bias)

    def _held_out_logits(self) -> tuple[Tensor, Tensor]:
        """Return logits ``(n, K)`` and labels of what is stored and held out, by ids, the same on all workers."""
        ids = self.stored_ids()
        ids = ids[self._held(ids)]
        ids, logits = self.training_outputs(limited_ids(self.trainer, ids), self, self.num_classes)
        return logits.float(), datamodule_of(self.trainer).train_targets[ids]

    def _warn_of_poor_fit(self, task: Task, alpha: float, is_new: Tensor) -> None:
        """Say where the correction is not what the held-out samples ask for.

        Args:
            task: the ended one.
            alpha: the scale found.
            is_new: ``(n,)`` bool, of each held-out sample whether its class is one of the task's.
        """
        for kind, count in (("its own classes", int(is_new.sum())), ("earlier classes", int((~is_new).sum()))):
            if not count:
                rank_zero_warn(
                    f"BiC does not correct task {task.index}: no held-out sample of {kind} is stored; enlarge "
                    f"rehearsal.buffer_size or model.held_out={self.held_out}"
                )
        if alpha < 2 * SMALLEST_SCALE:
            rank_zero_warn(
                f"BiC: on the held-out samples the logits of task {task.index}'s classes are worse than none; their "
                f"scale is kept at {alpha:.2g}: train longer, or enlarge rehearsal.buffer_size or "
                f"model.held_out={self.held_out}"
            )
