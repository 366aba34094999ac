"""GDumb: training from scratch on a greedily balanced memory alone, at the end of each task.

Prabhu, Torr and Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", ECCV 2020,
algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dcl_lightning.agents.optimization import idle_loss
from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.functional.losses import weighted_cross_entropy
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["GDumb"]


class GDumb(RehearsingAgent):
    """Trains on what is stored alone, from the initial weights at each task.

    The paper trains before a prediction, over a full memory. Here it trains in each task's epochs, of which the first
    also fills the memory: give two epochs or more. New samples train nothing, including the statistics of batch
    normalisation. The paper's CutMix and its schedule are not part of it. Arguments as in
    ``RehearsingAgent``.
    """

    heads = ("linear", "cosine", "per_task")
    short_name = "gdumb"
    papers = ("prabhu2020",)
    needs_whole_weights = "computes nothing on a worker without representatives, for which the others would wait"
    fixed_arguments = ("forward", "reset_state_dict")  # rehearsed rows alone go through the network
    memory = RehearsalConfig(policy="greedy", quota="adaptive", loss="sum")
    required = {"update": "step", "draw_from": "seen", "weighting": "none", "loss": "sum"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, forward="joint", reset_state_dict=True, **kwargs)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the representatives of all workers, and their logits."""
        old = slice(batch.num_new, None)
        if not len(batch.targets[old]):  # nothing is stored yet; the step still has a gradient, which is 0
            return idle_loss(self), batch.inputs.new_zeros(0, self.num_classes)
        logits = self(batch.inputs[old])
        trained, targets = self.restrict_to_trained(logits, batch.targets[old])
        return weighted_cross_entropy(trained, targets, batch.weights[old], batch.normalizer), logits
