"""ER, experience replay, and ER-ACE, its asymmetric cross entropy.

Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr and Ranzato, "On Tiny Episodic Memories in Continual Learning",
2019, arXiv 1902.10486, algorithm 1.
Caccia, Aljundi, Asadi, Tuytelaars, Pineau and Belilovsky, "New Insights on Reducing Abrupt Representation Change in
Online Continual Learning", ICLR 2022, arXiv 2104.05025, equations 4 and 5.
"""

from __future__ import annotations

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
    short_name = "er"
    papers = ("chaudhry2019er",)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy over the step's samples of all workers, and the logits."""
        logits = self.outputs(batch)
        return self.cross_entropy(logits, batch), logits


class ERACE(RehearsingAgent):
    """The loss separates new samples from each other only, representatives from all classes.

    So new classes do not push the outputs of old ones down. The classes of the new samples are those of the step's
    samples on all workers, so that N workers have the loss of one process with the N-fold batch. Arguments as in
    ``RehearsingAgent``.
    """

    boundaries = ("known", "hidden")
    short_name = "er_ace"
    papers = ("caccia2022",)
    memory = RehearsalConfig(loss="sum")
    required = {"weighting": "none", "loss": "sum"}

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of both cross entropies, each a mean over the samples of all workers, and the logits."""
        logits, new = self.outputs(batch), slice(batch.num_new)
        # Rows of weight 0 only pad this worker's share: their classes need not be among the step's.
        samples = batch.weights.new_zeros(self.num_classes)
        samples = self.comm.allreduce(samples.index_add_(0, batch.targets[new], batch.weights[new]))
        present = samples > 0
        loss = asymmetric_cross_entropy(logits[new], batch.targets[new], present, batch.weights[new], batch.normalizer)
        return loss + self.cross_entropy(logits, batch, slice(batch.num_new, None)), logits
