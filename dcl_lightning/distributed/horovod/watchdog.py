"""Ends a job in which a worker hangs; Horovod's own stall check ends nothing."""

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
from typing import Any

import lightning.pytorch as pl

from dcl_lightning.distributed.horovod.gradients import FIND_UNUSED, GradientAverager
from dcl_lightning.distributed.horovod.launcher import HorovodLauncher
from dcl_lightning.distributed.horovod.polling import end_waits, handle_waited_for, is_within_wait
from dcl_lightning.distributed.horovod.rendezvous import Rendezvous
from dcl_lightning.distributed.horovod.worker_process import launching_process
from dcl_lightning.types import Clock

__all__ = ["Watchdog"]

_SHOWN = 8  # workers named one by one


class Watchdog:
    """Looks, from a thread, for how long this worker has waited within one of Horovod's operations.

    Nothing is added to a step: the thread reads the stacks of the others. Workers tell each other at the
    rendezvous what they do. When one has waited too long, the others are asked: those that do not wait, or give
    no sign of life, are named, show their stacks, and the job ends. Under MPI, which has no rendezvous, the
    worker that has waited can only tell of itself.

    Args:
        trainer: tells the task, epoch and batch.
        timeout: seconds that a worker waits within one operation, above 0.
        rank: this worker.
        size: number of workers.
        launcher: ours, on worker 0, if it has started the others.
        gradients: knows which parameters' gradients are waited for.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        timeout: float,
        rank: int,
        size: int,
        launcher: Any,
        gradients: GradientAverager,
    ) -> None:
        self.trainer, self.timeout, self.rank, self.size = trainer, timeout, rank, size
        self.launcher = launcher if isinstance(launcher, HorovodLauncher) else None
        self.gradients = gradients
        self.meeting = Rendezvous.of_job()
        self.interval = min(max(timeout / 10, 0.2), 4.0)
        self._since: dict[tuple[int, int], float] = {}
        self._looks = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="horovod-watchdog", daemon=True)
        # So that the launcher can have the stack of a worker whose threads cannot run any more.
        if not faulthandler.is_enabled():
            faulthandler.enable(2)
        self._thread.start()

    def stop(self) -> None:
        """End the watch; safe to repeat."""
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(self.interval):
            waited = self._look()
            try:
                verdict = self._tell_and_ask(waited)
            except OSError as error:
                verdict = self._alone(f"the rendezvous gives no answer ({error})") if waited > self.timeout else None
            if verdict is not None and not self._done.is_set():
                self._obey(verdict)
                return

    def _look(self) -> float:
        """Return for how many seconds an operation has been waited for, as far as was seen; 0 if none is."""
        now = time.monotonic()
        self._since = {wait: self._since.get(wait, now) for wait in _waits()}
        return max((max(now - since, 1e-3) for since in self._since.values()), default=0.0)

    def _tell_and_ask(self, waited: float) -> dict[str, Any] | None:
        """Tell the others what this worker does; return the verdict, own or another's, if there is one."""
        if self.meeting is None:
            return self._alone("nobody can be asked under MPI") if waited > self.timeout else None
        self._looks += 1
        state = {
            "waited": waited,
            "looks": self._looks,
            "place": self._place(),
            "without": self.gradients.without_gradient(),
        }
        self.meeting.put(f"state.{self.rank}", state)
        if waited > self.interval / 2:  # seen at two looks: no step takes so long
            self._look_for_unused(self.meeting)
        verdict: dict[str, Any] | None = self.meeting.get("verdict")
        if verdict is not None or waited <= self.timeout:
            return verdict
        return self._accuse(self.meeting)

    def _look_for_unused(self, meeting: Rendezvous) -> None:
        """End this worker's wait for gradients that another worker, which has ended that backward pass, has not."""
        number, names = self.gradients.waited_for()
        if not names:
            return
        for k, state in self._states(meeting).items():
            lacking = [name for name in state["without"].get(str(number), []) if name in names]
            if lacking and self.gradients.waited_for()[0] == number:
                shown = ", ".join(lacking[:_SHOWN]) + (" and others" if len(lacking) > _SHOWN else "")
                end_waits(
                    f"worker {k}'s backward pass gave no gradient to {shown}, and worker {self.rank} waits for it: "
                    f"{FIND_UNUSED}"
                )
                return

    def _accuse(self, meeting: Rendezvous) -> dict[str, Any] | None:
        # Asked twice: who has not looked in between gives no sign of life.
        before = self._states(meeting)
        if self._done.wait(1.5 * self.interval) or self._look() <= self.timeout:
            return None
        states = self._states(meeting)
        alive = [k for k, state in states.items() if state["looks"] > before[k]["looks"]]
        waiting = [k for k in alive if k != self.rank and states[k]["waited"] > 0]
        if any(k < self.rank and states[k]["waited"] > self.timeout for k in waiting):
            return None  # that one speaks
        late = [k for k in states if k != self.rank and k not in waiting]
        lines = [self._headline(late)]
        lines += [f"  worker {self.rank} waits in {self._place()}"]
        for k in (late or waiting)[:_SHOWN]:
            word = "waits in" if k in waiting else "is in" if k in alive else "gives no sign of life; last seen in"
            lines.append(f"  worker {k} {word} {states[k]['place']}")
        text = "\n".join(lines)
        verdict = {"text": text, "late": late or list(states)}
        meeting.put("verdict", verdict)
        self._say(text)
        return verdict

    def _states(self, meeting: Rendezvous) -> dict[int, dict[str, Any]]:
        unknown = {"waited": 0.0, "looks": 0, "place": "a place that it has not told", "without": {}}
        return {k: meeting.get(f"state.{k}") or unknown for k in range(self.size)}

    def _headline(self, late: list[int]) -> str:
        waited = f"that worker {self.rank} has waited for more than {self.timeout:g} s (collective_timeout)"
        if not late:
            return f"horovod: all workers wait, for different operations; in the one {waited}:"
        names = ", ".join(map(str, late[:_SHOWN])) + (" and others" if len(late) > _SHOWN else "")
        return f"horovod: {'worker' if len(late) == 1 else 'workers'} {names} did not come to an operation {waited}:"

    def _alone(self, why: str) -> dict[str, Any]:
        text = (
            f"horovod: worker {self.rank} has waited for the others for more than {self.timeout:g} s "
            f"(collective_timeout), and {why}\n  worker {self.rank} waits in {self._place()}"
        )
        self._say(text)
        # With a rendezvous that is silent, the process that holds it is stuck as a whole: let it show where.
        parent = launching_process()
        if self.meeting is not None and parent is not None and self.launcher is None:
            os.kill(parent, signal.SIGABRT)
        return {"text": text, "late": [self.rank]}

    def _obey(self, verdict: dict[str, Any]) -> None:
        late = verdict["late"]
        if self.rank in late:
            self._say(f"horovod: where worker {self.rank} is:")
            faulthandler.dump_traceback(2)
        elif self.launcher is None:
            time.sleep(2 * self.interval)  # for the stacks of those that hang
        if self.launcher is not None:
            self.launcher.abort(1, stuck=[k for k in late if k != self.rank], patience=2 * self.interval + 1)
        os._exit(1)

    @staticmethod
    def _say(text: str) -> None:
        # Not through ``sys.stderr``: a thread that hangs may hold its lock.
        os.write(2, f"{text}\n".encode())

    def _place(self) -> str:
        trainer: Any = self.trainer
        words = [str(getattr(trainer.state.stage, "value", trainer.state.stage))]
        clock = getattr(trainer.lightning_module, "clock", None)
        if isinstance(clock, Clock):
            words.append(f"task {clock.task_at(trainer.current_epoch)}")
        words += [f"epoch {trainer.current_epoch}", f"batch {trainer.fit_loop.batch_idx}"]
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and is_within_wait(frame):
            frame = frame.f_back
        if frame is not None:
            code = frame.f_code
            words.append(f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})")
        names = self.gradients.waited_for()[1]
        if names:
            words.append(f"for the gradient of {names[0]} (if some worker's steps do without it, {FIND_UNUSED})")
        return ", ".join(words)


def _waits() -> Iterator[tuple[int, int]]:
    """Yield the thread and the handle of each of Horovod's operations that a thread waits for."""
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = top
        while frame is not None:
            handle = handle_waited_for(frame)
            if handle is not None:
                yield thread, handle
                break
            frame = frame.f_back
