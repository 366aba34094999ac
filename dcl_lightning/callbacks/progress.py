"""Progress of a stream: Lightning's bar with task and time left, or one line per task."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar, Timer, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT

from dcl_lightning._lightning import callbacks_of, datamodule_of, log_interval
from dcl_lightning.callbacks.hooks import wrap_hook
from dcl_lightning.callbacks.task_clock import TaskClock
from dcl_lightning.report.counts import rows_of
from dcl_lightning.screen import is_watched, log_through, show
from dcl_lightning.types import Batch

if TYPE_CHECKING:
    from dcl_lightning.report.live import TaskTable

__all__ = ["StreamBar", "StreamProgress", "show_memory"]

_SECONDS_BETWEEN_UPDATES = 1.0
_LOGGERS = ("", "lightning", "lightning.fabric", "lightning.pytorch")


class StreamBar(RichProgressBar):
    """Lightning's Rich bar in one line, with the time left of ``StreamProgress`` alone; the command line's default.

    On a terminal of less than 120 columns it leaves out the speed and all metrics but the loss. In a fit it
    stands below the table of the tasks that have ended, which ``TaskReport`` gives it; messages appear above both.

    Attributes:
        table: what is drawn above the bar; None for nothing.
    """

    table: TaskTable | None = None
    _undo: Callable[[], None] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the table from now on, and let messages pass above what is drawn."""
        super().on_train_start(trainer, pl_module)
        if self.progress is not None and self.is_enabled:
            wrap_hook(self.progress, "get_renderables", lambda bars: lambda: [*filter(None, [self.table]), *bars()])
            self._undo = self._undo or log_through(sys.stderr, _LOGGERS)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw for the last time, before the result is printed."""
        self._stop_progress()

    def _stop_progress(self) -> None:
        super()._stop_progress()
        self.table = None
        if self._undo is not None:
            self._undo()
            self._undo = None

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the metrics under short names, without the version of the run's folder."""
        found = super().get_metrics(trainer, pl_module)
        metrics = {name.removeprefix("train/"): value for name, value in found.items() if name != "v_num"}
        return {name: value for name, value in metrics.items() if name == "loss" or not _is_narrow()}

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """Return the columns before the metrics."""
        hidden = {"CustomTimeColumn"} | ({"ProcessingSpeedColumn"} if _is_narrow() else set())
        return [column for column in super().configure_columns(trainer) if type(column).__name__ not in hidden]


def _is_narrow() -> bool:
    return shutil.get_terminal_size().columns < 120


class StreamProgress(pl.Callback):
    """Shows task, epoch and the time left for the whole stream in Lightning's progress bar, whichever the trainer has.

    If the output is no terminal, it prints a line at the start of each task instead. A bar of another class is left as
    it is. Worker 0 shows it for all. The time left follows from the mean speed of this fit since its first batch, which
    pays for what starts only once; validation and evaluation count. ``max_steps`` and ``max_time`` bound it.

    Logs ``throughput/samples_per_s``: samples trained on, new and rehearsed, over all workers, since it was logged last
    in this epoch.
    """

    def __init__(self) -> None:
        self._clock: TaskClock | None = None
        self._shown_task, self._shown = -1, 0.0
        self._since = 0.0, 0.0  # from when on the speed is measured, and the batches that were done then
        self._is_warm = False  # after the first batch of a fit
        self._samples, self._mark = 0, 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Switch Lightning's bar off if the output is no terminal."""
        bar = trainer.progress_bar_callback
        if isinstance(bar, (TQDMProgressBar, RichProgressBar)) and not is_watched():
            bar.disable()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count time and work from here: the earlier part of a resumed run took place in another process."""
        clock = TaskClock.of(trainer)
        self._clock = clock if clock is not None and clock.tasks and trainer.is_global_zero else None
        self._shown_task, self._shown = -1, 0.0
        self._since, self._is_warm = (time.monotonic(), self._done(trainer)), False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the task."""
        self._shown = 0.0
        self._samples, self._mark = 0, time.monotonic()
        self._show(trainer, self._done(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Show the time left once a second, and log the throughput."""
        if isinstance(batch, Batch):
            self._samples += len(batch.targets)
        now, every = time.monotonic(), log_interval(trainer)
        if every and self._samples and now > self._mark and trainer.global_step % every == 0:
            rate = self._samples * trainer.world_size / (now - self._mark)
            pl_module.log("throughput/samples_per_s", rate, batch_size=1)
            self._samples, self._mark = 0, now
        share = (batch_idx + 1) / max(trainer.num_training_batches, 1)
        if not self._is_warm:
            held = rows_of(trainer, pl_module)
            if held is not None:
                show_memory(trainer, held.capacity, held.num_bytes, held.shared)
        if now - self._shown >= _SECONDS_BETWEEN_UPDATES:
            self._show(trainer, self._done(trainer, share))
        if not self._is_warm:
            self._since, self._is_warm = (now, self._done(trainer, share)), True

    def _show(self, trainer: pl.Trainer, done: float) -> None:
        clock, bar = self._clock, trainer.progress_bar_callback
        if clock is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._shown = time.monotonic()
        task, epoch = clock.task_at(trainer.current_epoch), trainer.current_epoch
        first, end = clock.schedule.boundaries[task], clock.schedule.boundaries[task + 1]
        seconds = self._seconds_left(trainer, done)
        left = "" if seconds is None else f" · {timedelta(seconds=round(seconds))} left"
        name = f"task {task} ({task + 1} of {len(clock.tasks)})"
        text = f"{name} · epoch {epoch - first + 1}/{end - first}{left}"
        if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            bar.train_progress_bar.set_description(text)
        elif isinstance(bar, RichProgressBar) and bar.is_enabled:
            if bar.progress is not None and bar.train_progress_bar_id is not None:
                bar.progress.update(bar.train_progress_bar_id, description=text)
        elif task != self._shown_task and not is_watched():
            samples = clock.tasks[task].num_samples
            epochs = "1 epoch" if end - first == 1 else f"{end - first} epochs"
            show(f"{name} · {epochs} of {samples} samples{left}")
        self._shown_task = task

    def _done(self, trainer: pl.Trainer, share_of_epoch: float = 0.0) -> float:
        """Return the number of batches of the stream that are done."""
        if self._clock is None:
            return 0.0
        whole = sum(_batches(trainer, self._clock, epoch) for epoch in range(trainer.current_epoch))
        return whole + share_of_epoch * _batches(trainer, self._clock, trainer.current_epoch)

    def _seconds_left(self, trainer: pl.Trainer, done: float) -> float | None:
        clock, (since, done_then) = self._clock, self._since
        assert clock is not None
        if done <= done_then:
            return None
        rate = (time.monotonic() - since) / (done - done_then)
        left = sum(_batches(trainer, clock, epoch) for epoch in range(clock.schedule.boundaries[-1])) - done
        if trainer.max_steps > 0:
            left = min(left, float(trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        times = [c.time_remaining() for c in callbacks_of(trainer) if isinstance(c, Timer)]
        return max(min([rate * left, *(t for t in times if t is not None)]), 0.0)


def show_memory(trainer: pl.Trainer, capacity: int, num_bytes: int, shared: bool = False) -> None:
    """Print the size of a memory if Lightning prints a model summary, in which it is not: a batch makes it.

    Args:
        trainer: of the fit.
        capacity: in rows.
        num_bytes: of these rows.
        shared: whether it is one for all workers.
    """
    if any(isinstance(callback, ModelSummary) for callback in callbacks_of(trainer)):
        whose = " on each worker" if trainer.world_size > 1 and not shared else ""
        rank_zero_info(f"Memory: room for {capacity:,} rows, {num_bytes:,} bytes{whose}")


def _batches(trainer: pl.Trainer, clock: TaskClock, epoch: int) -> float:
    """Return the number of batches of an epoch as known beforehand; exemplars may add to it."""
    data = datamodule_of(trainer)
    index = clock.task_at(epoch)
    tasks = clock.tasks[: index + 1] if data.concatenate_tasksets else [clock.tasks[index]]
    batches = -(-sum(task.num_samples for task in tasks) // (trainer.world_size * data.batch_size)) * data.passes
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else batches * limit
