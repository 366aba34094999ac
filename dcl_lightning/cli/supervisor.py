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

from dcl_lightning.cli.hosts import answering_hosts, apart, hosts_of, number_place, on_hosts, ssh_options, workers_on
from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.distributed.horovod.relay import SignalRelay
from dcl_lightning.distributed.horovod.worker_process import end_with_parent
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import StateDict

__all__ = ["Supervisor", "main", "with_workers"]

# Exit codes without a restart: done, wrong usage, stopped by the user.
_ENDS = (0, 2, 130, 143)
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# SLURM's, for the end of a job's time.
_REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
# Launchers that die of these, or pass them on to workers that do not act on them yet and die.
_LAUNCHERS = ("horovodrun", "mpirun", "mpiexec", "orterun")
# Open MPI notices within 40 s, not after 8 minutes, that the link to a host is lost.
_MPI = {
    "OMPI_MCA_oob_tcp_keepalive_time": "15",
    "OMPI_MCA_oob_tcp_keepalive_intvl": "5",
    "OMPI_MCA_oob_tcp_keepalive_probes": "5",
}
_PATIENCE_S, _PAUSE_S = 120.0, 10.0  # for hosts that are too few to come back, and between two questions


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
        help="Go on with at least M workers: those of the hosts that answer if the launcher was given hosts (-H, a "
        "host file), else with one less after each loss. Without it always with as many.",
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

    SIGINT and SIGTERM stop the job, SIGUSR1 and SIGUSR2 (SLURM's) let it save and requeue itself: worker 0 receives
    them, on whichever host it runs, and all workers stop after the same step. Before training the launcher gets SIGINT
    and SIGTERM, and SLURM's signal waits for the first step.

    Args:
        job: words of the command; those before ``fit``, if any, launch our command line.
        max_restarts: starts after the first, at least 0.
        min_workers: fewest workers to go on with: those of the hosts that answer at the start, if the launcher was
            given hosts, else one less at each restart. None to keep their number.
    """

    def __init__(self, job: Sequence[str], max_restarts: int, min_workers: int | None = None) -> None:
        self.job = list(job) if min_workers is None else apart(job)
        self.max_restarts = max_restarts
        self.min_workers = min_workers
        self._hosts = hosts_of(apart(job))
        self._relay = SignalRelay()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = 0  # the signal
        self._requeued = False

    def run(self) -> int:
        """Run the job to its end; return the exit code of its last start, or that of the signal that stopped it."""
        before = {signum: signal.signal(signum, self._pass_on) for signum in _PASSED_ON}
        try:
            code = self._run()
            code = code if code >= 0 else 128 - code  # the shell's code of a signal
            # A launcher's own code does not tell that its workers stopped for a signal.
            return 128 + self._stopped if self._stopped else code
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            self._relay.close()

    def _run(self) -> int:
        began = time.time_ns()
        latest: tuple[Path, int] | None = None
        workers = None
        if self.min_workers is not None and not self._hosts:
            # Refuses a job that cannot run on fewer workers now, not after its first loss.
            workers = _workers(self.job, self._trainer)
        hosts = self._hosts_of_start(self._hosts)
        code = 1
        words = self.job
        for restart in range(self.max_restarts + 1):
            if hosts is None or self._stopped:
                break
            code = self._start(words if hosts == self._hosts else on_hosts(words, hosts))
            if self._stopped or self._requeued or code in _ENDS:
                break
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
            if not self._hosts and workers is not None and self.min_workers is not None:
                workers = max(workers - 1, self.min_workers)
                words = with_workers(words, workers)
            what = "from the beginning" if saved is None else f"from {saved[0]}"
            hosts = self._hosts_of_start(hosts)
            if hosts and self.min_workers is not None:
                workers = workers_on(self.job, hosts)
            on = "" if workers is None else f", on {workers} worker{'s' * (workers > 1)}"
            if hosts is not None:
                _say(f"the job ended with {how}; restart {restart + 1} of {self.max_restarts}, {what}{on}")
        return code

    def _hosts_of_start(self, before: dict[str, int]) -> dict[str, int] | None:
        """Return the hosts for the next start, asking them if there may be fewer; None if too few answer.

        Args:
            before: those of the last start.
        """
        if self.min_workers is None or not self._hosts:
            return self._hosts
        end = time.monotonic() + _PATIENCE_S
        while True:
            hosts = answering_hosts(self._hosts, ssh_options(self.job))
            enough = sum(hosts.values()) >= self.min_workers
            silent = [host for host in self._hosts if host not in hosts]
            if hosts != before:
                _say(_listed(hosts) + (f"; no answer from {', '.join(silent)}" if silent else ""))
                before = hosts
            if enough:
                return hosts
            if self._stopped or time.monotonic() > end:
                _say(
                    f"the hosts that answer have {sum(hosts.values())} workers, fewer than --min-workers="
                    f"{self.min_workers}"
                )
                return None
            time.sleep(_PAUSE_S)

    def _start(self, words: Sequence[str]) -> int:
        # A session of its own: a terminal's signal reaches the job once, through this process.
        self._process = subprocess.Popen(
            _command(words), start_new_session=True, preexec_fn=end_with_parent(),
            env={**_MPI, **os.environ, **self._relay.variables(self._hosts)},
        )  # fmt: skip
        code = self._process.wait()
        self._process = None
        return code

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        if signum in (signal.SIGINT, signal.SIGTERM):
            self._stopped = signum
        # SLURM ends the job once it is requeued.
        self._requeued |= signum in _REQUEUE and "SLURM_JOB_ID" in os.environ
        process = self._process
        launcher = self.job[: self.job.index("fit")]
        waits = process is None or any(os.path.basename(word) in _LAUNCHERS for word in launcher)
        if not self._relay.send(signum, hold=waits and signum in _REQUEUE) and process is not None:
            process.send_signal(signum)

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
    place = number_place(words)
    if place is None:
        return [*words, "--trainer.devices", str(workers)]
    return [*words[:place], str(workers), *words[place + 1 :]]


def _workers(words: Sequence[str], trainer: StateDict) -> int:
    place = number_place(words)
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


def _listed(hosts: dict[str, int]) -> str:
    return f"{', '.join(hosts)} answer{'s' * (len(hosts) == 1)}" if hosts else "no host answers"


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "dcl_lightning", *words] if words[0] == "fit" else list(words)


def _say(what: str) -> None:
    print(f"run: {what}", file=sys.stderr, flush=True)
