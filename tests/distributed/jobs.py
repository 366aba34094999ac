"""A job of workers as a user runs it, with output that can be read while it runs, and a check for leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.distributed.workers import SCRIPTS, environment

DEADLINE = 20.0  # from the fault to the end of the job
START = 120.0  # for a busy machine


class Job:
    """``faulty_job.py`` as a user runs it, or under a launcher; its output goes to files, to be read as it runs."""

    def __init__(self, folder: Path, *args: str, launcher: tuple[str, ...] = (), python: str = sys.executable) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.out, self.err = folder, folder / "stdout", folder / "stderr"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*launcher, python, str(SCRIPTS / "faulty_job.py"), *args],
                cwd=folder,
                env=environment(),
                stdout=out,
                stderr=err,
                # A shell that runs the tests in the background has them ignore Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    @property
    def text(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def said(self, word: str) -> list[str]:
        """The last word of each line that has ``word``."""
        return [line.split()[-1] for line in self.out.read_text().splitlines() if word in line]

    def wait_for(self, word: str, count: int = 1) -> list[str]:
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None and len(self.said(word)) < count:
            time.sleep(0.05)
        assert len(self.said(word)) >= count, self.text
        return self.said(word)

    def end(self, within: float = DEADLINE) -> int:
        """Wait for its end, and see that nothing of it is left; return the exit code."""
        code = self.process.wait(timeout=within)
        pids = self.said("PID")
        end = time.monotonic() + 5
        while time.monotonic() < end and any(_alive(pid) for pid in pids):
            time.sleep(0.1)
        assert not [pid for pid in pids if _alive(pid)], f"left behind\n{self.text}"
        return code

    def check_saved(self, folder: str = "checkpoints", name: str = "last.ckpt") -> int:
        """Return the step of a checkpoint, which loads."""
        checkpoint = torch.load(self.folder / folder / name, weights_only=True)
        step = checkpoint["global_step"]
        (state,) = [s["steps"] for key, s in checkpoint["callbacks"].items() if "Collector" in key]
        assert state.tolist() == [step, step], "the state of both workers"
        return step

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.said("PID"):
            if _alive(pid):
                os.kill(int(pid), signal.SIGKILL)


def _alive(pid: str) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
