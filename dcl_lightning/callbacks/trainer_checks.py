"""Refuses Trainer options that contradict a stream of tasks: each function raises ConfigurationError with a remedy."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from dcl_lightning._lightning import callbacks_of, monitored_by, overfit_batches, validates_by_time
from dcl_lightning.callbacks.evaluation import limited
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Task

__all__ = ["refuse_changing_accumulation", "refuse_contradictions", "refuse_tuning", "refuse_tuning_on_resume"]


def refuse_contradictions(
    trainer: pl.Trainer, module: pl.LightningModule, data: ContinualDataModule, tasks: Sequence[Task]
) -> None:
    """Refuse options, callbacks and a validation step that cannot work over a stream of tasks."""
    if data.boundaries == "hidden":
        _refuse_early_stopping(trainer)
    _refuse_limits(trainer)
    _refuse_validation_of_nothing(trainer, data)
    _refuse_selection_on_test(trainer, data)
    _refuse_stochastic_averaging(trainer)
    _refuse_rare_validation(trainer, tasks, data)
    _refuse_empty_shares(trainer, tasks, data)
    _refuse_single_validation(trainer, module, data)


def _refuse_validation_of_nothing(trainer: pl.Trainer, data: ContinualDataModule) -> None:
    """Refuse callbacks that watch validation figures, and intervals of validation, where nothing is validated on."""
    if data.validate_on is not None:
        return
    remedy = "set data.val_ratio above 0 to hold samples out"
    if data.evaluate_on == "held_out":
        remedy = "give data.evaluate_on=test"
    for watcher in _watchers_of_validation(trainer):
        raise ConfigurationError(
            f"{watcher} watches figures of validation, and there is nothing to validate on: {remedy}, or "
            "data.select_on_test=true to select on what the report is of"
        )
    if not trainer.enable_validation:
        return
    for key, value, default in (
        ("val_check_interval", trainer.val_check_interval, 1.0),
        ("check_val_every_n_epoch", trainer.check_val_every_n_epoch, 1),
    ):
        if value != default:
            raise ConfigurationError(
                f"trainer.{key}={value} says when to validate, and there is nothing to validate on: {remedy}, or "
                f"data.validate_on={data.evaluate_on} to watch the accuracy of what the report is of"
            )


def _refuse_selection_on_test(trainer: pl.Trainer, data: ContinualDataModule) -> None:
    """Refuse callbacks that watch validation figures where these are of the samples that the report is of."""
    if data.select_on_test or data.validate_on != data.evaluate_on:
        return
    what = "test data: set data.val_ratio above 0 to hold samples out"
    if data.evaluate_on == "held_out":
        what = "the hold-outs that the report is of: give data.evaluate_on=test"
    for watcher in _watchers_of_validation(trainer):
        raise ConfigurationError(f"{watcher} would select on {what}, or data.select_on_test=true to do it knowingly")


def _watchers_of_validation(trainer: pl.Trainer) -> Iterator[str]:
    """Yield the name and the monitor of each callback that watches a validation figure, for messages."""
    for callback in callbacks_of(trainer):
        monitored = monitored_by(callback)
        if monitored.startswith("val/"):
            yield f"{type(callback).__name__}(monitor='{monitored}')"


def _refuse_early_stopping(trainer: pl.Trainer) -> None:
    """Refuse callbacks that end tasks where their boundaries are hidden."""
    for callback in trainer.early_stopping_callbacks:
        raise ConfigurationError(
            f"{type(callback).__name__} ends tasks, of which nothing may know with data.boundaries=hidden: leave it "
            "out, or give data.boundaries=known"
        )


def _refuse_rare_validation(trainer: pl.Trainer, tasks: Sequence[Task], data: ContinualDataModule) -> None:
    """Refuse validation every n batches of an epoch where a task has fewer: Lightning would, but only in that task."""
    interval = None if validates_by_time(trainer) else trainer.val_check_interval
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None or not _validates(trainer, data):
        return
    for task, batches in _epochs(trainer, tasks, data):
        batches = limited(batches, trainer.limit_train_batches)
        if batches < interval:
            raise ConfigurationError(
                f"trainer.val_check_interval={interval}, but task {task.index} has only {batches} batches an epoch: "
                "give trainer.check_val_every_n_epoch=null to count over epochs and tasks"
            )


def _refuse_empty_shares(trainer: pl.Trainer, tasks: Sequence[Task], data: ContinualDataModule) -> None:
    """Refuse shares of batches that leave none of a task's: Lightning would, but only in that task."""
    epochs = ((f"task {task.index}'s epoch", batches) for task, batches in _epochs(trainer, tasks, data))
    _refuse_empty_share("limit_train_batches", trainer.limit_train_batches, epochs, "data.batch_size")
    loaders = data.test_loaders(data.num_tasks - 1)
    # Of each task first the worker that has the fewest.
    sets = ((f"task {t}'s test set", n) for t, loader in enumerate(loaders) for n in sorted(loader.lengths()))
    _refuse_empty_share(
        "limit_test_batches", trainer.limit_test_batches, sets, f"data.eval_batch_size than {data.eval_batch_size}"
    )


def _refuse_empty_share(name: str, limit: int | float | None, counts: Iterable[tuple[str, int]], smaller: str) -> None:
    """Refuse a share of batches that leaves none of a task's."""
    if not isinstance(limit, float) or limit == 0:
        return
    for what, count in counts:
        if count and limited(count, limit) == 0:
            raise ConfigurationError(
                f"trainer.{name}={limit} of {count} batches of {what} is less than one: give at least {1 / count:.3g}, "
                f"a whole number of batches, or a smaller {smaller}"
            )


def _epochs(trainer: pl.Trainer, tasks: Sequence[Task], data: ContinualDataModule) -> Iterator[tuple[Task, int]]:
    """Yield each task with the number of batches of one of its epochs."""
    samples, rows = 0, trainer.world_size * data.batch_size
    for task in tasks:
        samples = task.num_samples + (samples if data.concatenate_tasksets else 0)
        yield task, max(-(-samples // rows), 1) * data.passes


def _validates(trainer: pl.Trainer, data: ContinualDataModule) -> bool:
    return trainer.enable_validation and data.validate_on is not None


def _refuse_single_validation(trainer: pl.Trainer, module: pl.LightningModule, data: ContinualDataModule) -> None:
    """Refuse a validation step for one loader, where Lightning would once the second task has brought another."""
    if data.num_tasks < 2 or not _validates(trainer, data):
        return
    parameters = inspect.signature(module.validation_step).parameters
    index = parameters.get("dataloader_idx")
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if index.default is index.empty if index is not None else not takes_any:
        raise ConfigurationError(
            f"{type(module).__name__}.validation_step gets a loader for each task: add dataloader_idx=0 to its "
            "arguments, or leave data.validate_on, data.val_ratio and data.select_on_test out"
        )


def _refuse_limits(trainer: pl.Trainer) -> None:
    """Refuse limits of the trainer that mean nothing over tasks."""
    if batches := overfit_batches(trainer):
        raise ConfigurationError(
            f"trainer.overfit_batches={batches} needs the same batches in every epoch, and a "
            "ContinualDataModule shuffles: give trainer.limit_train_batches, or a small data set"
        )
    if trainer.min_steps and trainer.early_stopping_callbacks:
        raise ConfigurationError(
            f"trainer.min_steps={trainer.min_steps} counts steps of the whole stream, and EarlyStopping ends tasks: "
            "give trainer.min_epochs, which counts each task's epochs"
        )


def refuse_tuning(trainer: pl.Trainer, scale_lr: str) -> None:
    """Refuse a search for the rate of all workers where the rate is given for one."""
    if scale_lr != "none" and any(isinstance(c, LearningRateFinder) for c in callbacks_of(trainer)):
        raise ConfigurationError(
            f"model.scale_lr={scale_lr} scales the rate of one worker, and LearningRateFinder finds that of all: give "
            "model.scale_lr=none, or leave the callback out"
        )


def refuse_tuning_on_resume(trainer: pl.Trainer) -> None:
    """Refuse a search before a resumed run goes on: Lightning forgets the checkpoint's place over it."""
    if Path(trainer.ckpt_path or "").name.startswith((".lr_find_", ".scale_batch_size_")):
        return  # the search's own
    for callback in callbacks_of(trainer):
        if isinstance(callback, (LearningRateFinder, BatchSizeFinder)):
            raise ConfigurationError(
                f"{type(callback).__name__} would start a resumed run anew: leave it out, and give the value that it "
                "found, which the checkpoint's run has"
            )


def refuse_changing_accumulation(trainer: pl.Trainer) -> None:
    """Refuse that the number of batches in a step changes where a schedule counts steps."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler) and len(callback.scheduling) > 1:
            raise ConfigurationError(
                f"{type(callback).__name__}({callback.scheduling}) changes the steps of an epoch, by which "
                "model.milestones and model.warmup_epochs are counted: give trainer.accumulate_grad_batches"
            )


def _refuse_stochastic_averaging(trainer: pl.Trainer) -> None:
    """Refuse ``StochasticWeightAveraging``: it averages over tasks, and sets the average after the last evaluation."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging):
            raise ConfigurationError(
                f"{type(callback).__name__} replaces the schedule of each task by its own, and sets the average of the "
                "stream's last epochs after the last task was evaluated: use WeightAveraging or EMAWeightAveraging, "
                "whose averaged weights are evaluated at each task's end"
            )
