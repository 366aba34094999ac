"""ER, experience replay, and ER-ACE, its asymmetric cross entropy.

Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr and Ranzato, "On Tiny Episodic Memories in Continual Learning",
2019, arXiv 1902.10486, algorithm 1.
Caccia, Aljundi, Asadi, Tuytelaars, Pineau and Belilovsky, "New Insights on Reducing Abrupt Representation Change in
Online Continual Learning", ICLR 2022, arXiv 2104.05025, equations 4 and 5.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.functional.losses import asymmetric_cross_entropy
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["ER", "ERACE"]


class ER(RehearsingAgent):
    """Cross entropy on new samples and representatives alike; arguments as in ``RehearsingAgent``.

    The paper's memory is a reservoir that is filled at every step. With ``class_balanced``, ``adaptive``, ``task_end``
    and ``past`` it is the replay of other libraries, which is several points better on small memories.
    """

    boundaries = ("known", "hidden")
    heads = ("linear", "cosine", "per_task")
    short_name = "er"
    papers = ("chaudhry2019er",)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy over the step's samples of all workers, and the logits."""
        logits = self.outputs(batch)
        return self.cross_entropy(logits, batch), logits


class ERACE(RehearsingAgent):
    """The loss separates new samples from each other only, representatives from all classes.

    So new classes do not push the outputs of old ones down. The classes of the new samples are those of the step's
    samples on all workers, so that N workers have the loss of one process with the N-fold batch.

    A class is met with the first sample of it that is trained on, on any worker. The official program
    (github.com/pclucas14/AML, ``methods/er_ace.py``) opens the outputs of the batch's classes and of all from the
    highest class met on, where classes are numbered as they come. ``unmet_classes: open`` says the same of classes in
    any order. They differ in a batch that lacks the highest class met: there the program opens that class, too.

    Args:
        *args: arguments of ``RehearsingAgent``, by place.
        unmet_classes: whether the new samples' loss leaves out the outputs of classes that no sample was of so far
            (``masked``, the paper), or pushes them down (``open``, its program).
        **kwargs: arguments of ``RehearsingAgent``, by name.
    """

    boundaries = ("known", "hidden")
    short_name = "er_ace"
    papers = ("caccia2022",)
    memory = RehearsalConfig(loss="sum")
    required = {"weighting": "none", "loss": "sum"}
    met_classes: Tensor

    def __init__(self, *args: Any, unmet_classes: Literal["masked", "open"] = "masked", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unmet_classes = unmet_classes

    def build(self) -> None:
        """Make the mask of the classes met, if they are told apart."""
        super().build()
        if self.hparams["unmet_classes"] == "open":  # the constructor builds before it sets attributes
            self.register_buffer("met_classes", torch.zeros(self.num_classes, dtype=torch.bool))

    def on_train_start(self) -> None:
        """Forget the classes of an earlier stream where a new one begins, of which hidden boundaries do not tell."""
        super().on_train_start()
        if self.unmet_classes == "open" and not self.clock.has_started:
            self.met_classes.zero_()

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of both cross entropies, each a mean over the samples of all workers, and the logits."""
        logits, new = self.outputs(batch), slice(batch.num_new)
        scored = self.class_counts(batch, new) > 0
        if self.unmet_classes == "open":
            self.met_classes |= scored
            trained = self.trained_columns()
            scored = scored | (~self.met_classes if trained is None else trained & ~self.met_classes)
        loss = asymmetric_cross_entropy(logits[new], batch.targets[new], scored, batch.weights[new], batch.normalizer)
        return loss + self.cross_entropy(logits, batch, slice(batch.num_new, None)), logits
