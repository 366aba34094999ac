"""Decides at which training steps loss and accuracy are logged."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from dcl_lightning._lightning import callbacks_of, loggers_write

__all__ = ["StepLog"]


class StepLog:
    """Decides whether a step's loss and accuracy are computed and logged.

    Lightning's book-keeping of two logged values costs a small network a good part of its step, and most of them are
    replaced by the next step's before anyone reads them. Each step's are logged where a progress bar shows them, a
    callback monitors a value of training, or a callback that is neither Lightning's nor ours acts after each batch
    and may read them; else those that loggers write, the first and the last of an epoch, and the last of the fit.

    ``shown`` says whether a progress bar shows them, as set-up found it. Only then are they logged for one: at every
    step of an epoch Lightning makes numbers of what was, also steps before, and on a GPU the host waits for each. It
    stays so for the fit, as Lightning asks: ``LearningRateFinder`` puts the bar away for a while.
    """

    def __init__(self) -> None:
        self.shown = False
        self._each_step = True
        self._looked: tuple[int, int] | None = None  # of which trainer's epoch

    def start(self, trainer: pl.Trainer) -> None:
        """Look whether there is a progress bar.

        Args:
            trainer: in set-up of a fit, after the callbacks'.
        """
        self.shown = _is_shown(trainer)

    def due(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Return whether the present step's values are logged.

        Args:
            trainer: of the fit, within a training step.
            batch_idx: 0-based place of the batch in its epoch.
        """
        if batch_idx == 0 or self._looked != (id(trainer), trainer.current_epoch):  # also resumed amid an epoch
            self._looked = (id(trainer), trainer.current_epoch)
            self._each_step = self.shown or _is_read_each_step(trainer)
            return True
        return (
            self._each_step
            or trainer.is_last_batch
            # Counts batches that stepped, as loggers do; ``global_step`` counts each optimizer's steps.
            or loggers_write(trainer)
            or 0 < trainer.max_steps == trainer.global_step + 1
        )


def _is_shown(trainer: Any) -> bool:
    bar = trainer.progress_bar_callback
    return bar is not None and bool(getattr(bar, "is_enabled", True))


def _is_read_each_step(trainer: Any) -> bool:
    return bool(trainer.fast_dev_run) or any(_reads(callback) for callback in callbacks_of(trainer))


def _reads(callback: pl.Callback) -> bool:
    monitored = str(getattr(callback, "monitor", None) or "").startswith("train/")
    known = type(callback).__module__.partition(".")[0] in ("lightning", "pytorch_lightning", "dcl_lightning")
    return monitored or (not known and type(callback).on_train_batch_end is not pl.Callback.on_train_batch_end)
