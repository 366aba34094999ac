"""Starts the other workers of this machine: the calling process is worker 0 and re-runs its own command for them."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import TypeVar

import lightning.pytorch as pl
import torch

from dcl_lightning._lightning import Launcher
from dcl_lightning.distributed.horovod.rendezvous import open_rendezvous
from dcl_lightning.distributed.horovod.worker_process import WorkerProcess
from dcl_lightning.distributed.ranks import running_horovod, worker_threads
from dcl_lightning.errors import ConfigurationError, WorkerError

__all__ = ["ECHOES", "HorovodLauncher"]

R = TypeVar("R")
_GRACE_S = 3.0  # for worker 0 to notice another's failure by itself
_LAST_RESORT_S = 10.0  # for worker 0 to end once its operations fail
_PATIENCE_S = 30.0  # for the others to end after worker 0 has ended well, or after all have stopped
ECHOES = ("HorovodInternalError", "WorkerError")  # errors that another worker's failure causes
_POLL_INTERVAL_S = 0.05


class HorovodLauncher(Launcher):
    """Starts the workers of one machine, as ddp's launcher does; no ``horovodrun`` is needed.

    Workers 1 to N-1 run the same command in process groups of their own, and their output appears prefixed with
    ``[rank k]``. If a worker fails, its last lines are shown and all workers end. None outlives this process.

    Args:
        world_size: number of workers N, at least 2.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self._workers: list[WorkerProcess] = []
        self._ending = threading.Event()
        self._reported = threading.Lock()
        self._own_failure = self._failing = self._stopped = False
        self._signal = 0  # the signal that ended the job

    @property
    def is_interactive_compatible(self) -> bool:
        """False: a notebook cannot be re-run."""
        return False

    def launch(
        self, function: Callable[..., R], *args: object, trainer: pl.Trainer | None = None, **kwargs: object
    ) -> R:
        """Start the other workers once, then run ``function`` with the arguments here.

        Raises:
            WorkerError: another worker has failed; its last lines are shown before.
        """
        if not self._workers:
            self._start()
        try:
            return function(*args, **kwargs)
        except Exception as exception:
            worker = self._cause_of(exception)
            if worker is None:
                raise
            self._report()
            raise WorkerError(f"worker {worker.rank} {worker.how_it_ended()}: its last lines are shown above") from None

    def kill(self, signum: int) -> None:
        """Send a signal to the other workers and the processes that they started."""
        # A worker that ends because of this signal has not failed.
        self._signal = self._signal or int(signum)
        for worker in self._workers:
            worker.kill(signum)

    def note_failure(self, exception: BaseException) -> None:
        """Note that worker 0 ends with an exception: a cause, or the echo of another worker's failure."""
        self._failing = True
        self._own_failure = type(exception).__name__ not in ECHOES
        if self._own_failure:
            # The others' tracebacks, which echo this failure, would interleave with worker 0's.
            for worker in self._workers:
                worker.mute()

    def note_stop(self, signum: int) -> None:
        """Note that all workers have stopped after the same step because of a signal, and end by themselves."""
        self._signal, self._stopped = int(signum), True

    def failed_workers(self) -> list[int]:
        """Return the ranks of workers that have ended with an error."""
        return [worker.rank for worker in self._workers if worker.failed]

    def log_to(self, folder: Path) -> None:
        """Write the output of each other worker to ``rank_k.log`` in a folder."""
        for worker in self._workers:
            worker.log_to(folder)

    def abort(self, code: int, stuck: Collection[int] = (), patience: float = 0.0) -> None:
        """End the whole job now; does not return.

        Args:
            code: exit code.
            stuck: ranks of workers that hang; they show their stacks before they end.
            patience: seconds that these have to end by themselves.
        """
        self._ending.set()
        late = [worker for worker in self._workers if worker.rank in stuck]
        _wait_for(late, patience)
        for worker in late:
            worker.kill(signal.SIGABRT, group=False)  # faulthandler shows the stack even if a thread holds the GIL
        _wait_for(late, 1.0 if late else 0.0)
        for worker in self._workers:
            worker.kill(signal.SIGKILL)
        for worker in self._workers:
            worker.drain()
        _exit_now(code)

    def _start(self) -> None:
        command = _own_command()
        threads = worker_threads(self.world_size)
        self._server, places = open_rendezvous(self.world_size, threads)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        atexit.register(self._end)
        for rank, variables in enumerate(places[1:], start=1):
            self._workers.append(WorkerProcess(rank, command, variables))
        os.environ.update(places[0])
        self._forward_signals()
        threading.Thread(target=self._watch, name="horovod-watch", daemon=True).start()

    def _forward_signals(self) -> None:
        """Forward SIGINT and SIGTERM, which a terminal does not deliver to the other workers' sessions."""
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGINT)

        def interrupt(signum: int, frame: FrameType | None) -> None:
            self.kill(signum)
            if callable(before):
                before(signum, frame)

        def terminate(signum: int, frame: FrameType | None) -> None:
            # During a fit, Lightning's handler, which calls this one too, forwards the signal and ends the loop.
            if signal.getsignal(signal.SIGTERM) is terminate:
                self.kill(signum)
                sys.exit(128 + signum)

        signal.signal(signal.SIGINT, interrupt)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminate)

    def _cause_of(self, exception: Exception) -> WorkerProcess | None:
        """Return the worker whose failure this exception echoes."""
        if self._signal or type(exception).__name__ not in ECHOES:
            return None
        # The other workers' operations fail before the process that caused it has ended.
        end = time.monotonic() + (0.0 if isinstance(exception, WorkerError) else _LAST_RESORT_S)
        while not self.failed_workers() and time.monotonic() < end:
            time.sleep(_POLL_INTERVAL_S)
        return self._first_failed()

    def _first_failed(self) -> WorkerProcess | None:
        failed = [worker for worker in self._workers if worker.failed]
        for worker in failed:
            worker.drain()
        causes = [worker for worker in failed if not worker.echoes]
        return next(iter(causes or failed), None)

    def _watch(self) -> None:
        """End the job once a worker has failed and worker 0 has had time to notice."""
        while not self._ending.wait(0.2):
            if not self.failed_workers():
                continue
            if self._ending.wait(_PATIENCE_S if self._stopped else _GRACE_S):
                return
            self._report()
            # Worker 0 waits for an operation that never completes: let it raise. In a thread, as this may block.
            threading.Thread(target=_leave_horovod, daemon=True).start()
            if self._ending.wait(_LAST_RESORT_S):
                return
            self._kill_rest()
            _exit_now(128 + self._signal if self._signal else 1)

    def _end(self) -> None:
        """At exit, wait for the other workers, kill those that do not end, and report failures."""
        self._ending.set()
        started = time.monotonic()
        self._failing |= self._signal != 0 or _has_uncaught_exception()
        while any(worker.running for worker in self._workers):
            if not self._failing and self.failed_workers():
                self._failing, started = True, time.monotonic()
            if time.monotonic() - started > (_GRACE_S if self._failing else _PATIENCE_S):
                break
            time.sleep(_POLL_INTERVAL_S)
        failed = self.failed_workers()
        late = [worker.rank for worker in self._workers if worker.running]
        received = self._signal
        self._kill_rest()
        for worker in self._workers:
            worker.drain()
        if self._stopped:
            return
        if received:
            # Lightning exits with 0 after SIGTERM, but the sender should see that the job was cut short.
            _exit_now(128 + received)
        if failed:
            self._report()
        elif late and not self._failing:
            print(f"horovod: workers {late} did not end within {_PATIENCE_S:.0f} s of worker 0", file=sys.stderr)
        if (failed or late) and not _has_uncaught_exception():
            _exit_now(1)

    def _kill_rest(self) -> None:
        if any(worker.running for worker in self._workers):
            self.kill(signal.SIGTERM)
            _wait_for(self._workers, 1.0)
            self.kill(signal.SIGKILL)

    def _report(self) -> None:
        """Show, once, the last lines of the worker that failed first, unless worker 0 is the cause."""
        if self._signal or self._own_failure or not self._reported.acquire(blocking=False):
            return
        worker = self._first_failed()
        if worker is not None:
            lines = "; its last lines:\n" + "".join(worker.tail) if worker.tail else "\n"
            sys.stderr.write(f"horovod: worker {worker.rank} {worker.how_it_ended()}{lines}")
            sys.stderr.flush()


def _wait_for(workers: Collection[WorkerProcess], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(worker.running for worker in workers):
        time.sleep(_POLL_INTERVAL_S)


def _leave_horovod() -> None:
    hvd = running_horovod()
    if hvd is not None:
        hvd.shutdown()


def _has_uncaught_exception() -> bool:
    return vars(sys).get("last_value") is not None


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _own_command() -> list[str]:
    """Return the command line that started this process."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name and spec.name != "__main__":
        return [sys.executable, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    if sys.argv[0] == "-c":
        return [sys.executable, *sys.orig_argv[1:]]
    if not os.path.exists(sys.argv[0]):
        raise ConfigurationError(
            "strategy=horovod with several devices re-runs the script, and this session has none: write a script, "
            "or set trainer.devices=1"
        )
    return [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:]]
