"""Ends a run whose loss or weights are not finite, before they replace good weights in a checkpoint."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from dcl_lightning._lightning import log_interval
from dcl_lightning.callbacks.task_clock import TaskClock
from dcl_lightning.comm import whole
from dcl_lightning.errors import DataError
from dcl_lightning.types import StateDict

__all__ = ["LossGuard"]


class LossGuard(pl.Callback):
    """Checks the loss of every step.

    On a GPU no step waits for the device: it keeps the first bad step, which is read when Lightning logs, at an epoch's
    end and before a save.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bad_step: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier fit."""
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Note the first step whose loss is not finite."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor) or self._bad_step is None:
            return
        if not loss.is_cuda:
            if not math.isfinite(loss.item()):
                self._bad_step.fill_(trainer.global_step)
                self._raise_if_diverged(trainer, pl_module)
            return
        step = trainer.global_step
        bad = ~torch.isfinite(loss.detach()) & (self._bad_step < 0)
        self._bad_step.masked_fill_(bad, step)
        every = log_interval(trainer)
        if trainer.is_last_batch or (every and step % every == 0):
            self._raise_if_diverged(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: StateDict) -> None:
        """Save nothing that has diverged."""
        self._raise_if_diverged(trainer, pl_module)
        # Weights can diverge in a step whose loss was still finite.
        finite = [whole(p.detach().isfinite().all()) for p in pl_module.parameters()]
        if finite and not bool(torch.stack(finite).all()):
            raise _diverged("network after", trainer.global_step, trainer, pl_module)

    def _raise_if_diverged(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = -1 if self._bad_step is None else int(self._bad_step)
        if step >= 0:
            raise _diverged("loss of", step, trainer, pl_module)


def _diverged(what: str, step: int, trainer: pl.Trainer, pl_module: pl.LightningModule) -> DataError:
    clock, epoch = TaskClock.of(trainer), trainer.current_epoch
    rate = getattr(pl_module, "lr", None) or trainer.optimizers[0].param_groups[0]["lr"]
    masked = "; with model.head=per_task the scores of other tasks' classes are -inf, which no loss may read"
    return DataError(
        f"the {what} step {step} (task {clock.task_at(epoch) if clock else 0}, epoch {epoch}) is not finite: nothing "
        f"more is saved, what was saved before is whole; give a smaller model.lr than {rate}, or model.warmup_epochs"
        f"{masked if pl_module.hparams.get('head') == 'per_task' else ''}"
    )
