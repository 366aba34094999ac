"""Starts the other workers of this machine: the calling process is worker 0, and re-runs its command for the others."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from dcl_lightning._lightning import Launcher
from dcl_lightning.distributed.horovod.rendezvous import open_rendezvous
from dcl_lightning.distributed.horovod.worker_process import WorkerProcess
from dcl_lightning.distributed.ranks import running_horovod, worker_threads
from dcl_lightning.errors import ConfigurationError, WorkerError

__all__ = ["HorovodLauncher"]

_GRACE_S = 3.0  # for the others to notice a failure by themselves
_LAST_RESORT_S = 10.0  # for worker 0 to end once its operations fail
_PATIENCE_S = 30.0  # for the others to end after worker 0 has ended well, or all have stopped together
_ECHOES = ("HorovodInternalError", "WorkerError")  # of another worker's failure


class HorovodLauncher(Launcher):
    """Local launcher, like ddp's: no ``horovodrun`` needed on one machine.

    Workers 1..N-1 run the same command in process groups of their own; what they write is shown with
    ``[rank k]`` before each line. If one fails, the last lines that it wrote are shown and all end. None
    outlives this process.

    Args:
        num_workers: N, at least 2.
    """

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.num_workers = num_workers
        self._workers: list[WorkerProcess] = []
        self._ending = threading.Event()
        self._reported = threading.Lock()
        self._own_failure = self._failing = self._stopped = False
        self._signal = 0  # that ended the job

    @property
    def is_interactive_compatible(self) -> bool:
        """Not: a notebook cannot be re-run."""
        return False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the others once, then run ``function`` here.

        Args:
            function: what the trainer wants done.
            *args: its arguments.
            trainer: the trainer.
            **kwargs: its keyword arguments.

        Raises:
            WorkerError: another worker has failed; why is shown before.
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
        """Send a signal to the other workers and what they started.

        Args:
            signum: the signal.
        """
        # Whoever is told to end does not fail by ending.
        self._signal = self._signal or int(signum)
        for worker in self._workers:
            worker.kill(signum)

    def note_failure(self, exception: BaseException) -> None:
        """Learn that worker 0 ends with an exception.

        Args:
            exception: Horovod's own error is the echo of another worker's failure, any other is a cause.
        """
        self._failing = True
        self._own_failure = type(exception).__name__ not in _ECHOES
        if self._own_failure:
            # Their tracebacks, which echo this one, would come into the midst of it.
            for worker in self._workers:
                worker.mute()

    def note_stop(self, signum: int) -> None:
        """Learn that all workers have stopped together and end by themselves.

        Args:
            signum: the signal that they have stopped for.
        """
        self._signal, self._stopped = int(signum), True

    def failed_workers(self) -> list[int]:
        """Return the ranks of workers that have ended with an error."""
        return [worker.rank for worker in self._workers if worker.failed]

    def log_to(self, folder: Path) -> None:
        """Write what each of the other workers says to ``rank_k.log``.

        Args:
            folder: where; made if needed.
        """
        for worker in self._workers:
            worker.log_to(folder)

    def abort(self, code: int, stuck: Collection[int] = (), patience: float = 0.0) -> None:
        """End the whole job now; does not return.

        Args:
            code: exit code.
            stuck: workers that hang; they show their stacks before they end.
            patience: seconds that those have to end by themselves.
        """
        self._ending.set()
        late = [worker for worker in self._workers if worker.rank in stuck]
        _wait_for(late, patience)
        for worker in late:
            worker.kill(signal.SIGABRT, group=False)  # Python shows the stack, also where a thread holds its lock
        _wait_for(late, 1.0 if late else 0.0)
        for worker in self._workers:
            worker.kill(signal.SIGKILL)
        for worker in self._workers:
            worker.drain()
        _exit_now(code)

    # -- start ---------------------------------------------------------------------------------------

    def _start(self) -> None:
        command = _own_command()
        threads = worker_threads(self.num_workers)
        self._server, places = open_rendezvous(self.num_workers, threads)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        atexit.register(self._end)
        for rank, variables in enumerate(places[1:], start=1):
            self._workers.append(WorkerProcess(rank, command, variables))
        os.environ.update(places[0])
        self._forward_signals()
        threading.Thread(target=self._watch, name="horovod-watch", daemon=True).start()

    def _forward_signals(self) -> None:
        """Tell the others of SIGINT and SIGTERM: in sessions of their own, a terminal does not."""
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGINT)

        def interrupt(signum: int, frame: Any) -> None:
            self.kill(signum)
            if callable(before):
                before(signum, frame)

        def terminate(signum: int, frame: Any) -> None:
            # While a trainer runs, Lightning's handler, which calls this one too, forwards it and ends the loop.
            if signal.getsignal(signal.SIGTERM) is terminate:
                self.kill(signum)
                sys.exit(128 + signum)

        signal.signal(signal.SIGINT, interrupt)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminate)

    # -- end -----------------------------------------------------------------------------------------

    def _cause_of(self, exception: Exception) -> WorkerProcess | None:
        """Return the worker whose failure this is the echo of."""
        if self._signal or type(exception).__name__ not in _ECHOES:
            return None
        # The operations of the others fail before the one that failed has ended.
        end = time.monotonic() + (0.0 if isinstance(exception, WorkerError) else _LAST_RESORT_S)
        while not self.failed_workers() and time.monotonic() < end:
            time.sleep(0.05)
        return self._first_failed()

    def _first_failed(self) -> WorkerProcess | None:
        failed = [worker for worker in self._workers if worker.failed]
        for worker in failed:
            worker.drain()
        causes = [worker for worker in failed if not worker.echoes]
        return next(iter(causes or failed), None)

    def _watch(self) -> None:
        """End the job when a worker has failed and worker 0 has had time to notice."""
        while not self._ending.wait(0.2):
            if not self.failed_workers():
                continue
            if self._ending.wait(_PATIENCE_S if self._stopped else _GRACE_S):
                return
            self._report()
            # What worker 0 waits for will never come: let it raise. In a thread, as it may block.
            threading.Thread(target=_leave_horovod, daemon=True).start()
            if self._ending.wait(_LAST_RESORT_S):
                return
            self._kill_rest()
            _exit_now(128 + self._signal if self._signal else 1)

    def _end(self) -> None:
        """At exit: let the others end by themselves, end those that do not, and tell of failures."""
        self._ending.set()
        started = time.monotonic()
        self._failing |= self._signal != 0 or getattr(sys, "last_value", None) is not None
        while any(worker.running for worker in self._workers):
            if not self._failing and self.failed_workers():
                self._failing, started = True, time.monotonic()
            if time.monotonic() - started > (_GRACE_S if self._failing else _PATIENCE_S):
                break
            time.sleep(0.05)
        failed = self.failed_workers()
        late = [worker.rank for worker in self._workers if worker.running]
        told_to_end = self._signal
        self._kill_rest()
        for worker in self._workers:
            worker.drain()
        if self._stopped:
            return
        if told_to_end:
            # Lightning ends with 0 after SIGTERM; whoever sent it should see that the job was cut short.
            _exit_now(128 + told_to_end)
        if failed:
            self._report()
        elif late and not self._failing:
            print(f"horovod: workers {late} did not end within {_PATIENCE_S:.0f} s of worker 0", file=sys.stderr)
        if (failed or late) and getattr(sys, "last_value", None) is None:
            _exit_now()

    def _kill_rest(self) -> None:
        if any(worker.running for worker in self._workers):
            self.kill(signal.SIGTERM)
            _wait_for(self._workers, 1.0)
            self.kill(signal.SIGKILL)

    def _report(self) -> None:
        """Show, once, the last lines of the worker that failed first; none if worker 0 is the cause."""
        if self._signal or self._own_failure or not self._reported.acquire(blocking=False):
            return
        worker = self._first_failed()
        if worker is not None:
            said = "; its last lines:\n" + "".join(worker.tail) if worker.tail else "\n"
            sys.stderr.write(f"horovod: worker {worker.rank} {worker.how_it_ended()}{said}")
            sys.stderr.flush()


def _wait_for(workers: Collection[WorkerProcess], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(worker.running for worker in workers):
        time.sleep(0.05)


def _leave_horovod() -> None:
    hvd = running_horovod()
    if hvd is not None:
        hvd.shutdown()


def _exit_now(code: int = 1) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _own_command() -> list[str]:
    """Return the command line that started this process."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
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
