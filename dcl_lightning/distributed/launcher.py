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
from typing import IO, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers.launcher import _Launcher

__all__ = ["HorovodLauncher", "worker_variables"]

_GRACE_S = 3.0
_LAST_LINES = 40


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
        self._children: list[subprocess.Popen[str]] = []
        self._tails: list[deque[str]] = []
        self._ending = False

    @property
    def is_interactive_compatible(self) -> bool:
        """Not: a notebook cannot be re-run."""
        return False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the others once, then run ``function`` here."""
        if not self._children:
            self._start()
        return function(*args, **kwargs)

    def kill(self, signum: int) -> None:
        """Send a signal to the other workers."""
        for child in self._children:
            if child.poll() is None:
                os.killpg(child.pid, signum)

    def _start(self) -> None:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.http.http_server import RendezvousServer

        self._server = RendezvousServer(verbose=0)
        port = self._server.start()
        slots = get_host_assignments(parse_hosts(f"localhost:{self.num_workers}"), self.num_workers)
        self._server.init(slots)
        threads = max(1, len(os.sched_getaffinity(0)) // self.num_workers)
        atexit.register(self._end)
        command = _own_command()
        for slot in slots:
            variables = worker_variables(slot, port, threads)
            if slot.rank == 0:
                os.environ.update(variables)
                continue
            child = subprocess.Popen(
                command,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            tail: deque[str] = deque(maxlen=_LAST_LINES)
            self._children.append(child)
            self._tails.append(tail)
            assert child.stdout is not None
            threading.Thread(target=_pass_on, args=(child.stdout, slot.rank, tail), daemon=True).start()
        torch.set_num_threads(threads)
        threading.Thread(target=self._watch, daemon=True).start()
        print(f"horovod: {self.num_workers} workers on 1 host, {threads} threads each", flush=True)

    def _watch(self) -> None:
        """End the job when a worker has failed and the others have had time to notice."""
        while not self._ending:
            for rank, child in enumerate(self._children, start=1):
                if child.poll() not in (None, 0):
                    time.sleep(_GRACE_S)
                    if self._ending:
                        return
                    text = f"worker {rank} ended with code {child.returncode}; its last lines:\n"
                    print(text + "".join(self._tails[rank - 1]), file=sys.stderr, flush=True)
                    self._end()
                    os._exit(1)
            time.sleep(0.2)

    def _end(self) -> None:
        """Give the others a moment to end by themselves, then end them."""
        self._ending = True
        deadline = time.monotonic() + 2 * _GRACE_S
        while time.monotonic() < deadline and any(c.poll() is None for c in self._children):
            time.sleep(0.05)
        for signum in (signal.SIGTERM, signal.SIGKILL):
            self.kill(signum)
            time.sleep(0.2 if any(c.poll() is None for c in self._children) else 0)


def _own_command() -> list[str]:
    """Return the command line that started this process."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name and spec.name != "__main__":
        name = spec.name.removesuffix(".__main__")
        return [sys.executable, "-m", name, *sys.argv[1:]]
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
        "PYTHONUNBUFFERED": 1,
    }
    values.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", threads))
    return {name: str(value) for name, value in values.items()}


def _pass_on(stream: IO[str], rank: int, tail: deque[str]) -> None:
    for line in stream:
        tail.append(line)
        sys.stdout.write(f"[rank {rank}] {line}")
        sys.stdout.flush()
