"""MIR, rehearsal of the stored samples with which a step would interfere most.

Aljundi, Caccia, Belilovsky, Caccia, Lin, Charlin and Tuytelaars, "Online Continual Learning with Maximally Interfered
Retrieval", NeurIPS 2019, arXiv 1908.04742, algorithm 1 (ER-MIR).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from dcl_lightning.agents.optimization import flat_gradients_of, sum_dtype
from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.errors import ConfigurationError, whole_number
from dcl_lightning.functional.losses import weighted_cross_entropy
from dcl_lightning.functional.retrieval import highest_of_parts, interference
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["MIR"]


class MIR(RehearsingAgent):
    """Rehearses those representatives whose loss a step on the new samples alone would raise most.

    ``num_samples`` representatives are drawn for each worker, and ``num_rehearsed`` times the number of workers are
    rehearsed. A virtual step finds them: plain SGD at the present learning rate, whatever the optimizer is, along the
    gradient of the new samples of all workers. The representatives of all workers are ranked together, by their inputs
    as they are trained on, and a worker trains on those that it has drawn itself, few or many: N workers choose what
    one process with the N-fold batch would. The virtual step changes neither weights nor gradients nor the statistics
    of batch normalisation.

    A step costs, beside its own passes, one forward and backward pass of the new samples and two forward passes of what
    is drawn, and on several workers a message of a number for each weight. While no more is stored than is rehearsed,
    all of it is, at no further cost. The paper's program draws from earlier tasks only: ``draw_from: past``.

    Args:
        *args: arguments of ``RehearsingAgent``, by place.
        num_rehearsed: r, representatives that are rehearsed for each worker, at least 1 and below ``num_samples``.
        **kwargs: arguments of ``RehearsingAgent``, by name.

    Raises:
        ConfigurationError: the number is out of range.
    """

    boundaries = ("known", "hidden")
    short_name = "mir"
    papers = ("aljundi2019",)
    needs_whole_weights = "tries a step out on a copy of the weights"
    memory = RehearsalConfig(num_samples=50, loss="sum")
    required = {"weighting": "none", "loss": "sum"}

    def __init__(self, *args: Any, num_rehearsed: int = 10, **kwargs: Any) -> None:
        self.num_rehearsed = whole_number("model.num_rehearsed", num_rehearsed, 1)
        super().__init__(*args, **kwargs)

    def _complete(self, rehearsal: Rehearsal) -> None:
        super()._complete(rehearsal)
        drawn = rehearsal.config.num_samples
        if self.num_rehearsed >= drawn:
            raise ConfigurationError(
                f"model.num_rehearsed={self.num_rehearsed} is not below rehearsal.num_samples={drawn}, from which they "
                "are chosen: give a smaller number, or draw more (the paper rehearses 10 of 50)"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of the new samples and the chosen representatives; log it as every agent does."""
        return super().training_step(self.retrieve(batch), batch_idx)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of both cross entropies, each a mean over the samples of all workers, and the logits."""
        logits = self.outputs(batch)
        return self.cross_entropy(logits, batch), logits

    def retrieve(self, batch: Batch) -> Batch:
        """Return the new samples and those representatives of this worker that are rehearsed; every worker calls it."""
        new, drawn = batch.num_new, len(batch.targets) - batch.num_new
        count = self.num_rehearsed * self.comm.size
        if int(self.comm.allreduce(torch.tensor(drawn))) <= count:
            return batch
        chosen = highest_of_parts(self.comm.allgather(self._interference(batch)), count)[self.comm.rank]
        # All are equal, and make the chosen ones' loss the mean over those of all workers.
        weight = (batch.normalizer / self.num_rehearsed).to(batch.weights)
        kept = F.pad(chosen, (new, 0), value=True)
        return batch._replace(
            inputs=batch.inputs[kept],
            targets=batch.targets[kept],
            task_ids=batch.task_ids[kept],
            sample_ids=batch.sample_ids[kept],
            draw_ids=batch.draw_ids[kept],
            weights=torch.cat([batch.weights[:new], weight.expand(int(chosen.sum()))]),
        )

    def _interference(self, batch: Batch) -> Tensor:
        """Return how much the virtual step would raise the loss of each representative of this worker, ``(n,)``."""
        drawn = len(batch.targets) - batch.num_new
        # A worker that has drawn nothing passes its new samples: synchronised layers of the others wait for it.
        rows = slice(batch.num_new, None) if drawn else slice(None)
        inputs, targets = batch.inputs[rows], batch.targets[rows]
        present = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
        stepped = self._virtual_step(present, batch)
        with torch.no_grad():
            # Both passes draw the same random numbers, so that dropout makes no difference between them.
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                before = self._logits(present, inputs)
            after = self._logits(stepped, inputs)
        trained, places = self.restrict_to_trained(before, targets)
        return interference(trained, self.restrict_to_trained(after, targets)[0], places)[:drawn]

    def _virtual_step(self, present: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the weights after a step of SGD on the new samples of all workers."""
        new = slice(batch.num_new)
        # Leaves of their own: no hook of the network's parameters is called, and autocast keeps no copy of theirs.
        leaves = {name: weight.detach().requires_grad_() for name, weight in present.items()}
        logits, targets = self.restrict_to_trained(self._logits(leaves, batch.inputs[new]), batch.targets[new])
        loss = weighted_cross_entropy(logits, targets, batch.weights[new], batch.normalizer)
        parameters = [*leaves.values()]
        gradient = flat_gradients_of(loss, parameters).to(sum_dtype(parameters))
        gradient = self.comm.allreduce(gradient, "mean")
        rate = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        parts = gradient.split([weight.numel() for weight in parameters])
        return {
            name: (weight - rate * part.view_as(weight)).to(weight)
            for (name, weight), part in zip(present.items(), parts, strict=True)
        }

    def _logits(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Return logits ``(B, K)`` with other weights; what the network writes into its buffers is dropped."""
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        logits: Tensor = functional_call(self, {**weights, **buffers}, (inputs,))
        return logits
