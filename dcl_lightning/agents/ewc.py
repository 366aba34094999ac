"""EWC, elastic weight consolidation, in its online form.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796, equation 3;
one penalty for all tasks as in Schwarz et al., "Progress & Compress", ICML 2018, arXiv 1805.06370, equations 8 and 9.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from dcl_lightning._lightning import datamodule_of
from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.computation import eager
from dcl_lightning.agents.optimization import fit_vectors, flat_weights, sum_dtype, trained_parameters, trained_part
from dcl_lightning.callbacks.evaluation import evaluation_batches, limited_ids
from dcl_lightning.errors import check_number
from dcl_lightning.functional.regularization import merged_fisher, quadratic_penalty
from dcl_lightning.types import Batch, Task

__all__ = ["EWC"]

_CHUNK = 16  # samples whose gradients are held at once


class EWC(ContinualAgent):
    """Cross entropy, and a penalty on moving weights by how much the outputs on earlier tasks depended on them.

    The measure is the diagonal of the Fisher information, from the gradients of single samples with their labels in
    evaluation mode, over the taskset of all workers. EWC keeps no samples, but two numbers for each weight. A weight
    that is frozen at the end of a task counts as one on which its outputs do not depend; if it thaws later, a warning
    names it.

    Args:
        *args: arguments of ``ContinualAgent``, by place.
        strength: factor of half the penalty, the papers' lambda, at least 0. A step is stable where ``lr`` times this
            times the largest Fisher information stays below 2; what is well trained has little, and bears more.
        decay: what is kept of the Fisher information of earlier tasks while a further one is learnt, gamma, in [0, 1].
        fisher_samples: samples of a taskset that it is estimated from; all if None.
        **kwargs: arguments of ``ContinualAgent``, by name.

    Raises:
        ConfigurationError: one of the three is out of range.
    """

    heads = ("linear", "cosine", "per_task")
    short_name = "ewc"
    papers = ("kirkpatrick2017", "schwarz2018")
    needs_whole_weights = "measures the gradients of single samples"
    fisher: Tensor
    anchor: Tensor

    def __init__(
        self,
        *args: Any,
        strength: float = 1.0,
        decay: float = 1.0,
        fisher_samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("model.strength", strength, at_least=0)
        check_number("model.decay", decay, at_least=0, at_most=1)
        if fisher_samples is not None:
            check_number("model.fisher_samples", fisher_samples, at_least=1)
        self.strength, self.decay, self.fisher_samples = strength, decay, fisher_samples
        self._one_by_one = False
        self._warned_of: set[str] = set()

    def build(self) -> None:
        """Make the vectors, with a number for each weight."""
        super().build()
        self.register_buffer("fisher", torch.zeros(0))
        self.register_buffer("anchor", torch.zeros(0))
        fit_vectors(self, "fisher", "anchor")

    def setup(self, stage: str) -> None:
        """Count the weights anew: the network may have been changed since it was given."""
        super().setup(stage)
        if self.is_built:
            fit_vectors(self, "fisher", "anchor")

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the samples of all workers, and the logits."""
        logits = self(batch.inputs)
        loss = self.cross_entropy(logits, batch)
        if self.clock.task_at(self.current_epoch):
            weights = flat_weights(trained_parameters(self))
            anchor, fisher = (trained_part(vector, self) for vector in (self.anchor, self.fisher))
            loss = loss + self.strength / 2 * self.decay * quadratic_penalty(weights, anchor, fisher)
        return loss, logits

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes; at the start of a stream forget what mattered to an earlier one."""
        super().on_task_start(task)
        if task.index == 0:
            self.fisher.zero_()
            self._one_by_one = False
            self._warned_of.clear()

    def on_train_epoch_start(self) -> None:
        """Name weights that have thawed: callbacks may have done so at the start of the task or of this epoch."""
        super().on_train_epoch_start()
        task = self.clock.task_at(self.current_epoch)
        if not task:
            return
        parameters = dict(self.named_parameters())
        parts = self.fisher.split([p.numel() for p in parameters.values()])
        trained = [(name, part) for (name, p), part in zip(parameters.items(), parts, strict=True) if p.requires_grad]
        names = {name for name, part in trained if not bool(part.any())} - self._warned_of
        if names:
            self._warned_of |= names
            rank_zero_warn(
                f"EWC knows of no importance of {', '.join(sorted(names))} to the tasks before task {task}, and lets "
                "them move: freeze what was frozen then, or leave it trainable from the start"
            )

    def on_task_end(self, task: Task) -> None:
        """Measure which weights the task's outputs depend on, and make the present weights the anchor."""
        data = datamodule_of(self.trainer)
        ids = limited_ids(self.trainer, data.train_indices(task.index))
        if self.fisher_samples is not None:
            order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(task.index))
            ids = ids[order[: self.fisher_samples]]
        total = torch.zeros_like(self.fisher, dtype=sum_dtype([*self.parameters()]))
        # At the weights from which the next task goes on, and which the penalty holds on to.
        for batch in evaluation_batches(self, data.train_eval_loader(ids), averaged=False):
            for inputs, targets in zip(batch.inputs.split(_CHUNK), batch.targets.split(_CHUNK), strict=True):
                with eager():
                    total += self._squares(inputs, targets)
        self.fisher.copy_(merged_fisher(self.fisher, self.comm.allreduce(total) / len(ids), self.decay))
        self.anchor.copy_(flat_weights(self.parameters()).detach())

    def _squares(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared gradients ``(P,)`` of the samples' log-likelihoods, summed over the samples.

        All samples at once, which is many times faster; or one by one, where the network has parts that
        ``torch.func.vmap`` cannot take, as activation checkpointing and buffers that are written to.
        """
        if not self._one_by_one:
            try:
                return self._squares_at_once(inputs, targets)
            except torch.cuda.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                self._one_by_one = True
                rank_zero_warn(
                    "EWC takes the gradients of single samples one by one, which is slow: torch.func.vmap cannot take "
                    f"this network ({str(error).strip().splitlines()[0]})"
                )
        return self._squares_one_by_one(inputs, targets)

    def _squares_at_once(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss, weights = _Loss(self), self._trained_weights()

        def of_one(weights: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
            found: Tensor = functional_call(loss, weights, (image[None], target[None]))
            return found

        gradients = vmap(grad(of_one), in_dims=(None, 0, 0))(weights, inputs, targets)
        return self._flat({name: gradient.square().sum(0) for name, gradient in gradients.items()})

    def _squares_one_by_one(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss, weights = _Loss(self, backward=True), self._trained_weights()
        # Copies, so that neither gradients nor the hooks on the network's own weights nor its buffers have part in it.
        buffers = {f"agent.{name}": buffer.clone() for name, buffer in self.named_buffers()}
        squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        with torch.enable_grad():
            for image, target in zip(inputs, targets, strict=True):
                leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
                functional_call(loss, {**leaves, **buffers}, (image[None], target[None]))
                for name, leaf in leaves.items():
                    if leaf.grad is not None:
                        squares[name] += leaf.grad.square()
        return self._flat(squares)

    def _trained_weights(self) -> dict[str, Tensor]:
        return {f"agent.{name}": p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def _flat(self, squares: dict[str, Tensor]) -> Tensor:
        """Return squares by the names of weights as one vector, 0 for those that are not trained."""
        named = self.named_parameters()
        return torch.cat([squares.get(f"agent.{name}", torch.zeros_like(p)).detach().reshape(-1) for name, p in named])


class _Loss(nn.Module):
    """The loss of samples as a module, in which ``functional_call`` puts other weights: for ``backward``, too.

    Args:
        agent: whose logits and trained outputs count.
        backward: whether to go back through it at once, while those weights are still in place.
    """

    def __init__(self, agent: EWC, backward: bool = False) -> None:
        super().__init__()
        self.agent, self.backward = agent, backward

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy, 0-dim."""
        trained, places = self.agent.restrict_to_trained(self.agent(inputs), targets)
        loss = F.cross_entropy(trained, places)
        if self.backward:
            loss.backward()
        return loss
