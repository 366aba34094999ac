"""One worker process of the local launcher: its start, its output and its end."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["WorkerProcess", "end_with_parent", "launching_process"]

_LAST_LINES = 150  # holds a traceback through all of Lightning
_LINES_KEPT = 5000  # until the run's folder is known
_PR_SET_PDEATHSIG = 1
_LAUNCHER = "DCL_LIGHTNING_LAUNCHER"


def launching_process() -> int | None:
    """Return the process id of worker 0, if that has started this worker."""
    parent = os.getppid()
    return parent if os.environ.get(_LAUNCHER) == str(parent) else None


class WorkerProcess:
    """A process that ends with this one, whatever ends it.

    Its lines are shown here, on the stream of the same name, with ``[rank k]`` before each.

    Args:
        rank: 0-based number of the worker.
        command: what to run.
        variables: its environment, besides this process's.
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
        self._readers = [
            threading.Thread(target=self._pass_on, args=(stream, name), daemon=True)
            for stream, name in ((self.process.stdout, "stdout"), (self.process.stderr, "stderr"))
        ]
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
        """Whether its last lines tell of another worker's failure rather than of its own."""
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
        hint = ": killed from outside, or for want of memory" if code == -signal.SIGKILL else ""
        return f"ended with code {code} ({name}{hint})"

    def kill(self, signum: int, group: bool = True) -> None:
        """Send a signal.

        Args:
            signum: the signal.
            group: whether also to what the worker has started.
        """
        if not self.running:
            return
        try:
            (os.killpg if group else os.kill)(self.process.pid, signum)
        except ProcessLookupError:
            return

    def mute(self) -> None:
        """Show no more of what it says on stderr; logs have it."""
        self._muted = True

    def drain(self, timeout: float = 1.0) -> None:
        """Wait until what it wrote before its end has been shown.

        Args:
            timeout: seconds, for each of its two streams.
        """
        for reader in self._readers:
            reader.join(timeout)

    def log_to(self, folder: Path) -> None:
        """Write ``rank_k.log``, from its first line on.

        Args:
            folder: where; made if needed.
        """
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

    def _pass_on(self, stream: IO[str], name: str) -> None:
        for line in stream:
            if name == "stderr":
                self.tail.append(line)
            with self._lock:
                if self._log is None:
                    self._kept.append(line)
                else:
                    self._log.write(line)
                    self._log.flush()
            if self._muted and name == "stderr":
                continue
            out = getattr(sys, name)
            out.write(f"[rank {self.rank}] {line.rstrip()}\n")
            out.flush()


def end_with_parent() -> Callable[[], None] | None:
    """Return what a child runs before its program, ``preexec_fn``: Linux shall kill it when this process is gone."""
    # The kernel means the thread that forked; a thread of the user's may end long before the process.
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)

    return before_exec
