"""The task clock: one ``fit`` for the whole stream of tasks."""

from __future__ import annotations

import copy
import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import move_data_to_device

from dcl_lightning.distributed.comm import comm_of
from dcl_lightning.distributed.sharing import share_buffers
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.metrics import AccuracyMatrix
from dcl_lightning.types import Batch, Task

__all__ = ["TaskClock"]

# Values of ``max_epochs`` that mean "not chosen by the user": Lightning's own default and no limit.
_UNSET_MAX_EPOCHS = (None, -1, 1000)
_BEYOND_ANY_EPOCH = 2**60


class TaskClock(Checkpoint):
    """Turns epochs into tasks, calls the task hooks and fills the accuracy matrix.

    The task is found from the epoch counter by bisection and never advanced by a hook, so that a
    checkpoint of any step resumes right. It derives from ``Checkpoint`` because Lightning runs such
    callbacks last: it sees whether an ``EarlyStopping`` stopped, and ends the task instead of the fit.

    Args:
        epochs_per_task: epochs of every task, or one number per task; each at least 1.
        optimizer_reset: whether each task starts with an empty optimizer state and with the learning
            rate and schedule of the start of training.

    Attributes:
        matrix: accuracy on task j after task i, the same on all workers.
        tasks: the stream, known after ``setup``.
        wall_time: seconds spent in ``train``, ``select`` (validation) and ``eval`` (test sets).
    """

    def __init__(self, epochs_per_task: int | Sequence[int] = 1, optimizer_reset: bool = True) -> None:
        super().__init__()
        given = [epochs_per_task] if isinstance(epochs_per_task, int) else list(epochs_per_task)
        if not given or any(not isinstance(n, int) or n < 1 for n in given):
            raise ConfigurationError(
                f"epochs_per_task={epochs_per_task!r}: give a whole number of at least 1, or one per task"
            )
        self.epochs_per_task = epochs_per_task if isinstance(epochs_per_task, int) else given
        self.optimizer_reset = optimizer_reset
        self.boundaries: list[int] = []
        self.tasks: list[Task] = []
        self.matrix = AccuracyMatrix(num_tasks=1)
        self.evaluated_rows = 0
        self.samples_seen = {"new": 0, "rehearsed": 0}
        self.wall_time = {"train": 0.0, "select": 0.0, "eval": 0.0}
        self._snapshot: dict[str, Any] | None = None
        self._state: dict[str, Any] | None = None
        self._started_tasks = self._ended_tasks = 0
        self._mark = 0.0

    # -- the stream ------------------------------------------------------------------------------

    def task_at(self, epoch: int) -> int:
        """Return the 0-based task of an epoch; the last task for later epochs."""
        return min(max(bisect_right(self.boundaries, epoch) - 1, 0), max(len(self.tasks) - 1, 0))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the stream from the data module and give the fit its length."""
        if stage != TrainerFn.FITTING.value:
            return
        data = getattr(trainer, "datamodule", None)
        if data is None or not hasattr(data, "tasks"):
            raise ConfigurationError(
                "TaskClock needs a ContinualDataModule: call trainer.fit(agent, datamodule=ContinualDataModule(...))"
            )
        num_tasks = data.num_tasks
        epochs = self._epochs(num_tasks)
        dev_batches = int(getattr(trainer, "fast_dev_run", 0))
        if dev_batches:
            num_tasks = min(num_tasks, 2)
            epochs = [1] * data.num_tasks
            trainer.fit_loop.epoch_loop.max_steps = dev_batches * num_tasks
        total = sum(epochs[:num_tasks])
        if not dev_batches and trainer.fit_loop.max_epochs not in (*_UNSET_MAX_EPOCHS, total):
            raise ConfigurationError(
                f"trainer.max_epochs={trainer.fit_loop.max_epochs} contradicts epochs_per_task, which gives {total}: "
                "leave max_epochs out and use epochs_per_task"
            )
        self.tasks = data.tasks(epochs)[:num_tasks]
        self.boundaries = [sum(epochs[:t]) for t in range(num_tasks + 1)]
        self.matrix = AccuracyMatrix(num_tasks=data.num_tasks)
        self.evaluated_rows = self._started_tasks = self._ended_tasks = 0
        self._snapshot = None
        trainer.fit_loop.max_epochs = total
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        data.attach_clock(self)
        self._refuse_selection_on_test(trainer, data)
        # A checkpoint written at a boundary must hold the boundary's work: the clock goes first.
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        place = next((i for i, c in enumerate(others) if isinstance(c, ModelCheckpoint)), len(others))
        trainer.callbacks = [*others[:place], self, *others[place:]]  # type: ignore[attr-defined]
        if self._state is not None:
            self._restore()

    def _epochs(self, num_tasks: int) -> list[int]:
        if isinstance(self.epochs_per_task, int):
            return [self.epochs_per_task] * num_tasks
        if len(self.epochs_per_task) != num_tasks:
            raise ConfigurationError(
                f"epochs_per_task={self.epochs_per_task} has {len(self.epochs_per_task)} numbers for {num_tasks} tasks"
            )
        return list(self.epochs_per_task)

    @staticmethod
    def _refuse_selection_on_test(trainer: pl.Trainer, data: Any) -> None:
        if getattr(data, "val_ratio", 0.0) > 0 or getattr(data, "select_on_test", False):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if isinstance(monitor, str) and monitor.startswith("val/"):
                raise ConfigurationError(
                    f"{type(callback).__name__}(monitor='{monitor}') would select on test data: set data.val_ratio "
                    "above 0 to hold samples out, or data.select_on_test=true to do it knowingly"
                )

    # -- training --------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember what optimizers and schedules look like before any step."""
        self._mark = time.monotonic()
        if self._snapshot is None:
            self._snapshot = _hyperparameters(trainer)
        loop = trainer.fit_loop.epoch_loop
        if loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
            self._finish_epoch(trainer, pl_module)
            # Lightning sees the end of an epoch by comparing its batches with the next epoch's, which can be longer.
            loop.batch_progress.current.completed = _BEYOND_ANY_EPOCH
        self._end_tasks_owed(trainer, pl_module)

    def _end_tasks_owed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End tasks that a limit of steps or time cut off: a resumed run begins with the epoch after."""
        task = self.task_at(trainer.current_epoch)
        if self._ended_tasks >= task:
            return
        for index in range(self._ended_tasks, task):
            self._end(trainer, pl_module, self.tasks[index])
        # The loader of this epoch was made before; it has to be asked for again.
        trainer.fit_loop._last_train_dl_reload_epoch = float("-inf")

    def _finish_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what Lightning leaves out after resume from an epoch's last step: validate, let early stopping decide."""
        progress, loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.val_loop
        every = trainer.check_val_every_n_epoch
        progress.completed -= 1  # Lightning is in the next epoch already
        if trainer.enable_validation and every is not None and (trainer.current_epoch + 1) % every == 0:
            trainer.validating = True
            loop.restarting = False
            loop.run()
            trainer.training = True
        for stopper in trainer.early_stopping_callbacks:
            stopper.on_train_epoch_end(trainer, pl_module)
        self._end_stopped_task(trainer, pl_module)
        progress.completed += 1

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a task in its first epoch."""
        self._start_task(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start a task where Lightning has left ``on_train_epoch_start`` out: after resume from an epoch's end."""
        self._start_task(trainer, pl_module)

    def _start_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = self.tasks[self.task_at(trainer.current_epoch)]
        if self._started_tasks > task.index:
            return
        self._started_tasks = task.index + 1
        if task.index:
            _forget_best_checkpoints(trainer)
        if task.index and self.optimizer_reset and self._snapshot is not None:
            _reset_optimizers(trainer, self._snapshot)
        _call_task_hook("on_task_start", trainer, pl_module, task)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last batch of a task: end it, before validation and before any checkpoint."""
        if isinstance(batch, Batch):
            self.samples_seen["new"] += batch.num_new
            self.samples_seen["rehearsed"] += len(batch.targets) - batch.num_new
        last_epoch = trainer.current_epoch + 1 in self.boundaries
        if last_epoch and batch_idx + 1 >= trainer.num_training_batches:
            self._end_task(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task if an ``EarlyStopping`` stopped at the end of this epoch."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.wall_time["select"] += self._lap()
            if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                self._end_stopped_task(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the time since the last mark as training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.wall_time["train"] += self._lap()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task if an ``EarlyStopping`` stopped in this epoch."""
        self._end_stopped_task(trainer, pl_module)
        self.wall_time["train"] += self._lap()

    def _end_stopped_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        stoppers = trainer.early_stopping_callbacks
        if not trainer.should_stop or not any(_stopped(s, epoch) for s in stoppers):
            if epoch + 1 in self.boundaries:
                _forget_best(stoppers)
            return
        task = self.task_at(epoch)
        shift = self.boundaries[task + 1] - (epoch + 1)
        self.boundaries[task + 1 :] = [b - shift for b in self.boundaries[task + 1 :]]
        trainer.fit_loop.max_epochs = self.boundaries[-1]
        trainer.should_stop = False
        _forget_best(stoppers)
        self._end_task(trainer, pl_module)

    def _end_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = self.tasks[self.task_at(trainer.current_epoch)]
        if self._ended_tasks <= task.index:
            self._end(trainer, pl_module, task)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        self._ended_tasks = task.index + 1
        self.wall_time["train"] += self._lap()
        # From here on its running statistics are used, on every worker.
        share_buffers(pl_module, comm_of(trainer.strategy))
        _call_task_hook("on_task_end", trainer, pl_module, task)
        self.evaluate(trainer, pl_module, task)
        self.wall_time["eval"] += self._lap()

    # -- evaluation ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, trainer: pl.Trainer, agent: Any, task: Task) -> None:
        """Write row ``task.index`` of the matrix: the test sets of all tasks so far, each sample once."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        was_training = agent.training
        agent.eval()
        counts = torch.zeros(2, task.index + 1, dtype=torch.int64)
        limit = int(getattr(trainer, "fast_dev_run", 0)) or None
        for column, loader in enumerate(data.test_loaders(task.index)):
            for i, batch in enumerate(loader):
                if limit is not None and i >= limit:
                    break
                # Not the strategy's: that one runs the training batch's hooks.
                batch = move_data_to_device(batch, trainer.strategy.root_device)
                batch = data.prepare_batch(batch, train=False, epoch=0)
                hits = agent.evaluate(batch).argmax(1) == batch.targets
                counts[0, column] += int(hits.sum())
                counts[1, column] += len(hits)
        counts = comm_of(trainer.strategy).allreduce(counts)
        for column in range(task.index + 1):
            self.matrix.add_counts(counts[0, column], counts[1, column], task.index, column)
        self.evaluated_rows = task.index + 1
        agent.train(was_training)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, "on_task_evaluated", None)
            if hook is not None:
                hook(trainer, agent, task)

    def _lap(self) -> float:
        now = time.monotonic()
        self._mark, spent = now, now - self._mark
        return spent

    # -- checkpoint ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, in plain types and tensors."""
        return {
            "boundaries": list(self.boundaries),
            "started_tasks": self._started_tasks,
            "ended_tasks": self._ended_tasks,
            "evaluated_rows": self.evaluated_rows,
            "correct": self.matrix.correct.clone(),
            "total": self.matrix.total.clone(),
            "samples_seen": dict(self.samples_seen),
            "wall_time": dict(self.wall_time),
            "snapshot": copy.deepcopy(self._snapshot),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state back; Lightning calls this after ``setup``."""
        self._state = state_dict
        if self.boundaries:
            self._restore()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the fit the length that early stopping left it with."""
        if self.boundaries:
            trainer.fit_loop.max_epochs = self.boundaries[-1]

    def _restore(self) -> None:
        state, self._state = self._state, None
        assert state is not None
        if len(state["boundaries"]) != len(self.boundaries):
            raise ConfigurationError(
                f"the checkpoint has {len(state['boundaries']) - 1} tasks and the data {len(self.boundaries) - 1}: "
                "resume with the scenario that the run was started with"
            )
        self.boundaries = list(state["boundaries"])
        self._started_tasks, self._ended_tasks = state["started_tasks"], state["ended_tasks"]
        self.evaluated_rows = state["evaluated_rows"]
        self.matrix.correct, self.matrix.total = state["correct"].clone(), state["total"].clone()
        self.samples_seen, self.wall_time = dict(state["samples_seen"]), dict(state["wall_time"])
        self._snapshot = copy.deepcopy(state["snapshot"])


def _call_task_hook(name: str, trainer: pl.Trainer, agent: Any, task: Task) -> None:
    """Data module, then agent, then callbacks: whoever has the hook."""
    for owner in (trainer.datamodule, agent):  # type: ignore[attr-defined]
        hook = getattr(owner, name, None)
        if hook is not None:
            hook(task)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        hook = getattr(callback, name, None)
        if hook is not None:
            hook(trainer, agent, task)


def _stopped(stopper: EarlyStopping, epoch: int) -> bool:
    # ``stopped_epoch`` is 0 both for "never" and for epoch 0.
    return stopper.stopped_epoch == epoch and (epoch > 0 or stopper.wait_count > 0)


def _forget_best(stoppers: Sequence[EarlyStopping]) -> None:
    for stopper in stoppers:
        stopper.wait_count = stopper.stopped_epoch = 0
        worst = float("inf") if stopper.monitor_op == torch.lt else -float("inf")
        stopper.best_score = torch.tensor(worst)


def _forget_best_checkpoints(trainer: pl.Trainer) -> None:
    """What was best in one task must not keep the next one's from being saved; the files stay."""
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, ModelCheckpoint) and saver.monitor is not None:
            saver.best_k_models = {}
            saver.best_model_score = None
            saver.kth_best_model_path = ""


def _hyperparameters(trainer: pl.Trainer) -> dict[str, Any]:
    groups = [
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return copy.deepcopy({"groups": groups, "schedules": schedules})


def _reset_optimizers(trainer: pl.Trainer, snapshot: dict[str, Any]) -> None:
    """In place: a new optimizer object would have to be wrapped and hooked again."""
    for optimizer, groups in zip(trainer.optimizers, snapshot["groups"], strict=True):
        optimizer.state.clear()
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(copy.deepcopy(values))
    for config, state in zip(trainer.lr_scheduler_configs, snapshot["schedules"], strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(state))
