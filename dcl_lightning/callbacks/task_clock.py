"""The task clock: one ``fit`` for the whole stream of tasks, and what is reset at each boundary."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from operator import sub
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from dcl_lightning._lightning import (
    callbacks_of,
    datamodule_of,
    dev_run_batches,
    reload_loaders_each_epoch,
    reload_training_data,
    reload_validation_data,
    restore_save,
    set_callbacks,
    validates_by_time,
    wrap_fetching,
    wrap_save,
)
from dcl_lightning.callbacks.agreement import refuse_disagreement
from dcl_lightning.callbacks.evaluation import average_only_network, evaluation_batches, scores_of, update_averages
from dcl_lightning.callbacks.hooks import call_callbacks, call_task_hook, wrap_hook
from dcl_lightning.callbacks.trainer_checks import refuse_contradictions, refuse_tuning_on_resume
from dcl_lightning.checkpoint.resume import BEYOND_ANY_EPOCH
from dcl_lightning.comm import Comm, SingleProcessComm, broadcast_buffers, comm_of
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.distributed.horovod.shutdown import through_signals
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.metrics import AccuracyMatrix
from dcl_lightning.metrics.evaluation import EvaluationCounts, StreamResults
from dcl_lightning.report.counts import SampleCounts
from dcl_lightning.screen import EXPECTED_WARNINGS, ignore_warnings
from dcl_lightning.stopwatch import Stopwatch
from dcl_lightning.types import Batch, StateDict, Task

__all__ = ["TaskClock", "TaskSchedule", "write_rates"]

Hook = Callable[[pl.Trainer, pl.LightningModule], None]
# Values of ``max_epochs`` that mean "not chosen by the user": Lightning's own default and no limit.
_UNSET_MAX_EPOCHS = (None, -1, 1000)
# Phases of a fit: training, in which the others lie; waiting for a training batch; waiting for the memory, or doing its
# work; the work of the methods at a task's end; validation; test sets; checkpoints.
_PHASES = ("train", "data", "rehearse", "task_end", "select", "evaluate", "checkpoint")


@dataclass
class TaskSchedule:
    """Which epochs belong to which task, and how far a fit has come; plain values, saved with each checkpoint.

    Args:
        boundaries: first epoch of each task, then the number of all epochs.
        started: tasks that have started.
        ended: tasks whose ``on_task_end`` hooks have returned.
        ended_by: names of the objects whose ``on_task_end`` has already returned for the task that ends next.
        evaluated: tasks after which the test sets were evaluated.
        stopping: whether an ``EarlyStopping`` has asked for the end of the current task.
    """

    boundaries: list[int] = field(default_factory=lambda: [0])
    started: int = 0
    ended: int = 0
    ended_by: list[str] = field(default_factory=list)
    evaluated: int = 0
    stopping: bool = False

    @classmethod
    def of(cls, epochs: Sequence[int]) -> TaskSchedule:
        """Return the schedule of a fit that has not begun, given the number of epochs of each task."""
        return cls([0, *accumulate(epochs)])

    @property
    def num_epochs(self) -> int:
        """Epochs of all tasks."""
        return self.boundaries[-1]

    def task_at(self, epoch: int) -> int:
        """Return the 0-based task of an epoch; the last task for later epochs."""
        return min(self.tasks_over(epoch), max(len(self.boundaries) - 2, 0))

    def epochs_into_task(self, epoch: int) -> int:
        """Return the number of epochs of an epoch's task that come before it."""
        return epoch - self.boundaries[self.task_at(epoch)]

    def is_last_of_task(self, epoch: int) -> bool:
        """Return whether a task ends with an epoch."""
        return epoch + 1 in self.boundaries

    def tasks_over(self, epoch: int) -> int:
        """Return how many tasks are over when an epoch begins."""
        return bisect_right(self.boundaries, epoch) - 1

    def end_task_with(self, epoch: int) -> None:
        """Let an epoch's task end with it; later tasks keep their lengths."""
        task = self.task_at(epoch)
        skipped = self.boundaries[task + 1] - (epoch + 1)
        self.boundaries[task + 1 :] = [end - skipped for end in self.boundaries[task + 1 :]]


class TaskClock(pl.Callback):
    """Turns epochs into tasks, calls the task hooks and fills the accuracy matrix.

    Every agent has one. For any other LightningModule, add one to the trainer's callbacks. Such a module may have the
    hooks ``on_task_start(task)`` and ``on_task_end(task)``. Its scores come from ``evaluate(batch)`` if it has that
    method, else from ``forward(inputs)``; a method ``before_evaluation()`` is called before.

    The task is computed from the epoch number and never counted up by a hook, so that a checkpoint of any step resumes
    in the right task. An ``EarlyStopping`` ends the task instead of the fit; whatever else sets
    ``trainer.should_stop`` ends the fit. ``trainer.min_epochs`` holds for each task. Every fit without ``ckpt_path``
    trains the whole stream, also with a trainer that has been used before.

    During a fit it runs after all callbacks except those that save checkpoints. So a checkpoint that is saved at a
    boundary includes that boundary's work. ``ModelCheckpoint`` knows ``{task}`` in the names of its files.

    With ``data.boundaries: hidden`` no hook is called and nothing is reset at a boundary; the matrix is filled all the
    same.

    Args:
        epochs_per_task: epochs of every task, or one number per task; each at least 1.
        optimizer_reset: whether each task starts with an empty optimizer state and with the learning
            rate and schedule of the start of training.
        task_aware: whether evaluation also restricts the scores to each task's classes (task-IL).
        future_tasks: whether to evaluate tasks not learnt yet as well, and all tasks once before training.

    Attributes:
        results: the accuracy matrix and all else that evaluation has found, the same on all workers. An agent has it as
            ``agent.results``.
        tasks: the stream, known after ``setup``.
        schedule: which epochs belong to which task, and how far the fit has come.
        stopwatch: runs from the start of training to the end of the fit.
    """

    def __init__(
        self,
        epochs_per_task: int | Sequence[int] = 1,
        optimizer_reset: bool = True,
        task_aware: bool = False,
        future_tasks: bool = False,
    ) -> None:
        super().__init__()
        several = isinstance(epochs_per_task, Sequence)
        given = list(epochs_per_task) if isinstance(epochs_per_task, Sequence) else [epochs_per_task]
        if not given or any(type(number) is not int or number < 1 for number in given):
            raise ConfigurationError(
                f"epochs_per_task={epochs_per_task!r}: give a whole number of at least 1, or one per task"
            )
        self.epochs_per_task = given if several else given[0]
        self.optimizer_reset = optimizer_reset
        self.task_aware, self.future_tasks = task_aware, future_tasks
        self.schedule = TaskSchedule()
        self.tasks: list[Task] = []
        self.results = StreamResults([[]], num_classes=1)
        self._samples = SampleCounts()
        self._comm: Comm = SingleProcessComm()
        self._scores: Callable[[Batch], Tensor] | None = None
        self.stopwatch = Stopwatch(_PHASES)
        self._hidden = False
        self._optimizer_snapshot: StateDict | None = None
        self._fitting = self._fit_started = self._rates_adopted = False
        self._min_epochs = 0
        # ``max_steps`` and ``should_stop`` while a resumed run does what its checkpoint left undone.
        self._suspended_limits: tuple[int, bool] | None = None
        self._before_training = False
        # Whether ``trainer.should_stop`` is set for the end of the task, and whether for another reason.
        self._stops_task = self._stops_fit = False
        self._undo: list[Callable[[], None]] = []
        self._undo_names: list[Callable[[], None]] = []  # of checkpoints, some of which are saved after an exception

    @classmethod
    def of(cls, trainer: pl.Trainer) -> TaskClock | None:
        """Return the first clock among a trainer's callbacks; None if there is none."""
        return next((callback for callback in callbacks_of(trainer) if isinstance(callback, cls)), None)

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
        return self.schedule.started > 0

    @property
    def wall_time(self) -> dict[str, float]:
        """Seconds of this worker's main thread, of the whole run, whose parts add up to the time of the fit so far.

        They are spent in ``train``, ``data`` (waiting for a training batch), ``rehearse`` (waiting for the memory; its
        whole work with ``execution: inline``), ``task_end`` (``on_task_end`` hooks), ``select`` (validation),
        ``evaluate`` (test sets) and ``checkpoint`` (saving). Work that a GPU has been given and not finished counts
        where the host waits for it.
        """
        return self.stopwatch.seconds

    @property
    def task_epochs(self) -> list[tuple[int, int]]:
        """Epochs of each task, and those that it was to have: an ``EarlyStopping`` may have ended it before."""
        given, ends = self.epochs_per_task, self.schedule.boundaries
        planned = [given] * (len(ends) - 1) if isinstance(given, int) else given
        return list(zip(map(sub, ends[1:], ends), planned, strict=True))

    @property
    def samples_seen(self) -> dict[str, int]:
        """Samples trained on, ``new`` and ``rehearsed``, over all workers, as of the last epoch's end or save."""
        return self._samples.seen

    # -- the stream ------------------------------------------------------------------------------

    def task_at(self, epoch: int) -> int:
        """Return the 0-based task of an epoch, the last one for later epochs.

        It is 0 until the fit starts: ``LearningRateFinder`` and ``BatchSizeFinder`` search on the first task.
        """
        return self.schedule.task_at(epoch) if self._fit_started else 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the stream from the data module and give the fit its length."""
        if stage != TrainerFn.FITTING.value:
            return
        data = datamodule_of(trainer)
        if not isinstance(data, ContinualDataModule):
            raise ConfigurationError(
                "TaskClock needs a ContinualDataModule: call trainer.fit(agent, datamodule=ContinualDataModule(...))"
            )
        is_own = vars(pl_module).get("clock") is self  # a foreign module may have hyperparameters for each worker
        refuse_disagreement(trainer, pl_module if is_own else None, data, comm_of(trainer.strategy))
        self._hidden = data.boundaries == "hidden"
        num_tasks = data.num_tasks
        epochs = self._epochs(num_tasks)
        dev_batches = dev_run_batches(trainer)
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
        self.schedule = TaskSchedule.of(epochs[:num_tasks])
        self.results = StreamResults([task.tested for task in stream], data.num_classes, self.task_aware)
        self._samples = SampleCounts()
        self.stopwatch.reset()
        self._optimizer_snapshot = None
        self._fit_started = False
        self._stops_task = self._stops_fit = False
        self._suspended_limits, self._before_training = None, True
        restore_save(trainer)  # an earlier fit may have been stopped
        refuse_contradictions(trainer, pl_module, data, self.tasks)
        self._attach(trainer, data)
        trainer.fit_loop.max_epochs = total
        if dev_batches:
            trainer.fit_loop.epoch_loop.max_steps = dev_batches * num_tasks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find how to score the module, and set the length of the fit, which a resumed run may have shortened."""
        self._comm, self._fit_started = comm_of(trainer.strategy), True
        self._scores = scores_of(pl_module)
        average_only_network(trainer, pl_module)
        trainer.fit_loop.max_epochs = self.schedule.num_epochs

    def _attach(self, trainer: pl.Trainer, data: ContinualDataModule) -> None:
        """Change trainer, callbacks and data module for the time of the fit."""
        self._release()
        self._release_names()
        _begin_anew(trainer)
        self._fitting, self._min_epochs = True, trainer.fit_loop.min_epochs or 0
        self._undo = [ignore_warnings(EXPECTED_WARNINGS)]
        self._undo += [_keep_limits(trainer), _keep_order(trainer), reload_loaders_each_epoch(trainer)]
        others = [c for c in callbacks_of(trainer) if c is not self]
        place = next((i for i, c in enumerate(others) if isinstance(c, Checkpoint)), len(others))
        set_callbacks(trainer, [*others[:place], self, *others[place:]])
        stoppers = trainer.early_stopping_callbacks
        for stopper in stoppers:
            self._undo += [
                wrap_hook(stopper, name, self._wrap_to_stop_task_only)
                for name in ("on_validation_end", "on_train_epoch_end")
            ]
        if stoppers:  # Lightning calls this hook of theirs after everyone's but those that save
            self._undo.append(wrap_hook(stoppers[-1], "on_train_epoch_end", self._wrap_to_end_task))
        self._undo.append(wrap_hook(trainer.fit_loop, "setup_data", partial(self._wrap_to_suspend_limits, trainer)))
        self._undo_names = [
            wrap_hook(saver, "format_checkpoint_name", partial(self._wrap_to_name_task, trainer, saver))
            for saver in trainer.checkpoint_callbacks
            if isinstance(saver, ModelCheckpoint)
        ]
        watch = self.stopwatch
        self._undo += [
            wrap_fetching(trainer, lambda: watch.enter("data"), lambda: watch.leave("data")),
            wrap_hook(trainer.fit_loop.epoch_loop.val_loop, "run", watch.phase("select")),
            wrap_save(trainer, watch.phase("checkpoint")),
        ]
        data.attach_clock(self)
        self._undo.append(lambda: data.attach_clock(None))

    def _release(self) -> None:
        self.stopwatch.stop()
        while self._undo:
            self._undo.pop()()
        self._fitting = False

    def _release_names(self) -> None:
        while self._undo_names:
            self._undo_names.pop()()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave trainer, callbacks and data module as they were."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave trainer, callbacks and data module as they were."""
        self._release()
        self._release_names()

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

    def _wrap_to_suspend_limits(self, trainer: pl.Trainer, setup_data: Callable[[], None]) -> Callable[[], None]:
        """Wrap ``fit_loop.setup_data``.

        After it, Lightning ends a resumed fit that has reached ``max_steps`` or ``max_time`` without calling a hook: a
        validation or the end of a task that the checkpoint left undone would be lost. The limits are therefore
        suspended until ``on_train_start`` has done that work.
        """

        def hook() -> None:
            setup_data()
            if not self._before_training or not trainer.fit_loop.restarting:
                return
            epochs: Any = trainer.fit_loop.epoch_progress.current
            if epochs.processed < epochs.ready or self.schedule.evaluated < self.schedule.tasks_over(
                trainer.current_epoch
            ):
                loop = trainer.fit_loop.epoch_loop
                self._suspended_limits = loop.max_steps, trainer.should_stop
                loop.max_steps, trainer.should_stop = -1, False

        return hook

    def _restore_limits(self, trainer: pl.Trainer) -> None:
        if self._suspended_limits is not None:
            trainer.fit_loop.epoch_loop.max_steps, stopped = self._suspended_limits
            trainer.should_stop |= stopped
            self._suspended_limits = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the work that a resumed run's checkpoint left unfinished."""
        self.stopwatch.start("train")
        self._rates_adopted = self._before_training = False
        if trainer.fit_loop.restarted_on_epoch_end:
            self._leave_epoch(trainer)
        loop = trainer.fit_loop.epoch_loop
        if loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
            self._finish_epoch(trainer, pl_module)
            # Lightning sees the end of an epoch by comparing its batches with the next epoch's, which can be longer.
            loop.batch_progress.current.completed = BEYOND_ANY_EPOCH
        elif loop.restarted_on_train_batch_end:
            self._validate_if_due(trainer)
        if (
            self.schedule.stopping
            and trainer.fit_loop.restarted_mid_epoch
            and self._may_end(trainer, epoch_is_over=False)
        ):
            self._close_epoch(trainer)
        self._end_cut_off_tasks(trainer, pl_module)
        self._restore_limits(trainer)
        self._hold_min_epochs(trainer)

    def _leave_epoch(self, trainer: pl.Trainer) -> None:
        """Start the next epoch if the checkpoint was saved at the end of one.

        With ``max_steps``, Lightning would enter the finished epoch again, count it twice, and train one too few.
        """
        trainer.fit_loop.epoch_progress.increment_completed()
        _end_resumption(trainer)

    def _close_epoch(self, trainer: pl.Trainer) -> None:
        """End the epoch in which an ``EarlyStopping`` had already asked to stop when the checkpoint was saved."""
        fit_loop, self._stops_task = trainer.fit_loop, True
        fit_loop.epoch_loop.reset()
        fit_loop.on_advance_end()
        _end_resumption(trainer)

    def _hold_min_epochs(self, trainer: pl.Trainer) -> None:
        """Let Lightning count ``min_epochs`` from the task's start."""
        if self._min_epochs:
            task_start = trainer.current_epoch - self.schedule.epochs_into_task(trainer.current_epoch)
            trainer.fit_loop.min_epochs = task_start + self._min_epochs

    def _end_cut_off_tasks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End tasks that a limit of steps or time cut off: a resumed run begins with the epoch after."""
        for index in range(self.schedule.evaluated, self.task_at(trainer.current_epoch)):
            self._end_task_on_resume(trainer, pl_module, self.tasks[index])

    def _end_task_on_resume(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        self._run_task_end(trainer, pl_module, task, resumed=True)
        # The loader of this epoch was made before; it has to be asked for again.
        reload_training_data(trainer)

    def _finish_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate and let early stopping decide, which Lightning leaves out after resume from an epoch's last step."""
        progress = trainer.fit_loop.epoch_progress.current
        progress.completed -= 1  # Lightning is in the next epoch already
        task = self.tasks[self.task_at(trainer.current_epoch)]
        if self.schedule.is_last_of_task(trainer.current_epoch) and self.schedule.evaluated <= task.index:
            # A signal had interrupted the task's end before this epoch was validated.
            self._end_task_on_resume(trainer, pl_module, task)
        self._validate_if_due(trainer)
        for stopper in trainer.early_stopping_callbacks:
            stopper.on_train_epoch_end(trainer, pl_module)
        progress.completed += 1
        # Lightning takes these loaders for the next epoch's; if the task has ended now, that epoch has one more.
        reload_validation_data(trainer)

    def _validate_if_due(self, trainer: pl.Trainer) -> None:
        """Run the validation that is due after the batch at whose end the checkpoint was saved: Lightning skips it."""
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
        if self._optimizer_snapshot is not None:
            _extend_schedules(trainer, self._optimizer_snapshot)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Start a task where Lightning has left ``on_train_epoch_start`` out: after resume from an epoch's end."""
        self._start_task(trainer, pl_module)

    def _start_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._rates_adopted:
            self._rates_adopted = True
            self._optimizer_snapshot = _adopt_rates(trainer, self._optimizer_snapshot)
        task = self.tasks[self.task_at(trainer.current_epoch)]
        if self.schedule.started > task.index:
            return
        self.schedule.started = task.index + 1
        if hasattr(pl_module, "tasks_seen"):
            setattr(pl_module, "tasks_seen", task.index + 1)  # noqa: B010 (modules declare no such attribute)
        if self.future_tasks and not task.index and self._scores is not None:
            self._measure_baseline(trainer, pl_module)
        if self._hidden:
            return
        if task.index:
            _forget_best(trainer.early_stopping_callbacks)
            _forget_best_checkpoints(trainer)
        if task.index and self.optimizer_reset and self._optimizer_snapshot is not None:
            _reset_optimizers(trainer, self._optimizer_snapshot)
        call_task_hook("on_task_start", trainer, pl_module, task)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """After the last batch of a task: end it, before validation and before any checkpoint."""
        if isinstance(batch, Batch):
            self._count(trainer, batch)
        last_epoch = self.schedule.is_last_of_task(trainer.current_epoch)
        if last_epoch and batch_idx + 1 >= trainer.num_training_batches:
            self._end_current_task(trainer, pl_module)

    def _count(self, trainer: pl.Trainer, batch: Batch) -> None:
        data = datamodule_of(trainer)
        # Exemplars that are part of a task's training set come among the new samples.
        self._samples.add(batch, data.task_id if data.replays_in_task else None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task if an ``EarlyStopping`` stopped at the end of this epoch."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._end_stopped_task(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up the samples of all workers."""
        self._samples.settle(self._comm)

    def _wrap_to_stop_task_only(self, check: Hook) -> Hook:
        """Wrap a hook of an ``EarlyStopping``: it ends the task where the callback would end the fit."""

        def hook(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self._stops_fit |= trainer.should_stop and not self._stops_task
            trainer.should_stop = False
            check(trainer, pl_module)
            self.schedule.stopping |= trainer.should_stop
            over = not trainer.validating or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            self._stops_task = self.schedule.stopping and self._may_end(trainer, over)
            trainer.should_stop = self._stops_fit or self._stops_task

        return hook

    def _may_end(self, trainer: pl.Trainer, epoch_is_over: bool) -> bool:
        epoch = trainer.current_epoch
        return self.schedule.epochs_into_task(epoch) + epoch_is_over >= self._min_epochs

    def _wrap_to_end_task(self, check: Hook) -> Hook:
        def hook(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            check(trainer, pl_module)
            self._end_stopped_task(trainer, pl_module)

        return hook

    def _end_stopped_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._stops_task:
            return
        self.schedule.end_task_with(trainer.current_epoch)
        task = self.task_at(trainer.current_epoch)
        learnt, planned = self.task_epochs[task]
        if learnt < planned:
            rank_zero_info(f"task {task} ends early, after {learnt} of {planned} epochs")
        trainer.fit_loop.max_epochs = self.schedule.num_epochs
        self.schedule.stopping = self._stops_task = False
        trainer.should_stop = self._stops_fit
        self._end_current_task(trainer, pl_module)

    def _end_current_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = self.tasks[self.task_at(trainer.current_epoch)]
        if self.schedule.evaluated <= task.index:
            update_averages(trainer, pl_module)
            self._run_task_end(trainer, pl_module, task)

    def _run_task_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task, resumed: bool = False
    ) -> None:
        # A resumed run does the work that a signal leaves undone.
        with self.stopwatch.phase("task_end"):
            through_signals(trainer, pl_module, lambda: self._task_end_work(trainer, pl_module, task), save=not resumed)

    # An early stop may end a task within Lightning's validation, which is in inference mode.
    @torch.inference_mode(False)
    def _task_end_work(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        if self.schedule.ended <= task.index:
            # From here on its running statistics are used, on every worker.
            broadcast_buffers(pl_module, comm_of(trainer.strategy))
            if not self._hidden:
                call_task_hook("on_task_end", trainer, pl_module, task, self.schedule.ended_by)
            self.schedule.ended, self.schedule.ended_by = task.index + 1, []
        with self.stopwatch.phase("evaluate"):
            self._evaluate(trainer, pl_module, task)

    # -- evaluation ------------------------------------------------------------------------------

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Write row ``task.index`` of the matrix: the test sets of all tasks so far, each sample once."""
        last = len(self.tasks) - 1 if self.future_tasks else task.index
        if self._scores is not None:
            self.results.add(task.index, self._row_counts(trainer, pl_module, last), self._comm.allreduce)
        self.schedule.evaluated = task.index + 1
        if self._scores is not None:
            call_callbacks("on_task_evaluated", trainer, pl_module, task)

    def _measure_baseline(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the network before it has learnt anything."""
        untrained = StreamResults(self.results.tested, self.results.num_classes)
        last = len(self.tasks) - 1
        with self.stopwatch.phase("evaluate"):
            counts = through_signals(trainer, pl_module, lambda: self._row_counts(trainer, pl_module, last), save=False)
            untrained.add(0, counts, self._comm.allreduce)
        self.results.baseline = untrained.matrix.values[0]

    def _row_counts(self, trainer: pl.Trainer, pl_module: pl.LightningModule, last_task: int) -> EvaluationCounts:
        """Count this worker's hits on the test sets of tasks 0..last_task; the host does not wait for a batch."""
        data = datamodule_of(trainer)
        scores = self._scores
        assert scores is not None
        getattr(pl_module, "before_evaluation", lambda: None)()
        counts = self.results.new_counts()
        for column, loader in enumerate(data.test_loaders(last_task)):
            for batch in evaluation_batches(pl_module, loader, trainer.limit_test_batches):
                counts.add(column, scores(batch), batch.targets)
        return counts

    # -- checkpoint ------------------------------------------------------------------------------

    def _wrap_to_name_task(self, trainer: pl.Trainer, saver: ModelCheckpoint, name: Callable[..., str]) -> Any:
        """Wrap ``format_checkpoint_name``: it knows ``{task}``, and a saver without ``filename`` begins with it."""

        def hook(metrics: dict[str, Tensor], filename: str | None = None, *args: Any, **kwargs: Any) -> str:
            metrics.setdefault("task", torch.tensor(self.task_at(trainer.current_epoch)))
            default = saver.CHECKPOINT_JOIN_CHAR.join(("{task}", "{epoch}", "{step}"))
            return name(metrics, filename or saver.filename or default, *args, **kwargs)

        return hook

    def state_dict(self) -> StateDict:
        """Return the state of a resumed run, in plain types and tensors."""
        return {
            "schedule": asdict(self.schedule),
            "results": self.results.state_dict(),
            "samples_seen": dict(self.samples_seen),
            "wall_time": self.wall_time,
            "snapshot": copy.deepcopy(self._optimizer_snapshot),
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: StateDict) -> None:
        """Refuse searches before a resumed run goes on."""
        if self._fitting:
            refuse_tuning_on_resume(trainer)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the state in a fit, after its set-up; evaluation and prediction leave the results alone."""
        if self._fitting:
            self._restore(state_dict)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: StateDict) -> None:
        """Add the samples of all workers: every worker calls this hook, unlike ``state_dict``.

        The seconds are those until here: other callbacks have written the memories meanwhile.
        """
        samples = dict(self._samples.settle(self._comm))
        checkpoint["callbacks"][self.state_key] |= {"samples_seen": samples, "wall_time": self.wall_time}

    def _restore(self, state: StateDict) -> None:
        schedule = TaskSchedule(**state["schedule"])
        if len(schedule.boundaries) != len(self.schedule.boundaries):
            raise ConfigurationError(
                f"the checkpoint has {len(schedule.boundaries) - 1} tasks and the data "
                f"{len(self.schedule.boundaries) - 1}: resume with the scenario that the run was started with"
            )
        self.schedule = schedule
        self.results.load_state_dict(state["results"])
        self._samples.seen, wall_time = dict(state["samples_seen"]), dict(state["wall_time"])
        if "eval" in wall_time:  # a checkpoint of before evaluation and the work at a task's end were told apart
            wall_time["evaluate"] = wall_time.pop("eval")
        self.stopwatch.reset(wall_time)
        self._optimizer_snapshot = copy.deepcopy(state["snapshot"])


def _validation_is_due(trainer: pl.Trainer) -> bool:
    """Return whether Lightning's epoch loop validates after the batch at whose end the checkpoint was saved."""
    if validates_by_time(trainer):
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


# -- what a boundary resets, and what a fit leaves behind ------------------------------------------------------------


def _begin_anew(trainer: pl.Trainer) -> None:
    """Let a trainer that has been used before count epochs and steps from 0; a checkpoint is loaded later."""
    loop = trainer.fit_loop
    if not loop.epoch_progress.total.ready:
        return
    loop.load_state_dict(type(loop)(trainer).state_dict())
    _end_resumption(trainer)


def _end_resumption(trainer: pl.Trainer) -> None:
    """Let a trainer's loops begin the next epoch instead of going on within the epoch of a checkpoint."""
    loop = trainer.fit_loop
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part.on_iteration_done()


def _keep_limits(trainer: pl.Trainer) -> Callable[[], None]:
    """Return a function that restores a trainer's current limits."""
    owners: list[tuple[object, str]] = [
        (trainer.fit_loop, "max_epochs"),
        (trainer.fit_loop, "min_epochs"),
        (trainer.fit_loop.epoch_loop, "max_steps"),
    ]
    values = [getattr(owner, name) for owner, name in owners]

    def undo() -> None:
        for (owner, name), value in zip(owners, values, strict=True):
            setattr(owner, name, value)

    return undo


def _keep_order(trainer: pl.Trainer) -> Callable[[], None]:
    """Return a function that restores the current order of a trainer's callbacks."""
    order = {id(callback): i for i, callback in enumerate(callbacks_of(trainer))}

    def undo() -> None:
        set_callbacks(trainer, sorted(callbacks_of(trainer), key=lambda c: order.get(id(c), len(order))))

    return undo


def _forget_best(stoppers: Sequence[EarlyStopping]) -> None:
    """Let ``EarlyStopping`` measure the next task by itself."""
    for stopper in stoppers:
        stopper.wait_count = stopper.stopped_epoch = 0
        worst = float("inf") if stopper.monitor_op == torch.lt else -float("inf")
        stopper.best_score = torch.tensor(worst)


def _forget_best_checkpoints(trainer: pl.Trainer) -> None:
    """Let ``ModelCheckpoint`` compare the next task's values with each other only; the files stay."""
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, ModelCheckpoint) and saver.monitor is not None:
            saver.best_k_models = {}
            saver.best_model_score = None
            saver.kth_best_model_path = ""


def _take_optimizer_snapshot(trainer: pl.Trainer) -> StateDict:
    """Return the values of all parameter groups and the states of all schedules."""
    groups = [
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return copy.deepcopy({"groups": groups, "schedules": schedules})


def _reset_optimizers(trainer: pl.Trainer, snapshot: StateDict) -> None:
    """Empty the optimizers' states and restore the values of a snapshot.

    In place: a new optimizer object would have to be wrapped and hooked again. Parameter groups that were added since,
    as by ``BackboneFinetuning``, keep their values.
    """
    for optimizer, groups in zip(trainer.optimizers, snapshot["groups"], strict=True):
        optimizer.state.clear()
        for group, values in zip(optimizer.param_groups, groups, strict=False):
            group.update(copy.deepcopy(values))
    for config, state in zip(trainer.lr_scheduler_configs, snapshot["schedules"], strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(state))
    _extend_schedules(trainer, snapshot)
    for scheduler in _schedules(trainer):
        write_rates(scheduler)


# -- rates: a schedule's base rates are what the rates of its optimizer are computed from ------------------------------


def write_rates(scheduler: LambdaLR) -> None:
    """Write a schedule's present rates into its optimizer, between two steps.

    Args:
        scheduler: schedule of one optimizer.
    """
    groups = scheduler.optimizer.param_groups
    # Groups added after the schedule was made keep their own rates.
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=False):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups[: len(scheduler.base_lrs)]]


def _adopt_rates(trainer: pl.Trainer, snapshot: StateDict | None) -> StateDict:
    """Take rates that were written into an optimizer before training, as by ``LearningRateFinder``, as base rates.

    Args:
        trainer: at the first batch of a fit, fresh or resumed.
        snapshot: a resumed run's, of its start; None for a fresh one.

    Returns:
        The snapshot, with these rates.
    """
    if snapshot is not None:
        _extend_schedules(trainer, snapshot)
    for i, config in enumerate(trainer.lr_scheduler_configs):
        scheduler = config.scheduler
        if not isinstance(scheduler, LambdaLR):
            continue
        rates, last = [group["lr"] for group in scheduler.optimizer.param_groups], scheduler.get_last_lr()
        trios = zip(rates, last, scheduler.base_lrs, strict=False)
        scheduler.base_lrs[: len(last)] = [rate if rate != before else base for rate, before, base in trios]
        if rates != last or snapshot is None:
            # Its first rates were computed before the number of batches of an epoch was known.
            write_rates(scheduler)
            if snapshot is not None:
                known = len(snapshot["schedules"][i]["base_lrs"])
                snapshot["schedules"][i]["base_lrs"] = scheduler.base_lrs[:known]
    return _take_optimizer_snapshot(trainer) if snapshot is None else snapshot


def _extend_schedules(trainer: pl.Trainer, snapshot: StateDict) -> None:
    """Give parameter groups that were added after a snapshot a constant rate in every ``LambdaLR``."""
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
