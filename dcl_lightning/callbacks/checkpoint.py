"""Makes checkpoints resumable within an epoch, also with another number of samples in each step."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.lr_scheduler import LambdaLR

from dcl_lightning._lightning import datamodule_of, dev_run_batches, wrap_hpc_choice
from dcl_lightning.callbacks.task_clock import TaskClock, TaskSchedule, write_rates
from dcl_lightning.checkpoint.directory import ClaimedFolders
from dcl_lightning.checkpoint.io import FORMAT, KEY, keep_side_files
from dcl_lightning.checkpoint.resume import move_loop_progress, name_of, saved_by_this_job, slurm_job
from dcl_lightning.comm import comm_of
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.distributed.horovod.shutdown import requeue_alone
from dcl_lightning.types import StateDict

__all__ = ["ResumableCheckpoints", "scale_rates"]


class ResumableCheckpoints(pl.Callback):
    """Claims the folders of the checkpoints, records their run, and restores the step within an epoch.

    A run may go on with another number of workers or another batch size: it then goes on after as many samples of the
    epoch, rounded down to whole steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folders = ClaimedFolders()
        self._step_in_epoch: int | None = None
        self._saves_last: list[tuple[ModelCheckpoint, bool | Literal["link"] | None]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the strategy check what it loads and take side files along, and SLURM's signal wait for a step's end."""
        keep_side_files(trainer.strategy)
        requeue_alone(trainer)
        self._step_in_epoch = None
        if dev_run_batches(trainer):
            # Lightning saves nothing then but ``last.ckpt`` at the end.
            savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            self._saves_last = [(saver, saver.save_last) for saver in savers]
            for saver in savers:
                saver.save_last = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a folder that cannot be written or in which another job saves; take the others."""
        if dev_run_batches(trainer):
            return
        claimed = self._folders.claim(trainer, comm_of(trainer.strategy))
        keep_side_files(trainer.strategy).folders = claimed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move schedules to the converted step."""
        if self._step_in_epoch is not None:
            clock = TaskClock.of(trainer)
            assert clock is not None
            _move_schedules(trainer, clock.schedule, self._step_in_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Count the epoch as begun, which Lightning leaves out after resume from the end of the one before.

        Else a checkpoint from within this epoch would look like one from its end.
        """
        progress: Any = trainer.fit_loop.epoch_progress
        for counts in (progress.total, progress.current):
            if counts.ready == counts.processed:
                counts.ready = counts.started = counts.processed + 1

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: StateDict) -> None:
        """Record the format, the agent, how many samples a step has, and SLURM's job."""
        ours = checkpoint.setdefault(KEY, {"format": FORMAT})
        ours |= {"agent": name_of(pl_module), "step_samples": _step_samples(trainer), "slurm_job": slurm_job()}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: StateDict) -> None:
        """Convert the step within the epoch if a step has another number of samples now."""
        before, now = checkpoint.get(KEY, {}).get("step_samples"), _step_samples(trainer)
        if trainer.state.fn == TrainerFn.FITTING and before and now and now != before:
            data = datamodule_of(trainer)
            passes = data.passes if isinstance(data, ContinualDataModule) else 1
            self._step_in_epoch = move_loop_progress(checkpoint["loops"]["fit_loop"], before, now, passes)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release the folders."""
        self._folders.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the folders."""
        self._folders.release()
        while self._saves_last:
            saver, wanted = self._saves_last.pop()
            saver.save_last = wanted


def _step_samples(trainer: pl.Trainer) -> int | None:
    batch_size = getattr(datamodule_of(trainer), "batch_size", None)
    return None if batch_size is None else int(trainer.world_size * batch_size)


def _move_schedules(trainer: pl.Trainer, schedule: TaskSchedule, done: int) -> None:
    """Move schedules that count a task's steps to the step within the epoch after which ``done`` steps are done."""
    every, epochs = trainer.accumulate_grad_batches, schedule.epochs_into_task(trainer.current_epoch)
    steps = epochs * -(-int(trainer.num_training_batches) // every) + done // every
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if config.interval == "step" and isinstance(scheduler, LambdaLR):
            scheduler.last_epoch = steps
            write_rates(scheduler)


def scale_rates(checkpoint: StateDict, clock: str, factor: float) -> None:
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


# In a SLURM job Lightning resumes from the latest checkpoint of SLURM's signal in the folder, whoever has saved it.
wrap_hpc_choice(saved_by_this_job)
