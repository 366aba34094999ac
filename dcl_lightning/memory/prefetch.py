"""Runs the memory's work in parallel to the training step: one thread per worker, and on a GPU one CUDA stream."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from dcl_lightning.stopwatch import Stopwatch

__all__ = ["MemoryEngine", "nvtx_range"]


_CLOSE_TIMEOUT_S = 5.0  # for a job to end when the engine is closed

Result = TypeVar("Result")


@dataclass
class _Job(Generic[Result]):
    run: Callable[[], Result]
    ready: torch.cuda.Event | None = None  # the training stream's position at ``submit``
    done: threading.Event = field(default_factory=threading.Event)
    finished: torch.cuda.Event | None = None
    result: Result | None = None
    error: BaseException | None = None


class MemoryEngine(Generic[Result]):
    """Executes jobs one at a time, in the order of ``submit``.

    On a GPU jobs run on a stream of their own, which waits, on the device, for the work that the training stream had
    queued at ``submit``; ``collect`` lets the training stream wait for the job. The host waits for neither. The caller
    records the tensors of a result on the training stream.

    Args:
        background: whether jobs run in a thread; otherwise within ``submit``.
        device: of this worker.
        stopwatch: of the calling thread, whose phase ``rehearse`` is its time for the memory: that of jobs within
            ``submit``, and that of waiting.

    Attributes:
        stream: of the jobs; None on a CPU, or without a background thread.
        wait_s: seconds that ``collect`` has waited so far.
        staleness: steps since the result that ``latest`` returned last was new.
    """

    def __init__(
        self, background: bool, device: torch.device | None = None, stopwatch: Stopwatch | None = None
    ) -> None:
        on_gpu = device is not None and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu and background else None
        self._jobs: queue.SimpleQueue[_Job[Result] | None] = queue.SimpleQueue()
        self._pending: list[_Job[Result]] = []
        self._last: Result | None = None
        self._thread: threading.Thread | None = None
        self._stopwatch = stopwatch or Stopwatch(["rehearse"])
        self.wait_s = 0.0
        self.staleness = 0
        if background:
            self._thread = threading.Thread(target=self._work, name="rehearsal-memory", daemon=True)
            self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether a job has not been collected."""
        return bool(self._pending)

    def submit(self, run: Callable[[], Result]) -> None:
        """Queue a job."""
        job = _Job(run)
        if self.stream is not None:
            job.ready = torch.cuda.current_stream().record_event()
        self._pending.append(job)
        if self._thread is None:
            with self._stopwatch.phase("rehearse"):
                self._execute(job)
        else:
            self._jobs.put(job)

    def collect(self) -> Result | None:
        """Wait for the oldest job and return its result; None if no job is pending.

        Raises:
            BaseException: the job's error, with its own traceback.
        """
        if not self._pending:
            return None
        job = self._pending.pop(0)
        started = time.perf_counter()
        with self._stopwatch.phase("rehearse"):
            job.done.wait()
            self.wait_s += time.perf_counter() - started
            return self._finish(job)

    def latest(self) -> Result | None:
        """Return the newest finished result without waiting, possibly the same one as before."""
        self.staleness += 1
        while self._pending and self._pending[0].done.is_set():
            self._last = self._finish(self._pending.pop(0))
            self.staleness = len(self._pending)
        return self._last

    def flush(self) -> Result | None:
        """Wait for all jobs and return the last one's result; None if no job was pending."""
        result = None
        while self._pending:
            result = self.collect()
        return result

    def close(self) -> bool:
        """End the thread; drop uncollected results and their errors.

        A job that waits for another worker, which may have failed, is given up after some seconds.

        Returns:
            Whether all jobs have ended.
        """
        self._pending.clear()
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        self._jobs.put(None)
        thread.join(_CLOSE_TIMEOUT_S)
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
        except BaseException as error:  # raised by ``collect``
            job.error = error
        job.done.set()


def nvtx_range(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context that is an NVTX range ``rehearsal.<name>``, which profilers such as Nsight Systems show.

    Args:
        name: ``insert``, ``draw``, ``exchange``, ``move`` or ``join``.
        device: of this worker; no range is made unless it is a GPU.
    """
    return torch.cuda.nvtx.range(f"rehearsal.{name}") if device.type == "cuda" else nullcontext()
