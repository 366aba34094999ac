"""iCaRL as the online literature runs it: a reservoir in place of herding, and a teacher for what is rehearsed.

Rebuffi, Kolesnikov, Sperl and Lampert, "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017,
arXiv 1611.07725; as in the program of Caccia, Aljundi, Asadi, Tuytelaars, Pineau and Belilovsky, "New Insights on
Reducing Abrupt Representation Change in Online Continual Learning", ICLR 2022, arXiv 2104.05025
(github.com/pclucas14/AML, ``methods/icarl.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dcl_lightning.agents.nearest_mean import NearestMeanReplay
from dcl_lightning.agents.teacher import Teacher
from dcl_lightning.functional.losses import icarl_loss
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch, Task

__all__ = ["OnlineICaRL"]


class OnlineICaRL(NearestMeanReplay):
    """Sigmoid outputs learn the labels of new samples, and of rehearsed ones what they were at the last task's end.

    Both losses are binary cross entropies, added up over all outputs. The memory is a reservoir of all samples, and
    those of earlier tasks are rehearsed. The predicted class is the one with the nearest mean over what is stored;
    unlike those of ``icarl``, features and means are not divided by their norms. Arguments as in ``RehearsingAgent``.
    """

    unit_norm = False
    short_name = "icarl_online"
    papers = ("rebuffi2017", "caccia2022")
    memory = RehearsalConfig(draw_from="past", loss="sum")
    required = {"draw_from": "past", "weighting": "none", "loss": "sum"}

    def build(self) -> None:
        """Make the teacher."""
        super().build()
        self.teacher = Teacher(self.backbone, self.head)

    def on_task_end(self, task: Task) -> None:
        """Make the present network the teacher of the next task."""
        self.teacher.renew(self.backbone, self.head)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of both losses, each a mean over the samples of all workers, and the logits."""
        logits, new = self.outputs(batch), batch.num_new
        soft = F.one_hot(batch.targets[:new], self.num_classes).to(logits.dtype)
        if new < len(batch.targets):
            soft = torch.cat([soft, self.teacher(batch.inputs[new:]).sigmoid()])
        return icarl_loss(logits, soft, batch.weights, batch.normalizer, 1.0, self.trained_columns()), logits
