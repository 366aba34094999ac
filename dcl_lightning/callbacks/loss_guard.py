"""Ends a run whose loss is not finite any more, before such weights replace good ones in a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dcl_lightning._lightning import log_interval
from dcl_lightning.errors import DataError

__all__ = ["LossGuard"]


class LossGuard(pl.Callback):
    """Looks at the loss of every step.

    On a GPU the step is noted there and read when Lightning logs, at an epoch's end and before a save: no step waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bad_step: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the first step whose loss is not finite."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor) or self._bad_step is None:
            return
        if not loss.is_cuda:
            if not math.isfinite(loss.item()):
                self._bad_step.fill_(trainer.global_step)
                self._look(trainer, pl_module)
            return
        step = trainer.global_step
        bad = ~torch.isfinite(loss.detach()) & (self._bad_step < 0)
        self._bad_step.masked_fill_(bad, step)
        every = log_interval(trainer)
        if trainer.is_last_batch or (every and step % every == 0):
            self._look(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save nothing that has diverged."""
        self._look(trainer, pl_module)
        # Weights can diverge in a step whose loss was still finite.
        finite = [p.detach().isfinite().all() for p in pl_module.parameters()]
        if finite and not bool(torch.stack(finite).all()):
            raise _diverged("network after", trainer.global_step, trainer, pl_module)

    def _look(self, trainer: pl.Trainer, agent: Any) -> None:
        step = -1 if self._bad_step is None else int(self._bad_step)
        if step >= 0:
            raise _diverged("loss of", step, trainer, agent)


def _diverged(what: str, step: int, trainer: pl.Trainer, agent: Any) -> DataError:
    epoch, rate = trainer.current_epoch, trainer.optimizers[0].param_groups[0]["lr"]
    return DataError(
        f"the {what} step {step} (task {agent.clock.task_at(epoch)}, epoch {epoch}) is not finite: nothing more is "
        f"saved, what was saved before is whole; give a smaller model.lr than {agent.lr or rate}, or "
        "model.warmup_epochs"
    )
