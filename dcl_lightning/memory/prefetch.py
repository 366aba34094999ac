"""Runs the memory's work in parallel to the training step: one thread per worker, and one stream on a GPU."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

__all__ = ["MemoryEngine", "nvtx_range"]


_PATIENCE_S = 5.0  # for a job to end when the engine is closed

Result = TypeVar("Result")


@dataclass
class _Job(Generic[Result]):
    run: Callable[[], Result]
    ready: torch.cuda.Event | None = None  # what the training stream had queued when the job was given
    done: threading.Event = field(default_factory=threading.Event)
    finished: torch.cuda.Event | None = None
    result: Result | None = None
    error: BaseException | None = None


class MemoryEngine(Generic[Result]):
    """Executes jobs one at a time in the order given; at most one result is waited for.

    On a GPU jobs run on a stream of their own: it waits, on the device, for what the training stream had
    queued at ``submit``, and ``collect`` makes the training stream wait for the job, so the host waits for
    neither. Tensors of a result must be recorded on the training stream by whoever uses them.

    Args:
        background: whether jobs run in a thread; else within ``submit``.
        device: the worker's device.
    """

    def __init__(self, background: bool, device: torch.device | None = None) -> None:
        on_gpu = device is not None and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu and background else None
        self._jobs: queue.SimpleQueue[_Job[Result] | None] = queue.SimpleQueue()
        self._pending: list[_Job[Result]] = []
        self._last: Result | None = None
        self._thread: threading.Thread | None = None
        self.wait_s = 0.0
        self.staleness = 0
        if background:
            self._thread = threading.Thread(target=self._work, name="rehearsal-memory", daemon=True)
            self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether a result has not been collected."""
        return bool(self._pending)

    def submit(self, run: Callable[[], Result]) -> None:
        """Give a job."""
        job = _Job(run)
        if self.stream is not None:
            job.ready = torch.cuda.current_stream().record_event()
        self._pending.append(job)
        if self._thread is None:
            self._execute(job)
        else:
            self._jobs.put(job)

    def collect(self) -> Result | None:
        """Wait for the oldest job and return its result; None if there is no job.

        Raises:
            BaseException: what the job raised, with the job's own traceback.
        """
        if not self._pending:
            return None
        job = self._pending.pop(0)
        started = time.perf_counter()
        job.done.wait()
        self.wait_s += time.perf_counter() - started
        return self._finish(job)

    def latest(self) -> Result | None:
        """Return the newest result that is ready, without waiting; the last one again if none is."""
        self.staleness += 1
        while self._pending and self._pending[0].done.is_set():
            self._last = self._finish(self._pending.pop(0))
            self.staleness = len(self._pending)
        return self._last

    def flush(self) -> Result | None:
        """Wait for all jobs; return the last one's result, None if there was none."""
        result = None
        while self._pending:
            result = self.collect()
        return result

    def close(self) -> bool:
        """End the thread; results that nobody collected are dropped, with their errors.

        A job that waits for another worker, which may have failed, is not waited for: the thread ends with it.

        Returns:
            Whether all jobs have ended.
        """
        self._pending.clear()
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        self._jobs.put(None)
        thread.join(_PATIENCE_S)
        return not thread.is_alive()

    def _finish(self, job: _Job[Result]) -> Result | None:
        if job.error is not None:
            raise job.error
        if job.finished is not None:
            torch.cuda.current_stream().wait_event(job.finished)
        return job.result

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._execute(job)

    def _execute(self, job: _Job[Result]) -> None:
        try:
            if self.stream is None:
                job.result = job.run()
            else:
                with torch.cuda.stream(self.stream):
                    assert job.ready is not None
                    self.stream.wait_event(job.ready)
                    job.result = job.run()
                    job.finished = self.stream.record_event()
        except BaseException as error:  # handed to whoever collects
            job.error = error
        job.done.set()


def nvtx_range(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context whose work stands as ``rehearsal.<name>`` in a profile of Nsight Systems (an NVTX range).

    Args:
        name: of the stage: ``insert``, ``draw``, ``exchange``, ``move`` or ``join``.
        device: the worker's; on any but a GPU there is no range.
    """
    return torch.cuda.nvtx.range(f"rehearsal.{name}") if device.type == "cuda" else nullcontext()
