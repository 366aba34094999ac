"""Worker processes of the local launcher: start, output and end; imports the standard library only."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

__all__ = ["WorkerProcess", "end_with_parent", "launching_process"]

_LAST_LINES = 150  # holds a traceback through all of Lightning
_LINES_KEPT = 5000  # until the run's folder is known
_PR_SET_PDEATHSIG = 1
_LAUNCHER = "DCL_LIGHTNING_LAUNCHER"


def launching_process() -> int | None:
    """Return the process id of worker 0 if the local launcher started this worker."""
    parent = os.getppid()
    return parent if os.environ.get(_LAUNCHER) == str(parent) else None


class WorkerProcess:
    """A worker in a process group of its own, which ends with this process, however that ends.

    Its lines are passed on to this process's stream of the same name, prefixed with ``[rank k]``.

    Args:
        rank: 0-based rank of the worker.
        command: what to run.
        variables: added to this process's environment.

    Attributes:
        tail: its last lines on stderr.
    """

    def __init__(self, rank: int, command: list[str], variables: dict[str, str]) -> None:
        self.rank = rank
        self.tail: deque[str] = deque(maxlen=_LAST_LINES)
        self._kept: deque[str] = deque(maxlen=_LINES_KEPT)
        self._log: IO[str] | None = None
        self._log_path: Path | None = None
        self._lock = threading.Lock()
        self._muted = False
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **variables, _LAUNCHER: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
        streams = ((self.process.stdout, False), (self.process.stderr, True))
        self._readers = [threading.Thread(target=self._pass_on, args=pair, daemon=True) for pair in streams]
        for reader in self._readers:
            reader.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self.process.poll() not in (None, 0)

    @property
    def echoes(self) -> bool:
        """Whether its last lines show the echo of another worker's failure."""
        return any("HorovodInternalError" in line for line in self.tail)

    def how_it_ended(self) -> str:
        """Return its exit code in words."""
        code = self.process.poll()
        if code is None or code >= 0:
            return f"ended with code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "a signal"
        hint = ": killed from outside, or out of memory" if code == -signal.SIGKILL else ""
        return f"ended with code {code} ({name}{hint})"

    def kill(self, signum: int, group: bool = True) -> None:
        """Send a signal to the worker, and with ``group`` to the processes that it started."""
        if self.running:
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.process.pid, signum)

    def mute(self) -> None:
        """Stop passing its stderr on; the log still receives it."""
        self._muted = True

    def drain(self, timeout: float = 1.0) -> None:
        """Wait until the last output has been passed on, at most ``timeout`` seconds for each stream."""
        for reader in self._readers:
            reader.join(timeout)

    def log_to(self, folder: Path) -> None:
        """Write its output, from the first line on, to ``rank_k.log`` in a folder, which is made if needed."""
        path = folder / f"rank_{self.rank}.log"
        if path == self._log_path:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self._log is not None:
                self._log.close()
            self._log, self._log_path = path.open("a", encoding="utf-8"), path
            self._log.writelines(self._kept)
            self._log.flush()
            self._kept.clear()

    def _pass_on(self, stream: IO[str], is_stderr: bool) -> None:
        for line in stream:
            if is_stderr:
                self.tail.append(line)
            with self._lock:
                if self._log is None:
                    self._kept.append(line)
                else:
                    self._log.write(line)
                    self._log.flush()
            if self._muted and is_stderr:
                continue
            out = sys.stderr if is_stderr else sys.stdout
            out.write(f"[rank {self.rank}] {line.rstrip()}\n")
            out.flush()


def end_with_parent() -> Callable[[], None] | None:
    """Return a ``preexec_fn`` by which Linux kills a child process when this process ends; None where it cannot."""
    # The kernel watches the thread that forked, and a thread other than the main one may end before the process.
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)

    return before_exec
