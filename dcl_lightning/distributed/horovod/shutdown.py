"""What all workers have to do at the same step: stop after a signal, save, agree on the number of batches."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dcl_lightning._lightning import callbacks_of, set_callbacks
from dcl_lightning.comm import Comm, SingleProcessComm
from dcl_lightning.distributed.horovod.gradients import FIND_UNUSED, GradientAverager
from dcl_lightning.distributed.horovod.launcher import HorovodLauncher
from dcl_lightning.distributed.horovod.step_message import StepMessage
from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.types import Clock

__all__ = [
    "StoppedBySignal", "break_off_if_signalled", "fail_together", "keep_together", "restore_callbacks",
    "through_signals",
]  # fmt: skip

R = TypeVar("R")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_PRESS_S = 1.0  # a terminal and a launcher may both deliver one Ctrl-C


class StoppedBySignal(SystemExit):
    """All workers have stopped after the same step; the exit code is 128 + the signal.

    Args:
        signum: the signal that the workers were sent.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"all workers stopped for {_name(self.signum)}"


class _BrokenOff(BaseException):
    """Unwinds work between two steps, for a signal to be acted on."""


_unwinding: ContextVar[bool] = ContextVar("unwinding", default=False)


def through_signals(trainer: pl.Trainer, pl_module: pl.LightningModule, work: Callable[[], R], save: bool) -> R:
    """Return what long work between two steps returns, and act on signals in its midst.

    SIGINT and SIGTERM save and stop; SLURM's signal saves and requeues, and the work begins again: it changes nothing
    before it has computed all, or goes on where it was.

    Args:
        trainer: of the fit.
        pl_module: the module that is trained.
        work: looks for signals by ``break_off_if_signalled``; every worker calls it.
        save: False where the fit has not made a step yet: the checkpoint from which it goes on is all that there is.

    Raises:
        StoppedBySignal: the workers were sent SIGINT or SIGTERM.
        SIGTERMException: this process, the only one, was sent SIGTERM.
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
    """Look for signals in the midst of work that ``through_signals`` does; elsewhere they wait for the step's end.

    Every worker calls this, equally often. One process is interrupted by SIGINT at once, as Python does.

    Args:
        trainer: of the fit.
    """
    # All are asked: each has a message of its own.
    if _unwinding.get() and (any([c.signalled(trainer) for c in _hearing(trainer)]) or _one_is_terminated(trainer)):
        raise _BrokenOff


def _act_on_signals(trainer: pl.Trainer, pl_module: pl.LightningModule, save: bool) -> None:
    if not save:
        trainer.save_checkpoint = _keep_quiet  # type: ignore[method-assign]
    for callback in _hearing(trainer):
        callback.act_on_signal(trainer, pl_module, save)
    if _one_is_terminated(trainer):
        raise SIGTERMException(128 + signal.SIGTERM)  # callbacks that save after an exception keep quiet, too
    if not save:
        trainer.__dict__.pop("save_checkpoint", None)


def _hearing(trainer: pl.Trainer) -> list[Any]:
    return [callback for callback in callbacks_of(trainer) if hasattr(callback, "act_on_signal")]


def _one_is_terminated(trainer: pl.Trainer) -> bool:
    return trainer.world_size == 1 and bool(trainer.received_sigterm)


def fail_together(trainer: pl.Trainer) -> None:
    """Let nobody save after a failure, from now on.

    Args:
        trainer: the trainer.
    """
    _begin(trainer)


def keep_together(trainer: pl.Trainer, comm: Comm, gradients: GradientAverager) -> None:
    """Let the trainer's workers stop and fail together.

    Args:
        trainer: the trainer, before its set-up hooks are called.
        comm: the cluster.
        gradients: knows which parameters had one.
    """
    first = _begin(trainer)
    first.comm = comm
    _put_around(trainer, first, _Last(comm, gradients))


def restore_callbacks(trainer: pl.Trainer) -> None:
    """Give a trainer the callbacks back that it had before.

    Args:
        trainer: whose run has ended, well or not.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, _First):
            callback.end()
    set_callbacks(trainer, [c for c in callbacks_of(trainer) if not isinstance(c, (_First, _Last))])


def _begin(trainer: pl.Trainer) -> _First:
    callbacks = callbacks_of(trainer)
    first = next((c for c in callbacks if isinstance(c, _First)), None)
    if first is None:
        first = _First()
        callbacks.insert(0, first)
    first.begin(trainer)
    return first


def _put_around(trainer: pl.Trainer, first: _First, last: _Last) -> None:
    others = [c for c in callbacks_of(trainer) if not isinstance(c, (_First, _Last))]
    set_callbacks(trainer, [first, *others, last])


class _First(pl.Callback):
    """Goes first: sees that all have as many batches, and that nobody saves once a worker has failed."""

    def __init__(self) -> None:
        self.comm: Comm = SingleProcessComm()
        self._counted = False
        self._silenced: list[ModelCheckpoint] = []

    def begin(self, trainer: pl.Trainer) -> None:
        """Forget an earlier run, and a failure that ended it.

        Args:
            trainer: the trainer.
        """
        self._counted = False
        trainer.__dict__.pop("save_checkpoint", None)

    def end(self) -> None:
        """Let those save after exceptions that did so before; ``trainer.save_checkpoint`` waits for the next run."""
        while self._silenced:
            self._silenced.pop().save_on_exception = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A callback's set-up may have changed the order.
        for last in [c for c in callbacks_of(trainer) if isinstance(c, _Last)]:
            _put_around(trainer, self, last)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for last in [c for c in callbacks_of(trainer) if isinstance(c, _Last)]:
            last.signals.take(trainer)  # first of all: others may have a task to end that was cut off
        self._count(trainer, float(trainer.num_training_batches))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(trainer, float(trainer.num_training_batches))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning leaves a fit without batches before the first hook; the others ask for its count there.
        if stage == "fit" and not self._counted:
            self._count(trainer, 0.0)
        restore_callbacks(trainer)

    def _count(self, trainer: pl.Trainer, batches: float) -> None:
        self._counted = True
        counts = [float(count) for count in self.comm.allgather(torch.tensor(batches, dtype=torch.float64))]
        if len(set(counts)) > 1:
            told = ", ".join(f"worker {k} has {count:g}" for k, count in enumerate(counts))
            raise _uneven(trainer, f"workers have different numbers of training batches: {told}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # At once, before other callbacks take their time: the others wait for this worker.
        trainer.strategy.on_exception(exception)
        # A save is of all workers, or waits for ever.
        stopped = isinstance(exception, StoppedBySignal)  # all have saved before
        trainer.save_checkpoint = _keep_quiet if stopped else _save_nothing  # type: ignore[method-assign]
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, ModelCheckpoint) and saver.save_on_exception:
                self._silenced.append(saver)
                saver.save_on_exception = False


class _Last(pl.Callback):
    """Goes last: a small message each step tells all workers of signals, last batches and parameters without gradient.

    It starts with the step and is read at its end, when the gradients' have arrived.

    Args:
        comm: the cluster.
        gradients: knows which parameters had one.
    """

    def __init__(self, comm: Comm, gradients: GradientAverager) -> None:
        self._comm = comm
        self._gradients = gradients
        self._history = 0
        self._message, self._between = StepMessage("together"), StepMessage("between steps")
        self._signalled: list[int] = []
        self.signals = _Signals()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._history = self._gradients.history()
        flags = self.signals.flags()
        self._message.start(trainer, [self._history, int(_is_last(trainer, batch_idx)), *flags])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sums = self._message.read()
        if sums is None:
            return
        history, last, *signals = sums
        self._compare(history)
        if 0 < last < self._comm.size:
            self._refuse(trainer, batch_idx)
        if any(signals) and self._message.may_stop(trainer):
            self._stop(trainer, pl_module, _chosen(signals))

    def signalled(self, trainer: pl.Trainer) -> bool:
        """Return whether a worker had a signal when it asked last; the message travels until all ask again."""
        self._signalled = self._between.read() or []
        self._between.start(trainer, self.signals.flags())
        return any(self._signalled)

    def act_on_signal(self, trainer: pl.Trainer, pl_module: pl.LightningModule, save: bool) -> None:
        """Stop all workers if they were signalled."""
        if any(self._signalled):
            self._stop(trainer, pl_module, _chosen(self._signalled), save)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not lose a signal that came after the last step."""
        self._between.read()
        self._history = self._gradients.history()
        history, *signals = self._comm.allreduce(torch.tensor([self._history, *self.signals.flags()])).tolist()
        self.signals.give_back()
        self._compare(history)
        if any(signals):
            _note_stop(trainer, _chosen(signals))
            raise StoppedBySignal(_chosen(signals))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._message.forget()
        self._between.forget()
        self.signals.give_back()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.signals.give_back()

    def _compare(self, histories: int) -> None:
        """Refuse a step that has combined gradients of different passes; at least one worker sees it.

        Args:
            histories: sum over the workers.
        """
        if histories != self._comm.size * self._history:
            without = [name for names in self._gradients.without_gradient().values() for name in names]
            mine = f"none to {', '.join(dict.fromkeys(without))}" if without else "all"
            raise ConfigurationError(
                f"the last backward passes gave gradients to other parameters on worker {self._comm.rank} ({mine}) "
                f"than on another worker: {FIND_UNUSED}"
            )

    def _refuse(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Raise on all workers alike, before one goes on alone."""
        mine = torch.tensor(_is_last(trainer, batch_idx))
        ends = [k for k, end in enumerate(self._comm.allgather(mine)) if end]
        told = f"{', '.join(map(str, ends))} after {batch_idx + 1} batches, and the others have more"
        raise _uneven(trainer, f"the epoch ends on worker {told}")

    def _stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule, signum: int, save: bool = True) -> None:
        stopped = StoppedBySignal(signum)
        _note_stop(trainer, signum)
        # Here, where ModelCheckpoint saves, and not from the hook for exceptions: by then callbacks have let go
        # of what belongs into the file.
        paths = _save(trainer, pl_module, stopped) if save else []
        if trainer.is_global_zero:
            saved = f"saved {', '.join(paths)}" if paths else "nothing saved: no ModelCheckpoint(save_last=True)"
            saved = saved if save else "nothing saved: no step was made since the checkpoint that was resumed"
            _say(f"horovod: all workers stopped after step {trainer.global_step} ({_name(signum)}); {saved}")
        raise stopped


class _Signals:
    """SIGINT and SIGTERM during training: the first is noted, a second one ends the job at once.

    A thread takes them, as Python runs no handler while the main thread waits within Horovod.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def take(self, trainer: pl.Trainer) -> None:
        """Note signals from now on, in place of Lightning, where each worker stops by itself.

        Args:
            trainer: the trainer.
        """
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

    def give_back(self) -> None:
        """Put the former handlers back; safe to repeat."""
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler)
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(pipe[1])  # ends the thread, which closes its own end

    def flags(self) -> list[int]:
        """Return one number for each signal, above 0 if it came."""
        return [int(signum in self._seen) for signum in _SIGNALS]

    def _read(self, file: int, launcher: Any) -> None:
        while received := os.read(file, 1):
            if received[0] in _SIGNALS:
                self._note(received[0], launcher)
        os.close(file)

    def _note(self, signum: int, launcher: Any) -> None:
        now = time.monotonic()
        if not self._seen:
            _say(f"horovod: {_name(signum)}: all workers stop after this step; a second signal ends them at once")
        elif now - max(self._seen.values()) > _SAME_PRESS_S:
            if isinstance(launcher, HorovodLauncher):
                launcher.abort(128 + signum)
            os._exit(128 + signum)
        self._seen[signum] = now


def _leave_to_thread(signum: int, frame: Any) -> None:
    """Handle nothing: the thread has read of the signal already."""


def _save(trainer: pl.Trainer, pl_module: pl.LightningModule, stopped: StoppedBySignal) -> list[str]:
    """Save what the trainer's checkpoint callbacks would after an exception, and every last checkpoint."""
    if getattr(trainer, "fast_dev_run", False):
        return []
    before = trainer.save_checkpoint
    paths: list[str] = []

    def save(filepath: Any, *args: Any, **kwargs: Any) -> None:
        before(filepath, *args, **kwargs)
        paths.append(str(filepath))

    trainer.save_checkpoint = save  # type: ignore[method-assign]
    try:
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, ModelCheckpoint) and saver.save_last and not saver.save_on_exception:
                saver.last_model_path = _last_path(trainer, saver)
                trainer.save_checkpoint(saver.last_model_path, saver.save_weights_only)
            else:
                saver.on_exception(trainer, pl_module, stopped)
    finally:
        trainer.__dict__.pop("save_checkpoint")
    return paths


def _last_path(trainer: pl.Trainer, saver: ModelCheckpoint) -> str:
    """Return where the last checkpoint lies, or would lie beside those of earlier runs."""
    if saver.last_model_path:
        return saver.last_model_path
    metrics = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
    path, version = saver.format_checkpoint_name(metrics, saver.CHECKPOINT_NAME_LAST), saver.STARTING_VERSION
    while saver.file_exists(path, trainer):
        path, version = saver.format_checkpoint_name(metrics, saver.CHECKPOINT_NAME_LAST, version), version + 1
    return path


def _keep_quiet(*args: Any, **kwargs: Any) -> None: ...


def _save_nothing(*args: Any, **kwargs: Any) -> None:
    _say("horovod: no checkpoint is saved after a failure, as that takes all workers")


def _note_stop(trainer: pl.Trainer, signum: int) -> None:
    launcher = trainer.strategy.launcher
    if isinstance(launcher, HorovodLauncher):
        launcher.note_stop(signum)


def _chosen(signals: list[int]) -> int:
    return max(signum for signum, count in zip(_SIGNALS, signals, strict=True) if count)


def _is_last(trainer: pl.Trainer, batch_idx: int) -> bool:
    return bool(trainer.is_last_batch) or batch_idx + 1 >= trainer.num_training_batches


def _uneven(trainer: pl.Trainer, told: str) -> DataError:
    clock = getattr(trainer.lightning_module, "clock", None)
    task = f", task {clock.task_at(trainer.current_epoch)}" if isinstance(clock, Clock) else ""
    return DataError(
        f"epoch {trainer.current_epoch}{task}: {told}; give every worker as many (a DistributedSampler pads the "
        "shorter shards), or set trainer.limit_train_batches to the smallest number"
    )


def _name(signum: int) -> str:
    return signal.Signals(signum).name


def _say(text: str) -> None:
    # Also from a signal handler, where a print could come into the midst of another.
    os.write(2, f"{text}\n".encode())
