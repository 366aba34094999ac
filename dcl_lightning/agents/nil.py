"""NIL, naive incremental learning with rehearsal.

Muñoz, Narváez, Cobos, Mendoza and Herrera, "Incremental learning model inspired in Rehearsal for deep
convolutional networks", Knowledge-Based Systems 208:106460, 2020; distributed and managed in the
background as in Bouvier et al., "Efficient Data-Parallel Continual Learning with Asynchronous
Distributed Rehearsal Buffers", CCGrid 2024, arXiv 2406.03285.
"""

from __future__ import annotations

from torch import Tensor

from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["NIL"]


class NIL(RehearsingAgent):
    """Cross entropy on new samples and representatives, with larger weights for representatives of rarer classes.

    Arguments as in ``RehearsingAgent``.
    """

    boundaries = ("known", "hidden")
    heads = ("linear", "cosine", "per_task")
    short_name = "nil"
    papers = ("munoz2020", "bouvier2024")
    memory = RehearsalConfig(policy="nil", weighting="nil")
    required = {}  # the weights can be left out, as the publication on distributed buffers does

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the weighted cross entropy over the step's samples of all workers, and the logits."""
        logits = self.outputs(batch)
        return self.cross_entropy(logits, batch), logits
