"""Waits for Horovod's operations by polling, and ends a job in which a worker hangs.

Horovod's own wait keeps a core busy, and its stall check ends nothing.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypedDict

import lightning.pytorch as pl
from torch import Tensor

from dcl_lightning.distributed import ranks
from dcl_lightning.distributed.horovod import mesh
from dcl_lightning.distributed.horovod.gradients import GradientAverager
from dcl_lightning.distributed.horovod.launcher import HorovodLauncher
from dcl_lightning.distributed.horovod.peers import SILENT, Answer, Peers, addresses_here, host_name
from dcl_lightning.distributed.horovod.shutdown import current_task, write_stderr
from dcl_lightning.distributed.horovod.worker_process import launching_process
from dcl_lightning.errors import some_of

__all__ = ["Watchdog", "limited_start", "poll_while_waiting"]

# Without these sleeps a job of two workers took 1.5 times as long on two cores that had other work, too.
_POLL_INTERVAL_S = 2e-5
_MAX_SHOWN = 8  # workers with a line of their own


class _State(TypedDict):
    """What a worker tells those who ask: seconds in its present wait, where it is."""

    waited: float
    place: str


class _Verdict(TypedDict):
    text: str
    stacks: list[int]  # of workers to show


def poll_while_waiting() -> None:
    """Let every wait for one of Horovod's operations sleep between polls, in Horovod's own functions too.

    Horovod's ``synchronize`` polls in a loop that only yields the core. On a CPU that takes the core from what the
    operation needs: Horovod's thread, the memory's thread, and the other workers of the machine.
    """
    import horovod.torch as hvd
    from horovod.torch import mpi_ops

    wait = mpi_ops.synchronize
    if wait.__code__.co_filename == __file__:
        return

    def synchronize(handle: int) -> Tensor | None:
        try:
            # Horovod's own function handles handles that were waited for before.
            while handle in mpi_ops._handle_map and not mpi_ops.poll(handle):
                time.sleep(_POLL_INTERVAL_S)
        finally:
            # Also if a signal handler raises during the sleep, so that no operation is left behind.
            result = wait(handle)
        return result

    mpi_ops.synchronize = hvd.synchronize = synchronize


@contextmanager
def limited_start(seconds: float, remedy: str, launcher: object) -> Iterator[None]:
    """End the job, which no exception could, if Horovod's start, within the block, takes too long.

    Args:
        seconds: limit.
        remedy: how to select one of several networks.
        launcher: of the strategy.
    """

    def end() -> None:
        found = ", ".join(f"{name} {address}" for name, address in addresses_here().items())
        write_stderr(
            f"horovod: worker {ranks.rank()} of {ranks.world_size()} on {host_name()} did not connect to the others "
            f"within {seconds:g} s (start_timeout): the hosts must reach each other at any TCP port, by one network "
            f"that all have. Here are {found or 'no networks'}; select one: {remedy}"
        )
        _end_job(launcher)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Watchdog:
    """Watches, from a thread, how long this worker waits within one of Horovod's operations.

    The thread reads the stacks of the other threads, so steps do no extra work. A worker that has waited too long asks
    the others: those that do not wait, or do not answer, are named, the former show their stacks, and the job ends.

    Args:
        trainer: gives the task, epoch and batch of a report.
        timeout: seconds that a worker may wait within one operation, above 0.
        peers: the other workers.
        launcher: of the strategy; on worker 0 the local launcher, if that started the others.
        gradients: knows which parameters' gradients are waited for.
    """

    def __init__(
        self, trainer: pl.Trainer, timeout: float, peers: Peers, launcher: object, gradients: GradientAverager
    ) -> None:
        self._trainer, self._timeout, self._peers, self._rank = trainer, timeout, peers, peers.rank
        self._launcher = launcher if isinstance(launcher, HorovodLauncher) else None
        self._gradients = gradients
        self._interval = min(max(timeout / 10, 0.2), 2.0)
        self._since: dict[tuple[int, int], float] = {}
        self._done = threading.Event()
        # So that the launcher can get the stack of a worker whose threads cannot run any more.
        if not faulthandler.is_enabled():
            faulthandler.enable(2)
        threading.Thread(target=self._run, name="horovod-watchdog", daemon=True).start()

    def stop(self) -> None:
        """End the watch; safe to repeat."""
        self._done.set()
        self._peers.put("state", None)

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            verdict = self._report_and_judge(self._look())
            if verdict is not None and not self._done.is_set():
                self._carry_out(verdict)
                return

    def _look(self) -> float:
        """Return the seconds since when an operation was seen to be waited for; 0 if none is."""
        now = time.monotonic()
        self._since = {wait: self._since.get(wait, now) for wait in _waits()}
        return max((max(now - since, 1e-3) for since in self._since.values()), default=0.0)

    def _report_and_judge(self, waited: float) -> _Verdict | None:
        """Report this worker's state; return this or another worker's verdict, if one exists."""
        state: _State = {"waited": waited, "place": self._place()}
        if not self._done.is_set():
            self._peers.put("state", state)
        verdict: _Verdict | None = self._peers.get("verdict")
        return self._judge() if verdict is None and waited > self._timeout else verdict

    def _judge(self) -> _Verdict | None:
        # Until the others have looked, too.
        if self._done.wait(1.5 * self._interval) or self._look() <= self._timeout:
            return None
        answers = self._peers.ask("state")
        given: _Verdict | None = self._peers.get("verdict")
        if given is not None:
            return given
        waited = {k: float(answer.value["waited"]) if answer.value else 0.0 for k, answer in answers.items()}
        if any(k < self._rank and waited[k] > self._timeout for k in answers):
            return None  # that worker gives the verdict
        late = {k: answer for k, answer in answers.items() if not waited[k]}
        lines = [self._headline(late), f"  {self._peers.name(self._rank)} waits in {self._place()}"]
        for k in list(late or answers)[:_MAX_SHOWN]:
            lines.append(f"  {self._peers.name(k)} {_described(answers[k])}")
        stacks = [k for k, answer in late.items() if answer.kind in ("answers", "frozen")]
        verdict: _Verdict = {"text": "\n".join(lines), "stacks": stacks if late else [self._rank, *answers]}
        write_stderr(verdict["text"])
        self._peers.tell("verdict", verdict)
        # A launcher that is stuck as a whole: make it show where.
        parent = launching_process()
        if parent is not None and 0 in late and late[0].kind == "frozen":
            os.kill(parent, signal.SIGABRT)
        return verdict

    def _headline(self, late: Mapping[int, Answer]) -> str:
        me = self._peers.name(self._rank)
        waited = f"that {me} has waited for more than {self._timeout:g} s (collective_timeout)"
        if not late:
            return f"horovod: all workers wait, for different operations; in the one {waited}:"
        names = some_of([self._peers.name(k) for k in late])
        kinds = {answer.kind for answer in late.values()}
        why = f": {SILENT[kinds.pop()]}" if len(kinds) == 1 and not kinds & {"answers"} else ""
        return f"horovod: {names} did not come to an operation {waited}{why}"

    def _carry_out(self, verdict: _Verdict) -> None:
        stacks = verdict["stacks"]
        if self._rank in stacks:
            write_stderr(f"horovod: where worker {self._rank} is:")
            faulthandler.dump_traceback(2)
        elif self._launcher is None and stacks:
            time.sleep(2 * self._interval)  # for them
        _end_job(self._launcher, [k for k in stacks if k != self._rank], patience=2 * self._interval + 1)

    def _place(self) -> str:
        """Return stage, task, epoch, batch and source line at which this worker is."""
        trainer = self._trainer
        stage, task = trainer.state.stage, current_task(trainer)
        words = [str(stage and stage.value)]
        if task is not None:
            words.append(f"task {task}")
        words += [f"epoch {trainer.current_epoch}", f"batch {trainer.fit_loop.batch_idx}"]
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and _is_within_wait(frame):
            frame = frame.f_back
        if frame is not None:
            code = frame.f_code
            words.append(f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})")
        names = self._gradients.waited_for()
        if names:
            words.append(f"for the gradient of {names[0]}")
        return ", ".join(words)


def _end_job(launcher: object, stuck: Collection[int] = (), patience: float = 0.0) -> NoReturn:
    """End this process and what its launcher started, with exit code 1."""
    if isinstance(launcher, HorovodLauncher):
        launcher.abort(1, stuck=stuck, patience=patience)
    os._exit(1)


def _described(answer: Answer) -> str:
    """Return what a worker that was asked does."""
    state: _State | None = answer.value
    if answer.kind != "answers":
        return f"does not answer: {SILENT[answer.kind]}"
    if state is None:
        return "is not within fit, validate, test or predict"
    return f"{'waits' if state['waited'] else 'is'} in {state['place']}"


def _is_within_wait(frame: FrameType) -> bool:
    """Return whether a frame belongs to Horovod, or to the wait for it, and so says nothing about a worker's place."""
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package == "horovod" or frame.f_code.co_filename in (__file__, mesh.__file__)


def _waits() -> Iterator[tuple[int, int]]:
    """Yield thread and handle of each wait for other workers; the handle is -1 if it is not known."""
    mpi_ops = sys.modules.get("horovod.torch.mpi_ops")
    waits = {(__file__, "synchronize"), (mpi_ops and mpi_ops.__file__, "synchronize"), (mesh.__file__, "receive")}
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = top
        while frame is not None:
            code = frame.f_code
            if (code.co_filename, code.co_name) in waits:
                yield thread, int(frame.f_locals.get("handle", -1))
                break
            frame = frame.f_back
