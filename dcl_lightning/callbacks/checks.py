"""Trainer options that go wrong with a stream of tasks, refused before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Task

__all__ = ["refuse_early_stopping", "refuse_rare_validation", "refuse_selection_on_test"]


def refuse_selection_on_test(trainer: pl.Trainer, data: Any) -> None:
    """Refuse callbacks that watch validation figures where these are of test data.

    Args:
        trainer: has the callbacks.
        data: the data module.

    Raises:
        ConfigurationError: with the remedy.
    """
    if getattr(data, "val_ratio", 0.0) > 0 or getattr(data, "select_on_test", False):
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("val/"):
            raise ConfigurationError(
                f"{type(callback).__name__}(monitor='{monitor}') would select on test data: set data.val_ratio "
                "above 0 to hold samples out, or data.select_on_test=true to do it knowingly"
            )


def refuse_early_stopping(trainer: pl.Trainer) -> None:
    """Refuse callbacks that end tasks where their boundaries are hidden.

    Args:
        trainer: has the callbacks.

    Raises:
        ConfigurationError: with the remedy.
    """
    for callback in trainer.early_stopping_callbacks:
        raise ConfigurationError(
            f"{type(callback).__name__} ends tasks, of which nothing may know with data.boundaries=hidden: leave it "
            "out, or give data.boundaries=known"
        )


def refuse_rare_validation(trainer: pl.Trainer, tasks: Sequence[Task], data: Any) -> None:
    """Refuse validation every n batches of an epoch where a task has fewer: Lightning would, but only in that task.

    Args:
        trainer: has the interval.
        tasks: the stream.
        data: the data module.

    Raises:
        ConfigurationError: with the remedy.
    """
    interval = trainer.val_check_interval
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None or not trainer.enable_validation:
        return
    samples, rows = 0, trainer.world_size * data.batch_size
    for task in tasks:
        samples = task.num_samples + (samples if data.concatenate_tasksets else 0)
        batches = -(-samples // rows)
        if batches < interval:
            raise ConfigurationError(
                f"trainer.val_check_interval={interval}, but task {task.index} has only {batches} batches an epoch: "
                "give trainer.check_val_every_n_epoch=null to count over epochs and tasks"
            )
