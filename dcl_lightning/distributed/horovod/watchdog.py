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
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TypedDict

import lightning.pytorch as pl
from torch import Tensor

from dcl_lightning.comm import Comm
from dcl_lightning.distributed.horovod import mesh
from dcl_lightning.distributed.horovod.gradients import GradientAverager
from dcl_lightning.distributed.horovod.launcher import HorovodLauncher
from dcl_lightning.distributed.horovod.rendezvous import Rendezvous
from dcl_lightning.distributed.horovod.shutdown import current_task, write_stderr
from dcl_lightning.distributed.horovod.worker_process import launching_process

__all__ = ["Watchdog", "poll_while_waiting"]

# Without these sleeps a job of two workers took 1.5 times as long on two cores that had other work, too.
_POLL_INTERVAL_S = 2e-5
_MAX_SHOWN = 8  # workers or parameters named one by one


class _State(TypedDict):
    """What a worker reports to the others: seconds in its present wait, number of its looks, where it is."""

    waited: float
    looks: int
    place: str


class _Verdict(TypedDict):
    text: str
    late: list[int]


_UNKNOWN: _State = {"waited": 0.0, "looks": 0, "place": "a place that it has not reported"}


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


class Watchdog:
    """Watches, from a thread, how long this worker waits within one of Horovod's operations.

    The thread reads the stacks of the other threads, so steps do no extra work. Workers report to each other at the
    rendezvous. When one has waited too long it compares the reports: workers that do not wait, or have stopped
    reporting, are named and show their stacks, and the job ends. Under MPI, which has no rendezvous, the waiting worker
    can only report where it waits itself.

    Args:
        trainer: gives the task, epoch and batch of a report.
        timeout: seconds that a worker may wait within one operation, above 0.
        comm: the cluster.
        launcher: of the strategy; on worker 0 the local launcher, if that started the others.
        gradients: knows which parameters' gradients are waited for.
    """

    def __init__(
        self, trainer: pl.Trainer, timeout: float, comm: Comm, launcher: object, gradients: GradientAverager
    ) -> None:
        self._trainer, self._timeout, self._rank, self._size = trainer, timeout, comm.rank, comm.size
        self._launcher = launcher if isinstance(launcher, HorovodLauncher) else None
        self._gradients = gradients
        self._meeting = Rendezvous.of_job()
        self._interval = min(max(timeout / 10, 0.2), 4.0)
        self._since: dict[tuple[int, int], float] = {}
        self._looks = 0
        self._done = threading.Event()
        # So that the launcher can get the stack of a worker whose threads cannot run any more.
        if not faulthandler.is_enabled():
            faulthandler.enable(2)
        threading.Thread(target=self._run, name="horovod-watchdog", daemon=True).start()

    def stop(self) -> None:
        """End the watch; safe to repeat."""
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            waited = self._look()
            try:
                verdict = self._report_and_judge(waited)
            except OSError as error:
                verdict = self._judge_alone(f"the rendezvous does not answer ({error})", waited)
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
        if self._meeting is None:
            return self._judge_alone("MPI has no rendezvous at which to ask them", waited)
        self._looks += 1
        state: _State = {"waited": waited, "looks": self._looks, "place": self._place()}
        self._meeting.put(f"state.{self._rank}", state)
        verdict: _Verdict | None = self._meeting.get("verdict")
        return self._judge(self._meeting) if verdict is None and waited > self._timeout else verdict

    def _judge(self, meeting: Rendezvous) -> _Verdict | None:
        # The states are read twice: a worker that has not looked in between has stopped reporting.
        before = self._states(meeting)
        if self._done.wait(1.5 * self._interval) or self._look() <= self._timeout:
            return None
        states = self._states(meeting)
        alive = [k for k, state in states.items() if state["looks"] > before[k]["looks"]]
        waiting = [k for k in alive if k != self._rank and states[k]["waited"] > 0]
        if any(k < self._rank and states[k]["waited"] > self._timeout for k in waiting):
            return None  # that worker gives the verdict
        late = [k for k in states if k != self._rank and k not in waiting]
        lines = [self._headline(late), f"  worker {self._rank} waits in {self._place()}"]
        for k in (late or waiting)[:_MAX_SHOWN]:
            words = "waits in" if k in waiting else "is in" if k in alive else "gives no sign of life; last seen in"
            lines.append(f"  worker {k} {words} {states[k]['place']}")
        verdict: _Verdict = {"text": "\n".join(lines), "late": late or list(states)}
        meeting.put("verdict", verdict)
        write_stderr(verdict["text"])
        return verdict

    def _states(self, meeting: Rendezvous) -> dict[int, _State]:
        return {k: meeting.get(f"state.{k}") or _UNKNOWN for k in range(self._size)}

    def _headline(self, late: list[int]) -> str:
        waited = f"that worker {self._rank} has waited for more than {self._timeout:g} s (collective_timeout)"
        if not late:
            return f"horovod: all workers wait, for different operations; in the one {waited}:"
        names = _shown([str(k) for k in late])
        return f"horovod: {'worker' if len(late) == 1 else 'workers'} {names} did not come to an operation {waited}:"

    def _judge_alone(self, why: str, waited: float) -> _Verdict | None:
        if waited <= self._timeout:
            return None
        text = (
            f"horovod: worker {self._rank} has waited for the others for more than {self._timeout:g} s "
            f"(collective_timeout), and {why}\n  worker {self._rank} waits in {self._place()}"
        )
        write_stderr(text)
        # If the rendezvous is silent, the process that holds it is stuck as a whole: make it show where.
        parent = launching_process()
        if self._meeting is not None and parent is not None and self._launcher is None:
            os.kill(parent, signal.SIGABRT)
        return {"text": text, "late": [self._rank]}

    def _carry_out(self, verdict: _Verdict) -> None:
        late = verdict["late"]
        if self._rank in late:
            write_stderr(f"horovod: where worker {self._rank} is:")
            faulthandler.dump_traceback(2)
        elif self._launcher is None:
            time.sleep(2 * self._interval)  # for workers that hang to show their stacks
        if self._launcher is not None:
            self._launcher.abort(1, stuck=[k for k in late if k != self._rank], patience=2 * self._interval + 1)
        os._exit(1)

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


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_MAX_SHOWN]) + (" and others" if len(names) > _MAX_SHOWN else "")


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
