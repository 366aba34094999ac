"""LwF, learning without forgetting.

Li and Hoiem, "Learning without Forgetting", ECCV 2016 and TPAMI 2018, arXiv 1606.09282, figure 3 and equations 1 to 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.teacher import Teacher
from dcl_lightning.errors import check_number
from dcl_lightning.functional.losses import tempered_distillation
from dcl_lightning.types import Batch, Task

__all__ = ["LwF"]


class LwF(ContinualAgent):
    """Cross entropy on new samples, and on the same samples the outputs of the network before the task.

    The paper has a head for each task. Here is one head: the outputs of classes of earlier tasks are distilled, those
    that the labels train are set by ``train_classes``. The teacher sees the same view of a sample as the learner, not
    one recorded before the task, since augmentation is drawn anew each time. It keeps no samples.

    Args:
        *args: arguments of ``ContinualAgent``, by place.
        strength: factor of the distillation, the paper's lambda, at least 0.
        temperature: T of both softmaxes of the distillation, above 0.
        **kwargs: arguments of ``ContinualAgent``, by name.

    Raises:
        ConfigurationError: one of the two is out of range.
    """

    short_name = "lwf"
    papers = ("li2018",)
    taught: Tensor

    def __init__(
        self,
        *args: Any,
        strength: float = 1.0,
        temperature: float = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("model.strength", strength, at_least=0)
        check_number("model.temperature", temperature, above=0)
        self.strength, self.temperature = strength, temperature

    def build(self) -> None:
        """Make the teacher, and the mask of the classes that it knows."""
        super().build()
        self.teacher = Teacher(self.backbone, self.head)
        self.register_buffer("taught", torch.zeros(self.num_classes, dtype=torch.bool))

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the samples of all workers, and the logits."""
        logits = self(batch.inputs)
        loss = self.cross_entropy(logits, batch)
        if self.clock.task_at(self.current_epoch):
            outputs = self.teacher(batch.inputs)[:, self.taught]
            kept = tempered_distillation(
                logits[:, self.taught], outputs, batch.weights, batch.normalizer, self.temperature
            )
            loss = loss + self.strength * kept
        return loss, logits

    def on_task_end(self, task: Task) -> None:
        """Make the present network the teacher of the next task."""
        self.teacher.renew(self.backbone, self.head)
        self.taught.copy_(self.seen_classes)
