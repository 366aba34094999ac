"""iCaRL: exemplars by herding, distillation, nearest-mean prediction.

Rebuffi, Kolesnikov, Sperl and Lampert, "iCaRL: Incremental Classifier and Representation Learning",
CVPR 2017, arXiv 1611.07725, algorithms 1 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dcl_lightning._lightning import datamodule_of
from dcl_lightning.agents.nearest_mean import NearestMean
from dcl_lightning.agents.teacher import Teacher
from dcl_lightning.backbones.short_names import Network
from dcl_lightning.callbacks.evaluation import limited_ids
from dcl_lightning.distributed.horovod.shutdown import break_off_if_signalled
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional.herding import herd, nearest_to_mean
from dcl_lightning.functional.losses import (
    distillation,
    icarl_loss,
    icarl_targets,
    tempered_distillation,
    weighted_cross_entropy,
)
from dcl_lightning.memory.config import MemorySize
from dcl_lightning.types import Batch, MemoryRows, Task

__all__ = ["ICaRL"]

_TEMPERATURE = 2.0  # of ``loss: ce``


class ICaRL(NearestMean):
    """Exemplars chosen by herding, sigmoid outputs taught by the previous network, nearest-mean prediction.

    The exemplars are part of every later task's training set. They are chosen for the whole job:
    features are gathered, so that any number of workers chooses the same ones. They are kept as
    sample ids of the training set, which every worker can read.

    Args:
        backbone: module that makes features, or its name; for it and for all that is not named here see
            ``ContinualAgent``.
        num_classes: classes of the whole stream, K; the data module's if None.
        rehearsal: size of the memory; 20 exemplars a class of the stream if none is given (2000 for
            CIFAR-100, the paper's).
        bce_reduction: ``mean`` divides the loss of a sample by K, whatever is masked; ``sum`` adds it
            up over the classes.
        selection: ``herding`` (the paper) or ``nearest`` to the class mean (the original program).
        nme_flip: whether class means also average over mirrored exemplars.
        exemplars: part of the training set (``union``, the paper), or ``num_samples`` of them added to each
            batch (``per_step``, the original program).
        num_samples: exemplars added to each batch of a worker with ``per_step``.
        loss: ``bce`` (the paper); ``ce``: on new samples and exemplars alike, cross entropy, and for the classes of
            earlier tasks the distillation of the previous network at temperature 2 (PyCIL's iCaRL); or ``kl``: cross
            entropy on new samples, and on exemplars the divergence from the previous network alone (the original
            program); goes with ``per_step``.
        execution: ``blocking`` prepares each batch one ahead in the background, with the same result.
        **kwargs: arguments of ``ContinualAgent``.
    """

    rehearses = True
    short_name = "icarl"
    papers = ("rebuffi2017",)

    has_teacher: Tensor

    def __init__(
        self,
        backbone: Network,
        num_classes: int | None = None,
        rehearsal: MemorySize | Mapping[str, Any] | None = None,
        *,
        bce_reduction: Literal["mean", "sum"] = "mean",
        selection: Literal["herding", "nearest"] = "herding",
        nme_flip: bool = False,
        exemplars: Literal["union", "per_step"] = "union",
        num_samples: int = 20,
        loss: Literal["bce", "ce", "kl"] = "bce",
        execution: Literal["inline", "blocking"] = "inline",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **kwargs)
        self.rehearsal = MemorySize.of(rehearsal)
        self.bce_reduction = bce_reduction
        self.selection = selection
        self.nme_flip = nme_flip
        if loss == "kl" and exemplars != "per_step":
            raise ConfigurationError("model.loss=kl tells exemplars from new samples: give model.exemplars=per_step")
        if num_samples < 1:
            raise ConfigurationError(f"model.num_samples={num_samples}: give at least 1")
        self.replayed_per_batch = num_samples if exemplars == "per_step" else None
        self.loss, self.execution = loss, execution
        self.loads_ahead = execution == "blocking"
        self.exemplars: dict[int, Tensor] = {}
        self._rehearsed: dict[int, Tensor] = {}
        self._chosen_at: dict[int, int] = {}  # the step after which a class's exemplars were chosen
        self.capacity = 0
        self._teaching = False  # ``has_teacher`` on the host, so that a step does not wait for the device

    def build(self) -> None:
        """Make the teacher."""
        super().build()
        self.teacher = Teacher(self.backbone, self.head)
        self.register_buffer("has_teacher", torch.zeros((), dtype=torch.bool))

    # -- learning ----------------------------------------------------------------------------------

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss against labels and the teacher's outputs, and the logits."""
        logits = self(batch.inputs)
        taught = None
        if self._teaching:
            taught = self.teacher(batch.inputs)
        if self.loss == "kl":
            return self._original_loss(logits, taught, batch), logits
        remembered = self.seen_classes & ~self.current_classes
        if self.loss == "ce":
            loss = self.cross_entropy(logits, batch)
            if taught is not None:
                pair = logits[:, remembered], taught[:, remembered]
                loss = loss + tempered_distillation(*pair, batch.weights, batch.normalizer, _TEMPERATURE)
            return loss, logits
        targets = icarl_targets(batch.targets, self.num_classes, self.current_classes, remembered, taught)
        divisor = float(self.num_classes) if self.bce_reduction == "mean" else 1.0
        loss = icarl_loss(logits, targets, batch.weights, batch.normalizer, divisor, self.trained_columns())
        return loss, logits

    def _original_loss(self, logits: Tensor, taught: Tensor | None, batch: Batch) -> Tensor:
        new, rehearsed = batch.num_new, len(batch.targets) - batch.num_new
        trained, targets = self.restrict_to_trained(logits[:new], batch.targets[:new])
        loss = weighted_cross_entropy(trained, targets, batch.weights[:new], batch.normalizer - rehearsed)
        if taught is not None and rehearsed:
            loss = loss + distillation(logits[new:], taught[new:])
        return loss

    def on_fit_start(self) -> None:
        """Check the memory's size, and let the data module ask for the exemplars."""
        super().on_fit_start()
        data = self._data
        self._teaching = bool(self.has_teacher)
        default = 20 * self.num_classes
        self.capacity = self.rehearsal.total(self.num_classes, self.comm.size, len(data.train_targets), default)
        if self.capacity < self.num_classes:
            raise ConfigurationError(
                f"a memory of {self.capacity} exemplars is smaller than the {self.num_classes} classes of the stream: "
                f"set model.rehearsal.buffer_size to at least {self.num_classes}"
            )
        data.attach_replay(self)

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes; at the start of a stream forget the exemplars of an earlier one."""
        super().on_task_start(task)
        if task.index == 0:
            self.exemplars.clear()
            self._rehearsed.clear()
            self.has_mean.zero_()
            self.has_teacher.zero_()
            self._teaching = False

    def on_task_end(self, task: Task) -> None:
        """Choose the exemplars of the task's classes, shorten the others, renew means and teacher.

        Raises:
            ConfigurationError: the features are not finite any more.
        """
        data = self._data
        quota = self.capacity // int(self.seen_classes.sum())
        exemplars = {y: ids[:quota] for y, ids in self.exemplars.items()}
        own = limited_ids(self.trainer, data.train_indices(task.index))
        came_again = [exemplars[y] for y in task.classes if y in exemplars]
        ids, features = self.features_of(torch.cat([own, *came_again]).unique())
        if not bool(torch.isfinite(features).all()):
            raise ConfigurationError(
                f"training has diverged in task {task.index}, its features are not finite: give a smaller "
                f"model.lr than {self.lr}, or model.warmup_epochs"
            )
        targets = data.train_targets[ids]
        choose = herd if self.selection == "herding" else nearest_to_mean
        chosen = {}
        for y in task.classes:
            break_off_if_signalled(self.trainer)
            members = torch.nonzero(targets == y).flatten()
            if len(members):
                order = choose(features[members], min(quota, len(members)))
                chosen[y] = ids[members[order]]
        exemplars |= chosen
        means = self.means_of(torch.cat([*exemplars.values()]), self.nme_flip)
        # All is known: nothing is changed before, so that a task's end that is broken off can be begun again.
        self.exemplars = exemplars
        self._chosen_at |= dict.fromkeys(chosen, self.trainer.global_step)
        self.set_means(*means)
        self.teacher.renew(self.backbone, self.head)
        self.has_teacher.fill_(True)
        self._teaching = True
        # The ended task's own stay: a run resumed from its last step asks for the length of its epoch.
        self._rehearsed[task.index + 1] = self.exemplar_ids()
        self._rehearsed.pop(task.index - 1, None)

    def replayed_ids(self, task: int) -> Tensor:
        """Return the exemplars that a task trains on besides its own samples, ``(m,)`` int64."""
        return self._rehearsed.get(task, torch.empty(0, dtype=torch.int64))

    def exemplar_ids(self) -> Tensor:
        """Return the sample ids of all exemplars ``(M,)`` int64, class by class in herding order."""
        rows = [self.exemplars[y] for y in sorted(self.exemplars)]
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)

    def memory_rows(self) -> MemoryRows:
        """Return the exemplars, for reports. How often they are drawn is not counted: once an epoch with ``union``."""
        ids = self.exemplar_ids()
        chosen = torch.tensor([self._chosen_at[y] for y in sorted(self.exemplars) for _ in self.exemplars[y]])
        bytes_used = ids.numel() * ids.element_size() + self.means.numel() * self.means.element_size()
        return MemoryRows(self.capacity, bytes_used, ids, self.trainer.global_step - chosen.long(), None, shared=True)

    @property
    def _data(self) -> Any:
        return datamodule_of(self.trainer)

    # -- checkpoint --------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the exemplars in herding order, and what the present task rehearses."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["exemplars"] = dict(self.exemplars)
        checkpoint["rehearsed"] = dict(self._rehearsed)
        checkpoint["chosen_at"] = dict(self._chosen_at)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the exemplars back."""
        super().on_load_checkpoint(checkpoint)
        self.exemplars = dict(checkpoint.get("exemplars", {}))
        self._rehearsed = dict(checkpoint.get("rehearsed", {}))
        self._chosen_at = dict(checkpoint.get("chosen_at", {}))
