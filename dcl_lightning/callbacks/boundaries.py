"""What a boundary between tasks starts anew: optimizers and schedules, and what was best so far."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

__all__ = ["forget_best", "forget_best_checkpoints", "hyperparameters", "reset_optimizers", "stopped"]


def stopped(stopper: EarlyStopping, epoch: int) -> bool:
    """Return whether a callback stopped in this epoch."""
    # ``stopped_epoch`` is 0 both for "never" and for epoch 0.
    return stopper.stopped_epoch == epoch and (epoch > 0 or stopper.wait_count > 0)


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
