"""Lets all workers stop after the same step: on a signal, on a failure, or when the number of batches differs.

Saving takes all workers, and a worker that still waits for this one's gradients cannot take part; so a signal is
recorded when it arrives and acted on between two steps.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from dcl_lightning._lightning import (
    callbacks_of,
    cluster_environment_of,
    dev_run_batches,
    replace_save,
    restore_save,
    set_callbacks,
)
from dcl_lightning.comm import Comm, SingleProcessComm, comm_of, sum_async
from dcl_lightning.distributed.horovod.launcher import ECHOES, HorovodLauncher
from dcl_lightning.distributed.horovod.peers import SILENT, Peers
from dcl_lightning.distributed.horovod.worker_process import launching_process
from dcl_lightning.errors import CheckpointError, ConfigurationError, DataError
from dcl_lightning.types import Clock

__all__ = [
    "StoppedBySignal", "break_off_if_signalled", "current_task", "guard_failures", "remove_stop_callbacks",
    "report_end", "requeue_between_steps", "synchronize_stops", "through_signals", "write_stderr",
]  # fmt: skip

R = TypeVar("R")
Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ENDING_S = 2.0  # from the failure of an operation until the process that caused it has ended
_SAME_PRESS_S = 1.0  # a terminal and a launcher may both deliver one Ctrl-C


class StoppedBySignal(SystemExit):
    """All workers have stopped after the same step; the exit code is 128 + the signal.

    Args:
        signum: the signal that a worker received.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"all workers stopped for {_name(self.signum)}"


# -- signals during long work between two steps --------------------------------------------------------


class _BrokenOff(BaseException):
    """Unwinds work between two steps, so that a signal can be acted on."""


@runtime_checkable
class _ActsOnSignals(Protocol):
    """A callback that synchronizes signals over the workers."""

    def signalled(self) -> bool:
        """Return whether any worker had received a signal at the previous call; send what this one has received."""
        ...

    def act_on_signal(self, trainer: pl.Trainer, pl_module: pl.LightningModule, save: bool) -> None:
        """Act on the signal that the last call of ``signalled`` saw, if any."""
        ...


_unwinding: ContextVar[bool] = ContextVar("unwinding", default=False)


def through_signals(trainer: pl.Trainer, pl_module: pl.LightningModule, work: Callable[[], R], save: bool) -> R:
    """Run long work between two steps, acting on signals that arrive meanwhile; return its result.

    SIGINT and SIGTERM save and stop the run. SLURM's signal saves and requeues the job, and the work starts again.

    Args:
        trainer: of the fit.
        pl_module: its module.
        work: calls ``break_off_if_signalled`` now and then. It may be broken off there and called again, so it changes
            state only at its end, or resumes where it was. Every worker calls it.
        save: whether to save; False if this fit, fresh or resumed, has made no step.

    Raises:
        StoppedBySignal: a worker received SIGINT or SIGTERM.
        SIGTERMException: this process, the only worker, received SIGTERM.
    """
    while True:
        token = _unwinding.set(True)
        try:
            return work()
        except _BrokenOff:
            pass
        finally:
            _unwinding.reset(token)
        _act_on_signals(trainer, pl_module, save)


def break_off_if_signalled(trainer: pl.Trainer) -> None:
    """Interrupt the work that ``through_signals`` runs if a worker received a signal; do nothing outside of it.

    Every worker calls this equally often. A single process is interrupted by SIGINT at once, as usual in Python.
    """
    # A list, because every callback must be asked: each exchanges a message of its own.
    if _unwinding.get() and (any([c.signalled() for c in _signal_callbacks(trainer)]) or _terminated_alone(trainer)):
        raise _BrokenOff


def _act_on_signals(trainer: pl.Trainer, pl_module: pl.LightningModule, save: bool) -> None:
    if not save:
        replace_save(trainer, _save_nothing)
    for callback in _signal_callbacks(trainer):
        callback.act_on_signal(trainer, pl_module, save)
    if _terminated_alone(trainer):
        # With save=False, callbacks that save on this exception save nothing either.
        raise SIGTERMException(128 + signal.SIGTERM)
    if not save:
        restore_save(trainer)


def _signal_callbacks(trainer: pl.Trainer) -> list[_ActsOnSignals]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, _ActsOnSignals)]


def _terminated_alone(trainer: pl.Trainer) -> bool:
    return trainer.world_size == 1 and bool(trainer.received_sigterm)


class _SignalExchange:
    """Sums flags over the workers without waiting: what was sent when a step began is read at its end.

    Args:
        name: prefix of the names of its operations, the same on all workers and unique among exchanges.
        comm: the cluster; a process alone exchanges nothing.
    """

    def __init__(self, name: str, comm: Comm) -> None:
        self._step_op, self._between_op, self._comm = name, f"{name} between steps", comm
        self._pending: dict[str, Callable[[], Tensor]] = {}  # what waits for the sums, by operation

    def begin_step(self, values: Sequence[int]) -> None:
        """Send this worker's flags, and other values, as many as every worker sends."""
        if self._comm.size > 1:
            self._receive(self._step_op)  # of a batch that the module skipped
            self._send(self._step_op, values)

    def end_step(self, flags: Sequence[int] = ()) -> list[int]:
        """Return the sums of what was sent when the step began, if anything; a process alone returns its flags."""
        return list(flags) if self._comm.size == 1 else self._receive(self._step_op)

    def ask(self, flags: Sequence[int]) -> list[int]:
        """Between steps, send flags, and return the sums of the previous call; a process alone returns its flags."""
        if self._comm.size == 1:
            return list(flags)
        sums = self._receive(self._between_op)
        self._send(self._between_op, flags)
        return sums

    def drop_question(self) -> None:
        """Complete the last call of ``ask``, when no other follows."""
        self._receive(self._between_op)

    def forget(self) -> None:
        """Drop what is on its way, after a failure."""
        self._pending.clear()

    def _send(self, name: str, values: Sequence[int]) -> None:
        self._pending[name] = sum_async(torch.tensor(values), self._comm, name)

    def _receive(self, name: str) -> list[int]:
        pending = self._pending.pop(name, None)
        return [] if pending is None else pending().tolist()


def _ends_a_step(trainer: pl.Trainer, began_at: int) -> bool:
    """Return whether the batch that began at this ``global_step`` ends a step; within an accumulation it does not."""
    return trainer.accumulate_grad_batches == 1 or trainer.global_step != began_at


# -- several workers: stop and fail together -----------------------------------------------------------


def guard_failures(trainer: pl.Trainer) -> _FailureGuard:
    """From now on, save no checkpoint after a failure."""
    callbacks = callbacks_of(trainer)
    guard = next((c for c in callbacks if isinstance(c, _FailureGuard)), None)
    if guard is None:
        guard = _FailureGuard()
        callbacks.insert(0, guard)
    guard.begin(trainer)
    return guard


def synchronize_stops(trainer: pl.Trainer, comm: Comm, peers: Peers) -> None:
    """Let the workers stop and fail together; called before the trainer's set-up hooks."""
    guard = guard_failures(trainer)
    guard.comm, guard.stops = comm, _StopSynchronization(comm, peers)
    guard.place_first_and_last(trainer)


def report_end(peers: Peers, exception: BaseException) -> None:
    """Tell the user and the other workers why this one ends; if another is the cause, one worker says which.

    Args:
        peers: the workers.
        exception: with which this worker ends.
    """
    if isinstance(exception, StoppedBySignal):
        return
    echo = type(exception).__name__ in ECHOES
    peers.part("" if echo else _reason_of(exception))
    if not echo and not isinstance(exception, (CheckpointError, ConfigurationError, DataError)):  # told by themselves
        write_stderr(f"horovod: {peers.name(peers.rank)} ends: {_reason_of(exception)}")
    end, ends = time.monotonic() + _ENDING_S, dict[int, str]()
    while echo and not ends and time.monotonic() < end:
        ends = _ends(peers)
        time.sleep(0.0 if ends else 0.1)
    _report(peers, ends)


def _ends(peers: Peers) -> dict[int, str]:
    """Return, in words, how other workers have ended that did not end because of another."""
    ends: dict[int, str] = {}
    for k, answer in peers.ask("state").items():
        told = peers.word_of(k)
        if told:
            ends[k] = f"ended: {told}"
        elif told is None and answer.kind == "gone":
            ends[k] = f"was killed (SIGKILL: from outside, or out of memory); {SILENT['gone']}"
        elif told is None and answer.kind == "unreachable":
            ends[k] = f"does not answer; {SILENT['unreachable']}"
    return ends


def _report(peers: Peers, ends: dict[int, str]) -> None:
    """Write how others have ended, on the first worker that has not: all know the same."""
    if min(set(range(peers.size)) - ends.keys()) == peers.rank:
        for k, words in ends.items():
            write_stderr(f"horovod: {peers.name(k)} {words}")


def _reason_of(exception: BaseException) -> str:
    if isinstance(exception, (SIGTERMException, KeyboardInterrupt)):
        return _name(signal.SIGINT if isinstance(exception, KeyboardInterrupt) else signal.SIGTERM)
    return f"{type(exception).__name__}: {str(exception).partition(chr(10))[0]}"


def remove_stop_callbacks(trainer: pl.Trainer) -> None:
    """Remove what ``guard_failures`` and ``synchronize_stops`` added to a trainer, however its run has ended."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, _FailureGuard):
            callback.end()
    set_callbacks(trainer, _others(trainer))


def _others(trainer: pl.Trainer) -> list[pl.Callback]:
    return [c for c in callbacks_of(trainer) if not isinstance(c, (_FailureGuard, _StopSynchronization))]


class _FailureGuard(pl.Callback):
    """The first callback: checks that all workers have equally many batches, and prevents saving after a failure."""

    def __init__(self) -> None:
        self.comm: Comm = SingleProcessComm()
        self.stops: _StopSynchronization | None = None
        self._counted = False
        self._silenced: list[ModelCheckpoint] = []

    def begin(self, trainer: pl.Trainer) -> None:
        """Forget an earlier run, and a failure that ended it."""
        self._counted = False
        restore_save(trainer)

    def place_first_and_last(self, trainer: pl.Trainer) -> None:
        """Make this the trainer's first callback, and the stop synchronization its last one."""
        if self.stops is not None:
            set_callbacks(trainer, [self, *_others(trainer), self.stops])

    def end(self) -> None:
        """Restore ``save_on_exception`` of the trainer's callbacks; ``begin`` restores ``save_checkpoint``."""
        while self._silenced:
            self._silenced.pop().save_on_exception = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.place_first_and_last(trainer)  # again, because a callback's set-up may have changed the order

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Before other callbacks, which may have long work to finish here.
        if self.stops is not None:
            self.stops.signals.install(trainer)
        self._compare_counts(trainer, float(trainer.num_training_batches))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._compare_counts(trainer, float(trainer.num_training_batches))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Without batches, Lightning ends a fit before the first hook, while the other workers wait for the count.
        if stage == "fit" and not self._counted:
            self._compare_counts(trainer, 0.0)
        remove_stop_callbacks(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Before other callbacks take their time, because the other workers wait for this one.
        trainer.strategy.on_exception(exception)
        # Saving takes all workers, so a worker that saves alone would wait forever.
        stopped = isinstance(exception, StoppedBySignal)  # all workers have saved already
        replace_save(trainer, _save_nothing if stopped else _refuse_to_save)
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, ModelCheckpoint) and saver.save_on_exception:
                self._silenced.append(saver)
                saver.save_on_exception = False

    def _compare_counts(self, trainer: pl.Trainer, batches: float) -> None:
        self._counted = True
        counts = torch.stack(self.comm.allgather(torch.tensor(batches, dtype=torch.float64))).tolist()
        if len(set(counts)) > 1:
            each = ", ".join(f"worker {k} has {count:g}" for k, count in enumerate(counts))
            raise _uneven(trainer, f"workers have different numbers of training batches: {each}")


class _StopSynchronization(pl.Callback):
    """The last callback: exchanges signals and last batches in a small message each step.

    The message is sent when a step begins and read at its end, when the gradients' allreduces have ended.
    """

    def __init__(self, comm: Comm, peers: Peers) -> None:
        self._comm = comm
        self._began_at = 0
        self._exchange = _SignalExchange("together", comm)
        self._signalled: list[int] = []
        self.signals = _SignalRecorder(peers)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._began_at = trainer.global_step
        self._exchange.begin_step([int(_is_last(trainer, batch_idx)), *self.signals.flags()])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        sums = self._exchange.end_step()
        if not sums:
            return
        last, *signals = sums
        if 0 < last < self._comm.size:
            # Raised on all workers, before one goes on alone.
            ends = [k for k, end in enumerate(self._comm.allgather(torch.tensor(_is_last(trainer, batch_idx)))) if end]
            ranks = ", ".join(map(str, ends))
            raise _uneven(
                trainer, f"the epoch ends on worker {ranks} after {batch_idx + 1} batches, and the others have more"
            )
        if any(signals) and _ends_a_step(trainer, self._began_at):
            self._stop(trainer, pl_module, _signal_to_report(signals))

    def signalled(self) -> bool:
        """See ``_ActsOnSignals``."""
        self._signalled = self._exchange.ask(self.signals.flags())
        return any(self._signalled)

    def act_on_signal(self, trainer: pl.Trainer, pl_module: pl.LightningModule, save: bool) -> None:
        """Stop all workers if one received a signal."""
        if any(self._signalled):
            self._stop(trainer, pl_module, _signal_to_report(self._signalled), save)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act on a signal that came after the last step."""
        self._exchange.drop_question()
        signals = self._comm.allreduce(torch.tensor(self.signals.flags())).tolist()
        self.signals.restore()
        if any(signals):
            _note_stop(trainer, _signal_to_report(signals))
            raise StoppedBySignal(_signal_to_report(signals))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._exchange.forget()
        self.signals.restore()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.signals.restore()

    def _stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule, signum: int, save: bool = True) -> None:
        stopped = StoppedBySignal(signum)
        _note_stop(trainer, signum)
        # Saved here, as by ModelCheckpoint, and not in the hook for exceptions: callbacks that run before that hook
        # may already have released state that belongs in the file.
        paths = _save(trainer, pl_module, stopped) if save else []
        if trainer.is_global_zero:
            if not save:
                outcome = "nothing saved: no step has been made in this fit"
            elif paths:
                outcome = f"saved {', '.join(paths)}"
            else:
                outcome = "nothing saved: no ModelCheckpoint(save_last=True)"
            write_stderr(f"horovod: all workers stopped after step {trainer.global_step} ({_name(signum)}); {outcome}")
        raise stopped


class _SignalRecorder:
    """Records SIGINT and SIGTERM during training: the first is noted, a second one ends the job at once.

    A thread reads them, because Python runs no handler while the main thread waits within Horovod.

    Args:
        peers: the workers, because a launcher also sends a signal when one of them was killed.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._seen: dict[int, float] = {}
        self._before: dict[int, Handler] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1

    def install(self, trainer: pl.Trainer) -> None:
        """Record signals from now on, in place of Lightning's handlers, which stop each worker by itself."""
        if self._pipe is not None or threading.current_thread() is not threading.main_thread():
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for signum in _SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, _leave_to_thread)
        args = (self._pipe[0], trainer.strategy.launcher)
        threading.Thread(target=self._read, args=args, name="horovod-signals", daemon=True).start()

    def restore(self) -> None:
        """Restore the former handlers; safe to repeat."""
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler)
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(pipe[1])  # ends the thread, which closes the other end

    def flags(self) -> list[int]:
        """Return 1 for each signal of ``_SIGNALS`` that came, else 0."""
        return [int(signum in self._seen) for signum in _SIGNALS]

    def _read(self, file: int, launcher: object) -> None:
        while received := os.read(file, 1):
            if received[0] in _SIGNALS:
                self._note(received[0], launcher)
        os.close(file)

    def _note(self, signum: int, launcher: object) -> None:
        now = time.monotonic()
        if not self._seen:
            self._seen[signum] = now  # before the others are asked, which may take a while
            if launching_process() is None and not isinstance(launcher, HorovodLauncher):
                _report(self._peers, _ends(self._peers))
            name = _name(signum)
            write_stderr(f"horovod: {name}: all workers stop after this step; a second signal ends them at once")
        elif now - max(self._seen.values()) > _SAME_PRESS_S:
            if isinstance(launcher, HorovodLauncher):
                launcher.abort(128 + signum)
            os._exit(128 + signum)
        self._seen[signum] = now


def _leave_to_thread(signum: int, frame: FrameType | None) -> None:
    """Do nothing: CPython has written the signal to the pipe that the thread reads."""


def _save(trainer: pl.Trainer, pl_module: pl.LightningModule, stopped: StoppedBySignal) -> list[str]:
    """Save what checkpoint callbacks save after an exception, and every last checkpoint; return the paths."""
    if dev_run_batches(trainer):
        return []
    before = trainer.save_checkpoint
    paths: list[str] = []

    def save(filepath: str | Path, weights_only: bool | None = None, storage_options: object = None) -> None:
        before(filepath, weights_only, storage_options)
        paths.append(str(filepath))

    replace_save(trainer, save)
    try:
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, ModelCheckpoint) and saver.save_last and not saver.save_on_exception:
                saver.last_model_path = _last_path(trainer, saver)
                trainer.save_checkpoint(saver.last_model_path, saver.save_weights_only)
            else:
                saver.on_exception(trainer, pl_module, stopped)
    finally:
        restore_save(trainer)
    return paths


def _last_path(trainer: pl.Trainer, saver: ModelCheckpoint) -> str:
    """Return the path of the last checkpoint; a new one does not overwrite those of earlier runs."""
    if saver.last_model_path:
        return saver.last_model_path
    metrics = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
    path = saver.format_checkpoint_name(metrics, saver.CHECKPOINT_NAME_LAST)
    version = saver.STARTING_VERSION
    while saver.file_exists(path, trainer):
        path = saver.format_checkpoint_name(metrics, saver.CHECKPOINT_NAME_LAST, version)
        version += 1
    return path


def _save_nothing(*args: object, **kwargs: object) -> None: ...


def _refuse_to_save(*args: object, **kwargs: object) -> None:
    write_stderr("horovod: no checkpoint is saved after a failure, because saving takes all workers")


def _note_stop(trainer: pl.Trainer, signum: int) -> None:
    launcher = trainer.strategy.launcher
    if isinstance(launcher, HorovodLauncher):
        launcher.note_stop(signum)


def _signal_to_report(signals: Sequence[int]) -> int:
    """Return SIGTERM's number if a worker received it, else SIGINT's, so that all workers exit with one code."""
    return max(signum for signum, count in zip(_SIGNALS, signals, strict=True) if count)


def _is_last(trainer: pl.Trainer, batch_idx: int) -> bool:
    return bool(trainer.is_last_batch) or batch_idx + 1 >= trainer.num_training_batches


def current_task(trainer: pl.Trainer) -> int | None:
    """Return the 0-based task of the current epoch; None without a clock."""
    clock = next((callback for callback in callbacks_of(trainer) if isinstance(callback, Clock)), None)
    return None if clock is None else clock.task_at(trainer.current_epoch)


def _uneven(trainer: pl.Trainer, problem: str) -> DataError:
    task = current_task(trainer)
    place = f"epoch {trainer.current_epoch}" + ("" if task is None else f", task {task}")
    return DataError(
        f"{place}: {problem}; give every worker the same number (a DistributedSampler pads the shorter shards), or set "
        "trainer.limit_train_batches to the smallest number"
    )


def _name(signum: int) -> str:
    return signal.Signals(signum).name


def write_stderr(text: str) -> None:
    """Write a line to stderr, bypassing ``sys.stderr``, whose lock a signal handler or hanging thread may hold."""
    with suppress(OSError):  # a launcher that is gone reads no more
        os.write(2, f"{text}\n".encode())


# -- SLURM: save and requeue between two steps ---------------------------------------------------------


def requeue_between_steps(trainer: pl.Trainer) -> None:
    """Let all workers save and requeue after the same step when SLURM signals that the job's time is over.

    Lightning would save at once, in the signal's handler, while the other workers wait for this one's gradients; the
    unfinished step would count as done, or its samples would enter the memory twice. Safe to repeat within a fit.

    Args:
        trainer: whose strategy has joined the workers.
    """
    environment = vars(trainer.strategy).get("cluster_environment") or cluster_environment_of(trainer)
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
        others = [callback for callback in callbacks_of(trainer) if not isinstance(callback, _Requeue)]
        set_callbacks(trainer, [_Requeue(environment.requeue_signal, comm_of(trainer.strategy)), *others])


class _Requeue(pl.Callback):
    """Notes SLURM's signal in place of Lightning's handler, and calls that handler at the end of a step."""

    def __init__(self, signum: signal.Signals, comm: Comm) -> None:
        self._signum = signum
        self._exchange = _SignalExchange("requeue", comm)
        self._began_at = 0
        self._handler: Handler = None
        self._received = self._due = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(self._signum)):
            self._handler = signal.signal(self._signum, self._note)
        # The first until here, before others begin long work; from now on the last, so that a step is saved when all
        # callbacks are done with it.
        set_callbacks(trainer, [*(c for c in callbacks_of(trainer) if c is not self), self])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._began_at = trainer.global_step
        self._exchange.begin_step([self._received])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        # Within an accumulation the worker that received the signal sends it again with the next batch.
        if any(self._exchange.end_step([self._received])) and _ends_a_step(trainer, self._began_at):
            self._save_and_requeue()

    def signalled(self) -> bool:
        """See ``_ActsOnSignals``."""
        self._due = any(self._exchange.ask([self._received]))
        return self._due

    def act_on_signal(self, trainer: pl.Trainer, pl_module: pl.LightningModule, save: bool) -> None:
        """Save and requeue if a worker received SLURM's signal."""
        if self._due:
            self._due = False
            self._save_and_requeue()

    def _save_and_requeue(self) -> None:
        self._received = False
        self._exchange.drop_question()  # which carries the same signal
        if callable(self._handler):
            self._handler(self._signum, None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._exchange.drop_question()
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._exchange.forget()
        self._give_back()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    def _give_back(self) -> None:
        if self._handler is not None:
            signal.signal(self._signum, self._handler)
            self._handler = None
