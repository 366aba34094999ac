"""ER, experience replay.

Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr and Ranzato, "On Tiny Episodic Memories in Continual Learning",
2019, arXiv 1902.10486, algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.types import Batch

__all__ = ["ER"]


class ER(RehearsingAgent):
    """Cross entropy on new samples and representatives alike.

    The paper's memory is a reservoir that is filled at every step. With ``class_balanced``, ``adaptive``, ``task_end``
    and ``past`` it is the replay of other libraries, which is several points better on small memories.

    Args:
        backbone: module that makes features; for it and for all that is not named here see ``ContinualAgent``.
        num_classes: classes of the whole stream, K.
        rehearsal: values of the memory that differ from the agent's own, as a configuration or a dict.
        **kwargs: arguments of ``ContinualAgent``.
    """

    boundaries = ("known", "hidden")

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy over the step's samples of all workers, and the logits."""
        logits = self(batch.inputs)
        return self.cross_entropy(logits, batch), logits
