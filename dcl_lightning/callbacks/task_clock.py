"""The task clock: one ``fit`` for the whole stream of tasks."""

from __future__ import annotations

import copy
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dcl_lightning._lightning import (
    callbacks_of,
    datamodule_of,
    reload_training_data,
    reload_validation_data,
    set_callbacks,
)
from dcl_lightning.callbacks.evaluation import average_only_network, evaluation_batches, scores_of, update_averages
from dcl_lightning.callbacks.hooks import call_callbacks, call_task_hook, wrap_hook
from dcl_lightning.callbacks.task_reset import (
    adopt_rates,
    begin_anew,
    end_resumption,
    extend_schedules,
    forget_best,
    forget_best_checkpoints,
    keep_limits,
    keep_order,
    reset_optimizers,
)
from dcl_lightning.callbacks.trainer_checks import (
    refuse_early_stopping,
    refuse_empty_shares,
    refuse_limits,
    refuse_rare_validation,
    refuse_selection_on_test,
    refuse_single_validation,
    refuse_stochastic_averaging,
    refuse_tuning_on_resume,
)
from dcl_lightning.checkpoint.resume import BEYOND_ANY_EPOCH
from dcl_lightning.comm import Comm, SingleProcessComm, broadcast_buffers, comm_of
from dcl_lightning.distributed.horovod.shutdown import through_signals
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.metrics import AccuracyMatrix
from dcl_lightning.metrics.evaluation import EvaluationCounts, StreamResults
from dcl_lightning.report.counts import SampleCounts
from dcl_lightning.types import Batch, Task

__all__ = ["TaskClock"]

# Values of ``max_epochs`` that mean "not chosen by the user": Lightning's own default and no limit.
_UNSET_MAX_EPOCHS = (None, -1, 1000)


class TaskClock(pl.Callback):
    """Turns epochs into tasks, calls the task hooks and fills the accuracy matrix.

    An agent brings its own; among the trainer's callbacks it takes any LightningModule through the stream. Such a
    module may have the hooks ``on_task_start(task)`` and ``on_task_end(task)``. Its scores come from
    ``evaluate(batch)`` or, if it has none, from ``forward(inputs)``.

    The task is found from the epoch counter by bisection and never advanced by a hook, so that a
    checkpoint of any step resumes right. An ``EarlyStopping`` ends the task instead of the fit; whatever else sets
    ``trainer.should_stop`` ends the fit. ``trainer.min_epochs`` holds for each task. Every fit without ``ckpt_path``
    trains the whole stream, also with a trainer that has been used before.

    During a fit it stands behind all other callbacks but those that save checkpoints: what is saved at a boundary holds
    the boundary's work.

    With ``data.boundaries: hidden`` no hook is called and nothing is reset at a boundary; the matrix is filled all the
    same.

    Args:
        epochs_per_task: epochs of every task, or one number per task; each at least 1.
        optimizer_reset: whether each task starts with an empty optimizer state and with the learning
            rate and schedule of the start of training.
        task_aware: whether evaluation also restricts the scores to each task's classes (task-IL).
        future_tasks: whether evaluation takes in tasks not learnt yet, and all of them before training.

    Attributes:
        results: what evaluation found, the same on all workers.
        baseline: ``(T,)`` float64, the untrained network's accuracies with ``future_tasks``, else None.
        tasks: the stream, known after ``setup``.
        wall_time: seconds spent in ``train``, ``select`` (validation) and ``eval`` (test sets).
    """

    def __init__(
        self,
        epochs_per_task: int | Sequence[int] = 1,
        optimizer_reset: bool = True,
        task_aware: bool = False,
        future_tasks: bool = False,
    ) -> None:
        super().__init__()
        given = [epochs_per_task] if isinstance(epochs_per_task, int) else list(epochs_per_task)
        if not given or any(not isinstance(n, int) or n < 1 for n in given):
            raise ConfigurationError(
                f"epochs_per_task={epochs_per_task!r}: give a whole number of at least 1, or one per task"
            )
        self.epochs_per_task = epochs_per_task if isinstance(epochs_per_task, int) else given
        self.optimizer_reset = optimizer_reset
        self.task_aware, self.future_tasks = task_aware, future_tasks
        self.boundaries: list[int] = []
        self.tasks: list[Task] = []
        self.results = StreamResults([[]], num_classes=1)
        self.baseline: Tensor | None = None
        self.evaluated_rows = 0
        self._samples = SampleCounts()
        self._comm: Comm = SingleProcessComm()
        self._scores: Callable[[Batch], Tensor] | None = None
        self.wall_time = {"train": 0.0, "select": 0.0, "eval": 0.0}
        self._hidden = False
        self._snapshot: dict[str, Any] | None = None
        self._started_tasks = self._ended_tasks = 0
        self._ended_by: list[str] = []  # whose hooks have ended the task that comes next
        self._mark = 0.0
        self._fitting = self._begun = self._adopted = False
        self._min_epochs = 0
        self._lifted: tuple[int, bool] | None = None  # limits that wait for what a checkpoint left unfinished
        self._before_training = False
        # An EarlyStopping has asked for the task's end; the trainer was told to stop for it; so did someone else.
        self._stopping = self._raised = self._others = False
        self._undo: list[Callable[[], None]] = []

    @property
    def matrix(self) -> AccuracyMatrix:
        """Accuracy on task j after task i, the same on all workers."""
        return self.results.matrix

    @property
    def evaluates(self) -> bool:
        """Whether the module of the last fit gives scores, so that there is a matrix."""
        return self._scores is not None

    @property
    def has_started(self) -> bool:
        """Whether the first task has started."""
        return self._started_tasks > 0

    @property
    def samples_seen(self) -> dict[str, int]:
        """Samples trained on, ``new`` and ``rehearsed``, over all workers, as of the last epoch's end or save."""
        return self._samples.seen

    # -- the stream ------------------------------------------------------------------------------

    def task_at(self, epoch: int) -> int:
        """Return the 0-based task of an epoch; the last task for later epochs.

        What is tried out before training, as by ``LearningRateFinder``, is tried on task 0.
        """
        if not self._begun:
            return 0
        return min(max(bisect_right(self.boundaries, epoch) - 1, 0), max(len(self.tasks) - 1, 0))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the stream from the data module and give the fit its length."""
        if stage != TrainerFn.FITTING.value:
            return
        data = datamodule_of(trainer)
        if data is None or not hasattr(data, "tasks"):
            raise ConfigurationError(
                "TaskClock needs a ContinualDataModule: call trainer.fit(agent, datamodule=ContinualDataModule(...))"
            )
        self._hidden = getattr(data, "boundaries", "known") == "hidden"
        if self._hidden:
            refuse_early_stopping(trainer)
        num_tasks = data.num_tasks
        epochs = self._epochs(num_tasks)
        dev_batches = int(getattr(trainer, "fast_dev_run", 0))
        if dev_batches:
            num_tasks = min(num_tasks, 2)
            epochs = [1] * data.num_tasks
        total = sum(epochs[:num_tasks])
        if not dev_batches and trainer.fit_loop.max_epochs not in (*_UNSET_MAX_EPOCHS, total):
            raise ConfigurationError(
                f"trainer.max_epochs={trainer.fit_loop.max_epochs} contradicts epochs_per_task, which gives {total}: "
                "leave max_epochs out and use epochs_per_task"
            )
        stream = data.tasks(epochs)
        self.tasks = stream[:num_tasks]
        self.boundaries = [sum(epochs[:t]) for t in range(num_tasks + 1)]
        self.results = StreamResults([task.tested for task in stream], data.num_classes, self.task_aware)
        self.baseline = None
        self.evaluated_rows = self._started_tasks = self._ended_tasks = 0
        self._samples = SampleCounts()
        self.wall_time = dict.fromkeys(self.wall_time, 0.0)
        self._snapshot = None
        self._begun = False
        self._stopping = self._raised = self._others = False
        self._lifted, self._before_training = None, True
        refuse_limits(trainer)
        self._ended_by = []
        trainer.__dict__.pop("save_checkpoint", None)  # of an earlier fit that was stopped
        refuse_selection_on_test(trainer, data)
        refuse_stochastic_averaging(trainer)
        refuse_rare_validation(trainer, self.tasks, data)
        refuse_empty_shares(trainer, self.tasks, data)
        refuse_single_validation(trainer, pl_module, data)
        self._attach(trainer, data)
        trainer.fit_loop.max_epochs = total
        if dev_batches:
            trainer.fit_loop.epoch_loop.max_steps = dev_batches * num_tasks

    def _attach(self, trainer: pl.Trainer, data: Any) -> None:
        """Take trainer, callbacks and data module into use until the fit has ended."""
        self._release()
        begin_anew(trainer)
        self._fitting, self._min_epochs = True, trainer.fit_loop.min_epochs or 0
        self._undo = [keep_limits(trainer), keep_order(trainer)]
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        others = [c for c in callbacks_of(trainer) if c is not self]
        place = next((i for i, c in enumerate(others) if isinstance(c, Checkpoint)), len(others))
        set_callbacks(trainer, [*others[:place], self, *others[place:]])
        stoppers = trainer.early_stopping_callbacks
        for stopper in stoppers:
            self._undo += [
                wrap_hook(stopper, name, self._watched) for name in ("on_validation_end", "on_train_epoch_end")
            ]
        if stoppers:  # Lightning calls this hook of theirs after everyone's but those that save
            self._undo.append(wrap_hook(stoppers[-1], "on_train_epoch_end", self._then_end_task))
        self._undo.append(wrap_hook(trainer.fit_loop, "setup_data", partial(self._then_lift_limits, trainer)))
        data.attach_clock(self)
        self._undo.append(lambda: data.attach_clock(None))

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._fitting = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave trainer, callbacks and data module as they were."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave trainer, callbacks and data module as they were."""
        self._release()

    def _epochs(self, num_tasks: int) -> list[int]:
        if isinstance(self.epochs_per_task, int):
            return [self.epochs_per_task] * num_tasks
        if len(self.epochs_per_task) != num_tasks:
            raise ConfigurationError(
                f"epochs_per_task={self.epochs_per_task} has {len(self.epochs_per_task)} numbers for {num_tasks} "
                "tasks: give one number for all tasks, or one for each"
            )
        return list(self.epochs_per_task)

    # -- training --------------------------------------------------------------------------------

    def _then_lift_limits(self, trainer: pl.Trainer, setup_data: Callable[[], None]) -> Callable[[], None]:
        """Return what Lightning calls before it looks whether a fit has reached its limits of steps and time already.

        It would then call no hook: a validation that follows the checkpoint's last step, and the end of a task, would
        never come. The limits hold again after them.
        """

        def hook() -> None:
            setup_data()
            if not self._before_training or not trainer.fit_loop.restarting:
                return
            epochs: Any = trainer.fit_loop.epoch_progress.current
            ended = sum(end <= trainer.current_epoch for end in self.boundaries[1:])
            if epochs.processed < epochs.ready or self.evaluated_rows < ended:
                loop = trainer.fit_loop.epoch_loop
                self._lifted = loop.max_steps, trainer.should_stop
                loop.max_steps, trainer.should_stop = -1, False

        return hook

    def _restore_limits(self, trainer: pl.Trainer) -> None:
        if self._lifted is not None:
            trainer.fit_loop.epoch_loop.max_steps, stopped = self._lifted
            trainer.should_stop |= stopped
            self._lifted = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish what a resumed run's checkpoint left unfinished."""
        self._mark = time.monotonic()
        self._adopted = self._before_training = False
        if trainer.fit_loop.restarted_on_epoch_end:
            self._leave_epoch(trainer)
        loop = trainer.fit_loop.epoch_loop
        if loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
            self._finish_epoch(trainer, pl_module)
            # Lightning sees the end of an epoch by comparing its batches with the next epoch's, which can be longer.
            loop.batch_progress.current.completed = BEYOND_ANY_EPOCH
        elif loop.restarted_on_train_batch_end:
            self._validate_if_due(trainer)
        if self._stopping and trainer.fit_loop.restarted_mid_epoch and self._may_end(trainer, epoch_is_over=False):
            self._close_epoch(trainer)
        self._end_tasks_owed(trainer, pl_module)
        self._restore_limits(trainer)
        self._hold_min_epochs(trainer)

    def _leave_epoch(self, trainer: pl.Trainer) -> None:
        """Go on with the next epoch where the checkpoint is of an epoch's end.

        With ``max_steps`` Lightning enters the finished epoch again and counts it twice, so that another one is lost.
        """
        trainer.fit_loop.epoch_progress.increment_completed()
        end_resumption(trainer)

    def _close_epoch(self, trainer: pl.Trainer) -> None:
        """End the epoch amid which an ``EarlyStopping`` stopped before the checkpoint was saved."""
        fit_loop, self._raised = trainer.fit_loop, True
        fit_loop.epoch_loop.reset()
        fit_loop.on_advance_end()
        end_resumption(trainer)

    def _hold_min_epochs(self, trainer: pl.Trainer) -> None:
        """Let Lightning count ``min_epochs`` from the task's start."""
        if self._min_epochs:
            first = self.boundaries[self.task_at(trainer.current_epoch)]
            trainer.fit_loop.min_epochs = first + self._min_epochs

    def _end_tasks_owed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End tasks that a limit of steps or time cut off: a resumed run begins with the epoch after."""
        for index in range(self.evaluated_rows, self.task_at(trainer.current_epoch)):
            self._end_owed_task(trainer, pl_module, self.tasks[index])

    def _end_owed_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        self._end(trainer, pl_module, task, resumed=True)
        # The loader of this epoch was made before; it has to be asked for again.
        reload_training_data(trainer)

    def _finish_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what Lightning leaves out after resume from an epoch's last step: validate, let early stopping decide."""
        progress = trainer.fit_loop.epoch_progress.current
        progress.completed -= 1  # Lightning is in the next epoch already
        task = self.tasks[self.task_at(trainer.current_epoch)]
        if trainer.current_epoch + 1 in self.boundaries and self.evaluated_rows <= task.index:
            self._end_owed_task(trainer, pl_module, task)  # a signal has broken it off, before it was validated
        self._validate_if_due(trainer)
        for stopper in trainer.early_stopping_callbacks:
            stopper.on_train_epoch_end(trainer, pl_module)
        progress.completed += 1
        # Lightning has these loaders for the next epoch's. If the task has ended now, that epoch has one more.
        reload_validation_data(trainer)

    def _validate_if_due(self, trainer: pl.Trainer) -> None:
        """Validate if it is due after the batch at whose end was saved, which Lightning leaves out."""
        if trainer.enable_validation and _validation_is_due(trainer):
            loop = trainer.fit_loop.epoch_loop.val_loop
            trainer.validating = True
            loop.restarting = False
            loop.run()
            trainer.training = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a task in its first epoch."""
        self._hold_min_epochs(trainer)
        self._start_task(trainer, pl_module)
        if self._snapshot is not None:
            extend_schedules(trainer, self._snapshot)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start a task where Lightning has left ``on_train_epoch_start`` out: after resume from an epoch's end."""
        self._start_task(trainer, pl_module)

    def _start_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._adopted:
            self._adopted = True
            self._snapshot = adopt_rates(trainer, self._snapshot)
        task = self.tasks[self.task_at(trainer.current_epoch)]
        if self._started_tasks > task.index:
            return
        self._started_tasks = task.index + 1
        if hasattr(pl_module, "tasks_seen"):
            setattr(pl_module, "tasks_seen", task.index + 1)  # noqa: B010 (modules declare no such attribute)
        if self.future_tasks and not task.index and self._scores is not None:
            self._measure_baseline(trainer, pl_module)
        if self._hidden:
            return
        if task.index:
            forget_best(trainer.early_stopping_callbacks)
            forget_best_checkpoints(trainer)
        if task.index and self.optimizer_reset and self._snapshot is not None:
            reset_optimizers(trainer, self._snapshot)
        call_task_hook("on_task_start", trainer, pl_module, task)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last batch of a task: end it, before validation and before any checkpoint."""
        if isinstance(batch, Batch):
            self._count(trainer, batch)
        last_epoch = trainer.current_epoch + 1 in self.boundaries
        if last_epoch and batch_idx + 1 >= trainer.num_training_batches:
            self._end_task(trainer, pl_module)

    def _count(self, trainer: pl.Trainer, batch: Batch) -> None:
        data = datamodule_of(trainer)
        # Exemplars that are part of a task's training set come among the new samples.
        self._samples.add(batch, data.task_id if data.replays_in_task else None)

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
        """Add up what the workers have counted."""
        self._samples.settle(self._comm)
        self.wall_time["train"] += self._lap()

    def _watched(self, check: Callable[..., None]) -> Callable[..., None]:
        """Return a hook of an ``EarlyStopping`` that asks for the task's end where the callback asks for the fit's."""

        def hook(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self._others |= trainer.should_stop and not self._raised
            trainer.should_stop = False
            check(trainer, pl_module)
            self._stopping |= trainer.should_stop
            over = not trainer.validating or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            self._raised = self._stopping and self._may_end(trainer, over)
            trainer.should_stop = self._others or self._raised

        return hook

    def _may_end(self, trainer: pl.Trainer, epoch_is_over: bool) -> bool:
        epoch = trainer.current_epoch
        return epoch + epoch_is_over - self.boundaries[self.task_at(epoch)] >= self._min_epochs

    def _then_end_task(self, check: Callable[..., None]) -> Callable[..., None]:
        def hook(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            check(trainer, pl_module)
            self._end_stopped_task(trainer, pl_module)

        return hook

    def _end_stopped_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._raised:
            return
        epoch = trainer.current_epoch
        task = self.task_at(epoch)
        shift = self.boundaries[task + 1] - (epoch + 1)
        self.boundaries[task + 1 :] = [b - shift for b in self.boundaries[task + 1 :]]
        trainer.fit_loop.max_epochs = self.boundaries[-1]
        trainer.should_stop, self._stopping, self._raised = self._others, False, False
        self._end_task(trainer, pl_module)

    def _end_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = self.tasks[self.task_at(trainer.current_epoch)]
        if self.evaluated_rows <= task.index:
            update_averages(trainer, pl_module)
            self._end(trainer, pl_module, task)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task, resumed: bool = False) -> None:
        self.wall_time["train"] += self._lap()
        # What a signal leaves undone is done when the run is resumed.
        through_signals(trainer, pl_module, lambda: self._work_at_end(trainer, pl_module, task), save=not resumed)
        self.wall_time["eval"] += self._lap()

    # An early stop may end a task within Lightning's validation, which is in inference mode.
    @torch.inference_mode(False)
    def _work_at_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        if self._ended_tasks <= task.index:
            # From here on its running statistics are used, on every worker.
            broadcast_buffers(pl_module, comm_of(trainer.strategy))
            if not self._hidden:
                call_task_hook("on_task_end", trainer, pl_module, task, self._ended_by)
            self._ended_tasks, self._ended_by = task.index + 1, []
        self.evaluate(trainer, pl_module, task)

    # -- evaluation ------------------------------------------------------------------------------

    def evaluate(self, trainer: pl.Trainer, agent: Any, task: Task) -> None:
        """Write row ``task.index`` of the matrix: the test sets of all tasks so far, each sample once."""
        last = len(self.tasks) - 1 if self.future_tasks else task.index
        if self._scores is not None:
            self.results.add(task.index, self._row_counts(trainer, agent, last), self._comm.allreduce)
        self.evaluated_rows = task.index + 1
        if self._scores is not None:
            call_callbacks("on_task_evaluated", trainer, agent, task)

    def _measure_baseline(self, trainer: pl.Trainer, agent: Any) -> None:
        """Evaluate the network before it has learnt anything."""
        self.wall_time["train"] += self._lap()
        untrained = StreamResults(self.results.tested, self.results.num_classes)
        last = len(self.tasks) - 1
        counts = through_signals(trainer, agent, lambda: self._row_counts(trainer, agent, last), save=False)
        untrained.add(0, counts, self._comm.allreduce)
        self.baseline = untrained.matrix.values[0]
        self.wall_time["eval"] += self._lap()

    def _row_counts(self, trainer: pl.Trainer, agent: Any, last_task: int) -> EvaluationCounts:
        """Count this worker's hits on the test sets of tasks 0..last_task; the host does not wait for a batch."""
        data = datamodule_of(trainer)
        scores = self._scores
        assert scores is not None
        counts = self.results.new_counts()
        for column, loader in enumerate(data.test_loaders(last_task)):
            for batch in evaluation_batches(agent, loader, trainer.limit_test_batches):
                counts.add(column, scores(batch), batch.targets)
        return counts

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
            "stopping": self._stopping,
            "ended_by": list(self._ended_by),
            "evaluated_rows": self.evaluated_rows,
            "results": self.results.state_dict(),
            "baseline": self.baseline,
            "samples_seen": dict(self.samples_seen),
            "wall_time": dict(self.wall_time),
            "snapshot": copy.deepcopy(self._snapshot),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse searches before a resumed run goes on."""
        if self._fitting:
            refuse_tuning_on_resume(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state back in a fit, which sets up first; evaluation and prediction leave the results alone."""
        if self._fitting:
            self._restore(state_dict)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add up what the workers have counted: unlike ``state_dict``, every worker's trainer calls this."""
        checkpoint["callbacks"][self.state_key]["samples_seen"] = dict(self._samples.settle(self._comm))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the fit the length that early stopping left it with."""
        self._comm, self._begun = comm_of(trainer.strategy), True
        self._scores = scores_of(pl_module)
        average_only_network(trainer, pl_module)
        trainer.fit_loop.max_epochs = self.boundaries[-1]

    def _restore(self, state: dict[str, Any]) -> None:
        if len(state["boundaries"]) != len(self.boundaries):
            raise ConfigurationError(
                f"the checkpoint has {len(state['boundaries']) - 1} tasks and the data {len(self.boundaries) - 1}: "
                "resume with the scenario that the run was started with"
            )
        self.boundaries = list(state["boundaries"])
        self._started_tasks, self._ended_tasks = state["started_tasks"], state["ended_tasks"]
        self._stopping = state.get("stopping", False)
        self._ended_by = list(state.get("ended_by", ()))
        self.evaluated_rows = state["evaluated_rows"]
        self.results.load_state_dict(state["results"])
        self.baseline = state["baseline"]
        self._samples.seen, self.wall_time = dict(state["samples_seen"]), dict(state["wall_time"])
        self._snapshot = copy.deepcopy(state["snapshot"])


def _validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after the batch at whose end the checkpoint was saved, as its epoch loop decides."""
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return False  # Lightning starts measuring the time again
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    progress, due = trainer.fit_loop.epoch_loop.batch_progress, int(trainer.val_check_batch or 1)
    if every is None:
        return progress.total.ready % due == 0
    batches = progress.current.ready
    if (trainer.current_epoch + 1) % every or not isinstance(interval, (int, float)):
        return False
    if batches >= BEYOND_ANY_EPOCH:
        return True  # the end of an epoch, resumed with other numbers of samples a step
    if isinstance(interval, float):
        # At the end of an epoch Lightning has the next one's number of batches already.
        interval = max(int(batches * interval), 1) if progress.is_last_batch else due
    return batches % interval == 0
