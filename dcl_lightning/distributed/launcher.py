"""Starts the other workers of this machine: the calling process is worker 0 and re-runs itself for the rest."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers.launcher import _Launcher

from dcl_lightning.distributed.place import worker_threads
from dcl_lightning.errors import ConfigurationError

__all__ = ["HorovodLauncher", "worker_variables"]

_GRACE_S = 3.0  # for the others to notice a failure by themselves
_LAST_RESORT_S = 10.0  # for worker 0 to end once its operations fail
_PATIENCE_S = 30.0  # for the others to end after worker 0 has ended well
_LAST_LINES = 150  # holds a traceback through all of Lightning


@dataclass
class _Worker:
    """A child, the readers of its output, and the last lines of its stderr."""

    rank: int
    process: subprocess.Popen[str]
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    readers: list[threading.Thread] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        return self.process.poll() not in (None, 0)


class HorovodLauncher(_Launcher):
    """Local launcher, like ddp's: no ``horovodrun`` needed on one machine.

    Workers 1..N-1 run the same command in process groups of their own; what they write is shown with
    ``[rank k]`` before each line. If one fails, the last lines that it wrote are shown and all end.

    Args:
        num_workers: N, at least 2.
    """

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.num_workers = num_workers
        self._workers: list[_Worker] = []
        self._ending = threading.Event()
        self._reported = threading.Lock()
        self._in_trainer = self._own_failure = self._failing = False
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
        """
        if not self._workers:
            self._start()
        self._in_trainer = True
        try:
            return function(*args, **kwargs)
        finally:
            self._in_trainer = False

    def kill(self, signum: int) -> None:
        """Send a signal to the other workers and what they started.

        Args:
            signum: the signal.
        """
        # Whoever is told to end does not fail by ending.
        self._signal = self._signal or int(signum)
        for worker in self._workers:
            if worker.running:
                try:
                    os.killpg(worker.process.pid, signum)
                except ProcessLookupError:
                    continue

    def note_failure(self, exception: BaseException) -> None:
        """Learn that worker 0 ends with an exception.

        Args:
            exception: Horovod's own error is the echo of another worker's failure, any other is a cause.
        """
        self._failing = True
        self._own_failure = type(exception).__name__ != "HorovodInternalError"

    # -- start ---------------------------------------------------------------------------------------

    def _start(self) -> None:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.http.http_server import RendezvousServer

        command = _own_command()
        self._server = RendezvousServer(verbose=0)
        port = self._server.start()
        slots = get_host_assignments(parse_hosts(f"localhost:{self.num_workers}"), self.num_workers)
        self._server.init(slots)
        threads = worker_threads(self.num_workers)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        atexit.register(self._end)
        for slot in slots[1:]:
            self._start_worker(command, slot.rank, worker_variables(slot, port, threads))
        os.environ.update(worker_variables(slots[0], port, threads))
        self._forward_signals()
        threading.Thread(target=self._watch, name="horovod-watch", daemon=True).start()

    def _start_worker(self, command: list[str], rank: int, variables: dict[str, str]) -> None:
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        worker = _Worker(rank, process)
        self._workers.append(worker)
        for stream, name, tail in ((process.stdout, "stdout", None), (process.stderr, "stderr", worker.tail)):
            assert stream is not None
            reader = threading.Thread(target=_pass_on, args=(stream, name, rank, tail), daemon=True)
            reader.start()
            worker.readers.append(reader)

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
            # Within a trainer Lightning's handler, which calls ours too, forwards it and ends the loop.
            if not self._in_trainer:
                self.kill(signum)
                sys.exit(128 + signum)

        signal.signal(signal.SIGINT, interrupt)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminate)

    # -- end -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """End the job when a worker has failed and worker 0 has had time to notice."""
        while not self._ending.wait(0.2):
            if not any(worker.failed for worker in self._workers):
                continue
            if self._ending.wait(_GRACE_S):
                return
            self._report()
            # What worker 0 waits for will never come: let it raise. In a thread, as it may block.
            threading.Thread(target=_leave_horovod, daemon=True).start()
            if self._ending.wait(_LAST_RESORT_S):
                return
            self._kill_rest()
            _exit_now()

    def _end(self) -> None:
        """At exit: let the others end by themselves, end those that do not, and tell of failures."""
        self._ending.set()
        started = time.monotonic()
        self._failing |= self._signal != 0 or getattr(sys, "last_value", None) is not None
        while any(worker.running for worker in self._workers):
            if not self._failing and any(worker.failed for worker in self._workers):
                self._failing, started = True, time.monotonic()
            if time.monotonic() - started > (_GRACE_S if self._failing else _PATIENCE_S):
                break
            time.sleep(0.05)
        failed = any(worker.failed for worker in self._workers)
        late = [worker.rank for worker in self._workers if worker.running]
        told_to_end = self._signal
        self._kill_rest()
        for worker in self._workers:
            for reader in worker.readers:
                reader.join(timeout=1)
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
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline and any(worker.running for worker in self._workers):
                time.sleep(0.05)
            self.kill(signal.SIGKILL)

    def _report(self) -> None:
        """Show, once, the last lines of the worker that failed first; none if worker 0 is the cause."""
        if self._signal or self._own_failure or not self._reported.acquire(blocking=False):
            return
        failed = [worker for worker in self._workers if worker.failed]
        causes = [worker for worker in failed if not any("HorovodInternalError" in line for line in worker.tail)]
        worker = (causes or failed)[0]
        text = f"horovod: worker {worker.rank} ended with code {worker.process.returncode}; its last lines:\n"
        sys.stderr.write(text + "".join(worker.tail))
        sys.stderr.flush()


def _leave_horovod() -> None:
    hvd = sys.modules.get("horovod.torch")
    if hvd is not None and hvd.is_initialized():
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


def worker_variables(slot: Any, port: int, threads: int) -> dict[str, str]:
    """Return the environment of one local worker.

    Args:
        slot: the worker's place, from Horovod's host assignments.
        port: port of the rendezvous on the loopback interface.
        threads: threads of the worker, unless OMP_NUM_THREADS says otherwise.
    """
    values = {
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_RANK": slot.rank,
        "HOROVOD_SIZE": slot.size,
        "HOROVOD_LOCAL_RANK": slot.local_rank,
        "HOROVOD_LOCAL_SIZE": slot.local_size,
        "HOROVOD_CROSS_RANK": slot.cross_rank,
        "HOROVOD_CROSS_SIZE": slot.cross_size,
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "PYTHONUNBUFFERED": 1,
    }
    return {name: str(value) for name, value in values.items()}


def _pass_on(stream: IO[str], name: str, rank: int, tail: deque[str] | None) -> None:
    """Copy a worker's lines to this process's stream of the same name, each with its rank in front."""
    for line in stream:
        if tail is not None:
            tail.append(line)
        out = getattr(sys, name)
        out.write(f"[rank {rank}] {line.rstrip()}\n")
        out.flush()
