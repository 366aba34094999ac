"""The pool of reader processes: started once, and kept over tasks, training and evaluation."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from dcl_lightning.distributed.ranks import mpi_runs

__all__ = ["Readers"]

T = TypeVar("T")


class Readers:
    """A pool of processes, started at its first use; any number of loaders may use it at once.

    They are started as PyTorch's ``DataLoader`` starts its own (Python's default), beside MPI by
    ``forkserver``: MPI does not allow processes to be forked.

    Args:
        num_workers: number of processes; 0 to do the work where it is asked for.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._lock = threading.Lock()
        # The present pool, if any: in a list, so that what ends it at exit does not keep this object alive.
        self._pools: list[ProcessPoolExecutor] = []
        weakref.finalize(self, _shut_down, self._pools)

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Return the future result of a module's function; without processes it is there at once.

        Args:
            function: function that a process can import.
            *args: its arguments, which have to be picklable.
        """
        if self.num_workers == 0:
            future: Future[T] = Future()
            try:
                future.set_result(function(*args))
            except Exception as error:
                future.set_exception(error)
            return future
        with self._lock:
            if not self._pools:
                self._pools.append(ProcessPoolExecutor(self.num_workers, _context(), _start_of_a_process))
            return self._pools[0].submit(function, *args)

    def result(self, future: Future[T]) -> T:
        """Return what a future holds, once it does.

        Raises:
            RuntimeError: a process has ended by itself.
            Exception: what the function raised.
        """
        try:
            return future.result()
        except BrokenProcessPool as error:
            self.close()
            raise RuntimeError(
                f"a process that reads images has ended ({error}): out of memory, or of shared memory in /dev/shm? "
                "Give a smaller data.num_workers; 0 reads in the training process"
            ) from error

    def close(self) -> None:
        """End the processes; they are started again when next they are needed."""
        with self._lock:
            _shut_down(self._pools)

    def __reduce__(self) -> tuple[type[Readers], tuple[int]]:
        return Readers, (self.num_workers,)


def _shut_down(pools: list[ProcessPoolExecutor]) -> None:
    while pools:
        pools.pop().shutdown(wait=True, cancel_futures=True)


def _context() -> multiprocessing.context.BaseContext:
    if mpi_runs():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision.io", "dcl_lightning.data.images.decode"])
        return context
    # Loaded here, it need not be loaded in each process that is forked.
    importlib.import_module("torchvision.io")
    return multiprocessing.get_context()


def _start_of_a_process() -> None:
    torch.set_num_threads(1)
    # A signal is sent to the whole job, and it is for the parent to say what becomes of it.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    # A parent that was killed says nothing, and the pool's queue would be waited at for ever. Forked processes see
    # another parent then; those of a fork server keep the server, and see that the pipe to their parent is closed.
    process = multiprocessing.parent_process()
    while os.getppid() == parent and process is not None and process.is_alive():
        process.join(1)
    os._exit(1)
