"""What a boundary between tasks starts anew: optimizers and schedules, and what was best so far."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

__all__ = [
    "begin_anew", "forget_best", "forget_best_checkpoints", "hyperparameters", "keep_limits", "keep_order",
    "reset_optimizers",
]  # fmt: skip


def begin_anew(trainer: pl.Trainer) -> None:
    """Let a trainer that has been used before count epochs and steps from 0.

    Args:
        trainer: in set-up of a fit; a checkpoint that it goes on from is loaded later.
    """
    loop = trainer.fit_loop
    if not loop.epoch_progress.total.ready:
        return
    loop.load_state_dict(type(loop)(trainer).state_dict())
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part.on_iteration_done()  # nothing is resumed


def keep_limits(trainer: pl.Trainer) -> Callable[[], None]:
    """Return what gives a trainer its present limits back.

    Args:
        trainer: in set-up of a fit.
    """
    owners: list[tuple[Any, str]] = [
        (trainer.fit_loop, "max_epochs"),
        (trainer.fit_loop, "min_epochs"),
        (trainer.fit_loop.epoch_loop, "max_steps"),
        (trainer, "reload_dataloaders_every_n_epochs"),
    ]
    values = [getattr(owner, name) for owner, name in owners]

    def undo() -> None:
        for (owner, name), value in zip(owners, values, strict=True):
            setattr(owner, name, value)

    return undo


def keep_order(trainer: pl.Trainer) -> Callable[[], None]:
    """Return what puts a trainer's callbacks into their present order again.

    Args:
        trainer: in set-up of a fit.
    """
    order = {id(callback): i for i, callback in enumerate(trainer.callbacks)}  # type: ignore[attr-defined]

    def undo() -> None:
        trainer.callbacks = sorted(trainer.callbacks, key=lambda c: order.get(id(c), len(order)))  # type: ignore[attr-defined]

    return undo


def forget_best(stoppers: Sequence[EarlyStopping]) -> None:
    """Let the next task be measured by itself."""
    for stopper in stoppers:
        stopper.wait_count = stopper.stopped_epoch = 0
        worst = float("inf") if stopper.monitor_op == torch.lt else -float("inf")
        stopper.best_score = torch.tensor(worst)


def forget_best_checkpoints(trainer: pl.Trainer) -> None:
    """Let what was best in one task not keep the next one's from being saved; the files stay."""
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, ModelCheckpoint) and saver.monitor is not None:
            saver.best_k_models = {}
            saver.best_model_score = None
            saver.kth_best_model_path = ""


def hyperparameters(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the values of all parameter groups and the states of all schedules."""
    groups = [
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return copy.deepcopy({"groups": groups, "schedules": schedules})


def reset_optimizers(trainer: pl.Trainer, snapshot: dict[str, Any]) -> None:
    """Empty the optimizers' states and put the values of a snapshot back.

    In place: a new optimizer object would have to be wrapped and hooked again.
    """
    for optimizer, groups in zip(trainer.optimizers, snapshot["groups"], strict=True):
        optimizer.state.clear()
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(copy.deepcopy(values))
    for config, state in zip(trainer.lr_scheduler_configs, snapshot["schedules"], strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(state))
