"""``dcl-lightning run -- fit ...``: restarts a lost job from its latest checkpoint."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import FrameType

import yaml

from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.distributed.horovod.worker_process import end_with_parent
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import StateDict

__all__ = ["Supervisor", "main", "with_workers"]

# Exit codes without a restart: done, wrong usage, stopped by the user.
_ENDS = (0, 2, 130, 143)
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# Options of launchers that set the number of workers.
_NUMBER = ("-np", "--num-proc", "-n")


def main(args: Sequence[str]) -> int:
    """Run a job, and restart it after each loss.

    Args:
        args: that follow ``run``.

    Returns:
        Exit code of the job's last start.

    Raises:
        ConfigurationError: the job has no ``fit``, or a number is out of range.
    """
    parser = CommandParser("run", description=__doc__, usage="run [options] -- [LAUNCHER ...] fit ...")
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="Starts after the first, at most.")
    parser.add_argument(
        "--min-workers", type=int, metavar="M",
        help="Go on with one worker less after each loss, down to M; without it always with as many.",
    )  # fmt: skip
    parser.add_argument("job", nargs=argparse.REMAINDER, help="The job: `fit ...`, also behind `horovodrun -np N ...`.")
    given = parser.parse_args(args)
    job = given.job[1:] if given.job[:1] == ["--"] else given.job
    if "fit" not in job:
        raise ConfigurationError(
            f"run: no fit in the job ({' '.join(job) or 'empty'}): give run --max-restarts 3 -- fit ..."
        )
    if given.max_restarts < 0:
        raise ConfigurationError(f"run: --max-restarts={given.max_restarts}: give 0 or more")
    if given.min_workers is not None and given.min_workers < 1:
        raise ConfigurationError(f"run: --min-workers={given.min_workers}: give 1 or more")
    return Supervisor(job, given.max_restarts, given.min_workers).run()


class Supervisor:
    """Runs a job in a process of its own, and restarts it after each loss as long as it makes progress.

    Args:
        job: words of the command; those before ``fit``, if any, launch our command line.
        max_restarts: starts after the first, at least 0.
        min_workers: each restart has one worker less, down to this number; None to keep their number.
    """

    def __init__(self, job: Sequence[str], max_restarts: int, min_workers: int | None = None) -> None:
        self.job = list(job)
        self.max_restarts = max_restarts
        self.min_workers = min_workers
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self) -> int:
        """Run the job to its end; return the exit code of its last start."""
        before = {signum: signal.signal(signum, self._pass_on) for signum in _PASSED_ON}
        try:
            code = self._run()
            return code if code >= 0 else 128 - code  # the shell's code of a signal
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _run(self) -> int:
        began = time.time_ns()
        words, latest = self.job, None
        # Refuses a job that cannot run on fewer workers now, not after its first loss.
        workers = None if self.min_workers is None else _workers(self.job, self._trainer)
        for restart in range(self.max_restarts + 1):
            code = self._start(words)
            if self._stopped or code in _ENDS:
                return code
            how = f"signal {-code}" if code < 0 else f"code {code}"
            if restart == self.max_restarts:
                _say(f"the job ended with {how}; that was the last of {restart + 1} starts")
                break
            saved = _latest(self._trainer, began)
            if restart and saved == latest:
                _say(f"the job ended with {how} twice without a new checkpoint in between: see its messages above")
                break
            latest = saved
            words = self.job if saved is None else [*self.job, "--ckpt_path", "last"]
            if workers is not None and self.min_workers is not None:
                workers = max(workers - 1, self.min_workers)
                words = with_workers(words, workers)
            what = "from the beginning" if saved is None else f"from {saved[0]}"
            on = "" if workers is None else f", on {workers} worker{'s' * (workers > 1)}"
            _say(f"the job ended with {how}; restart {restart + 1} of {self.max_restarts}, {what}{on}")
            if self._stopped:
                return code
        return code

    def _start(self, words: Sequence[str]) -> int:
        # A session of its own: a terminal's signal reaches the job once, through this process.
        self._process = subprocess.Popen(_command(words), start_new_session=True, preexec_fn=end_with_parent())
        code = self._process.wait()
        self._process = None
        return code

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        self._stopped = self._stopped or signum in (signal.SIGINT, signal.SIGTERM)
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signum)

    @cached_property
    def _trainer(self) -> StateDict:
        """The job's configuration of the trainer, which takes the start of a process."""
        ours = self.job[self.job.index("fit") :]
        printed = subprocess.run(_command([*ours, "--print_config"]), stdout=subprocess.PIPE, text=True)
        if printed.returncode:
            raise SystemExit(printed.returncode)  # it printed the reason
        return dict(yaml.safe_load(printed.stdout)["trainer"])


def with_workers(words: Sequence[str], workers: int) -> list[str]:
    """Return the words of a job for another number of workers: the launcher's number, else ``trainer.devices``."""
    place = _place_of_number(words)
    if place is None:
        return [*words, "--trainer.devices", str(workers)]
    return [*words[:place], str(workers), *words[place + 1 :]]


def _place_of_number(words: Sequence[str]) -> int | None:
    """Return the index of the launcher's number of workers; None without one."""
    launcher = words[: words.index("fit")]
    return next((place + 1 for place, word in enumerate(launcher[:-1]) if word in _NUMBER), None)


def _workers(words: Sequence[str], trainer: StateDict) -> int:
    place = _place_of_number(words)
    key, given = ("trainer.devices", trainer["devices"]) if place is None else (words[place - 1], words[place])
    if str(given).isdigit():
        return int(given)
    raise ConfigurationError(f"run: --min-workers needs a number of workers, {key} is {given}: give a number")


def _latest(trainer: StateDict, began: int) -> tuple[Path, int] | None:
    """Return the latest whole checkpoint since the job began, with its time in ns, as names are reused."""
    from dcl_lightning.checkpoint.directory import latest_checkpoint
    from dcl_lightning.cli.checkpoint_path import checkpoint_files

    path, _ = latest_checkpoint(checkpoint_files(trainer))
    if path is None:
        return None
    with tempfile.TemporaryFile(dir=path.parent) as file:
        ahead = os.fstat(file.fileno()).st_mtime_ns - time.time_ns()  # a file server has its own clock
    saved = path.stat().st_mtime_ns
    return (path, saved) if saved >= began + ahead else None


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "dcl_lightning", *words] if words[0] == "fit" else list(words)


def _say(what: str) -> None:
    print(f"run: {what}", file=sys.stderr, flush=True)
