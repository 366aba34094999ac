"""Makes checkpoints resumable within an epoch, and refuses those of another run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from dcl_lightning._lightning import datamodule_of
from dcl_lightning.callbacks.task_reset import move_schedules
from dcl_lightning.checkpoint.directory import ClaimedFolders
from dcl_lightning.checkpoint.io import FORMAT, KEY, keep_side_files
from dcl_lightning.checkpoint.resume import move_loop_progress, name_of
from dcl_lightning.comm import comm_of
from dcl_lightning.distributed.horovod.shutdown import requeue_between_steps

__all__ = ["ResumableCheckpoints"]


class ResumableCheckpoints(pl.Callback):
    """Claims the folders of the checkpoints, adds what tells whose they are, and finds a saved place again.

    A run may go on with another number of workers or another batch size: it then goes on after as many samples of the
    epoch, rounded down to whole steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folders = ClaimedFolders()
        self._moved_to: int | None = None
        self._saves_last: list[tuple[ModelCheckpoint, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the strategy check what it loads and take side files along, and SLURM's signal wait for a step's end."""
        keep_side_files(trainer.strategy)
        requeue_between_steps(trainer)
        self._moved_to = None
        if getattr(trainer, "fast_dev_run", False):
            # Lightning saves nothing then, but for this at the end.
            savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            self._saves_last = [(saver, saver.save_last) for saver in savers]
            for saver in savers:
                saver.save_last = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a folder that cannot be written or in which another job saves; take the others."""
        if getattr(trainer, "fast_dev_run", False):
            return
        claimed = self._folders.claim(trainer, comm_of(trainer.strategy))
        keep_side_files(trainer.strategy).folders = claimed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put schedules to the saved place if a step has another number of samples now."""
        if self._moved_to is not None:
            move_schedules(trainer, self._moved_to)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the epoch as begun, which Lightning leaves out after resume from the end of the one before.

        What is saved within this epoch would else be taken for another end of an epoch.
        """
        progress: Any = trainer.fit_loop.epoch_progress
        for counts in (progress.total, progress.current):
            if counts.ready == counts.processed:
                counts.ready = counts.started = counts.processed + 1

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tell the checkpoint its format, the agent, and how many samples a step has."""
        ours = checkpoint.setdefault(KEY, {"format": FORMAT})
        ours |= {"agent": name_of(pl_module), "step_samples": _step_samples(trainer)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the place within the epoch again if a step has another number of samples now."""
        before, now = checkpoint.get(KEY, {}).get("step_samples"), _step_samples(trainer)
        if trainer.state.fn == TrainerFn.FITTING and before and now and now != before:
            self._moved_to = move_loop_progress(checkpoint["loops"]["fit_loop"], before, now)

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
