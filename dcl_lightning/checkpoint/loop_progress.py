"""The place within an epoch, for a run that goes on with another number of samples a step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.optim.lr_scheduler import LambdaLR

from dcl_lightning.callbacks.task_reset import write_rates

__all__ = ["move_place", "place_schedules"]

_BEYOND_ANY_EPOCH = 2**60


def move_place(loop: dict[str, Any], before: int, now: int) -> int:
    """Change the saved state of Lightning's loops to the step up to which as many samples were trained on.

    Rounded down: what a step has already seen in part comes again, and nothing is left out.

    Args:
        loop: the saved state of the fit loop, changed in place.
        before: samples a step over all workers, when it was saved.
        now: samples a step now.

    Returns:
        Steps done within the epoch in which the run goes on.
    """
    progress = loop["epoch_loop.batch_progress"]
    current = progress["current"]
    pending = current["ready"] - current["completed"]  # 1 where it was saved before Lightning had counted the step
    over = progress["is_last_batch"]
    steps = _BEYOND_ANY_EPOCH if over and not pending else current["ready"] * before // now
    current |= {"ready": steps, "started": steps, "processed": steps, "completed": steps - pending}
    for loader in loop["state_dict"].get("combined_loader", []):
        if "position" in loader:
            loader["position"] = steps
    return 0 if over else steps


def place_schedules(trainer: pl.Trainer, done: int) -> None:
    """Put schedules that count a task's steps to a place within the epoch.

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
