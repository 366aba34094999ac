"""What a task boundary resets: optimizers, schedules, and the best value so far."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR

from dcl_lightning._lightning import callbacks_of, set_callbacks

__all__ = [
    "adopt_rates", "begin_anew", "end_resumption", "extend_schedules", "forget_best", "forget_best_checkpoints",
    "hyperparameters", "keep_limits", "keep_order", "move_schedules", "reset_optimizers", "scale_rates", "write_rates",
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
    end_resumption(trainer)


def end_resumption(trainer: pl.Trainer) -> None:
    """Let a trainer's loops begin what comes next, in place of going on amid what a checkpoint was saved in.

    Args:
        trainer: of the fit.
    """
    loop = trainer.fit_loop
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part.on_iteration_done()


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
    order = {id(callback): i for i, callback in enumerate(callbacks_of(trainer))}

    def undo() -> None:
        set_callbacks(trainer, sorted(callbacks_of(trainer), key=lambda c: order.get(id(c), len(order))))

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

    In place: a new optimizer object would have to be wrapped and hooked again. Parameter groups that were added since,
    as by ``BackboneFinetuning``, keep their values.

    Args:
        trainer: of the fit.
        snapshot: of ``hyperparameters``.
    """
    for optimizer, groups in zip(trainer.optimizers, snapshot["groups"], strict=True):
        optimizer.state.clear()
        for group, values in zip(optimizer.param_groups, groups, strict=False):
            group.update(copy.deepcopy(values))
    for config, state in zip(trainer.lr_scheduler_configs, snapshot["schedules"], strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(state))
    extend_schedules(trainer, snapshot)
    for scheduler in _schedules(trainer):
        write_rates(scheduler)


# -- rates: a schedule's base rates are what the rates of its optimizer are computed from ------------------------------


def write_rates(scheduler: LambdaLR) -> None:
    """Write a schedule's present rates into its optimizer, between two steps.

    Args:
        scheduler: schedule of one optimizer.
    """
    groups = scheduler.optimizer.param_groups
    # A group that was added since has a rate, which is not the schedule's.
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=False):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups[: len(scheduler.base_lrs)]]


def adopt_rates(trainer: pl.Trainer, snapshot: dict[str, Any] | None) -> dict[str, Any]:
    """Take rates that were written into an optimizer before training, by ``LearningRateFinder`` for one, as base rates.

    Args:
        trainer: at the first batch of a fit, fresh or resumed.
        snapshot: that a resumed run has of its start; None for a fresh one.

    Returns:
        The snapshot, with these rates.
    """
    if snapshot is not None:
        extend_schedules(trainer, snapshot)
    for i, config in enumerate(trainer.lr_scheduler_configs):
        scheduler = config.scheduler
        if not isinstance(scheduler, LambdaLR):
            continue
        rates, last = [group["lr"] for group in scheduler.optimizer.param_groups], scheduler.get_last_lr()
        trios = zip(rates, last, scheduler.base_lrs, strict=False)
        scheduler.base_lrs[: len(last)] = [rate if rate != before else base for rate, before, base in trios]
        if rates != last or snapshot is None:  # when it was made, the batches of an epoch were not known
            write_rates(scheduler)
            if snapshot is not None:
                known = len(snapshot["schedules"][i]["base_lrs"])
                snapshot["schedules"][i]["base_lrs"] = scheduler.base_lrs[:known]
    return hyperparameters(trainer) if snapshot is None else snapshot


def scale_rates(checkpoint: dict[str, Any], clock: str, factor: float) -> None:
    """Multiply all rates of a checkpoint that a fit goes on from.

    Args:
        checkpoint: changed in place.
        clock: the key of the clock among its callbacks.
        factor: above 0.
    """
    snapshot = (checkpoint["callbacks"].get(clock) or {}).get("snapshot") or {"groups": [], "schedules": []}
    groups = [group for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
    for group in [*groups, *(group for groups in snapshot["groups"] for group in groups)]:
        group |= {name: group[name] * factor for name in ("lr", "initial_lr") if name in group}
    for state in [*checkpoint["lr_schedulers"], *snapshot["schedules"]]:
        state |= {name: [r * factor for r in state[name]] for name in ("base_lrs", "_last_lr") if name in state}


def move_schedules(trainer: pl.Trainer, done: int) -> None:
    """Move schedules that count a task's steps to a step within the epoch.

    Args:
        trainer: at the start of training.
        done: steps done within the present epoch.
    """
    clock: Any = trainer.lightning_module.clock
    epoch, every = trainer.current_epoch, trainer.accumulate_grad_batches
    epochs = epoch - clock.boundaries[clock.task_at(epoch)]
    steps = epochs * -(-int(trainer.num_training_batches) // every) + done // every
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if config.interval == "step" and isinstance(scheduler, LambdaLR):
            scheduler.last_epoch = steps
            write_rates(scheduler)


def extend_schedules(trainer: pl.Trainer, snapshot: dict[str, Any]) -> None:
    """Let schedules leave the rates of parameter groups that were added since as they are.

    Args:
        trainer: of the fit.
        snapshot: of ``hyperparameters``, from before any group was added.
    """
    known = {id(o): len(groups) for o, groups in zip(trainer.optimizers, snapshot["groups"], strict=True)}
    for scheduler in _schedules(trainer):
        first = known.get(id(scheduler.optimizer), len(scheduler.base_lrs))
        added = scheduler.optimizer.param_groups[first:]
        scheduler.base_lrs = [*scheduler.base_lrs[:first], *(group["lr"] for group in added)]
        scheduler.lr_lambdas = [*scheduler.lr_lambdas[:first], *(_unchanged for _ in added)]


def _schedules(trainer: pl.Trainer) -> list[LambdaLR]:
    return [c.scheduler for c in trainer.lr_scheduler_configs if isinstance(c.scheduler, LambdaLR)]


def _unchanged(step: int) -> float:
    return 1.0
