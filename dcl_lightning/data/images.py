"""Images in files: a split that a pool of processes reads, a few batches ahead of the training."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.data.decode import read_images
from dcl_lightning.distributed.ranks import mpi_runs
from dcl_lightning.types import Batch

__all__ = ["AS_EVALUATED", "ImageFiles", "ReaderPool"]

AS_EVALUATED = -1  # in place of an epoch: without a random crop

P = ParamSpec("P")
T = TypeVar("T")

_PREFETCHED_BATCHES = 2


class ReaderPool:
    """Processes that start with the first call and are shared by all loaders, over tasks, training and evaluation.

    They start as those of PyTorch's ``DataLoader``, but with ``forkserver`` under MPI, which forbids forks. With
    ``num_workers`` 0 the calling process does the work.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._lock = threading.Lock()
        # The present pool, if any. A list, so that the finalizer does not keep this object alive.
        self._pools: list[ProcessPoolExecutor] = []
        weakref.finalize(self, _shut_down, self._pools)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Return the future result of an importable function; its arguments must be picklable."""
        if self.num_workers == 0:
            future: Future[T] = Future()
            try:
                future.set_result(function(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)
            return future
        with self._lock:
            if not self._pools:
                self._pools.append(ProcessPoolExecutor(self.num_workers, _context(), _start_reader))
            return self._pools[0].submit(function, *args, **kwargs)

    def result(self, future: Future[T]) -> T:
        """Wait for a future; return its result or raise its exception.

        Raises:
            RuntimeError: a process has died.
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
        """End the processes; the next call starts new ones."""
        with self._lock:
            _shut_down(self._pools)

    def __reduce__(self) -> tuple[type[ReaderPool], tuple[int]]:
        return ReaderPool, (self.num_workers,)


def _shut_down(pools: list[ProcessPoolExecutor]) -> None:
    while pools:
        pools.pop().shutdown(wait=True, cancel_futures=True)


def _context() -> multiprocessing.context.BaseContext:
    if mpi_runs():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision.io", "dcl_lightning.data.decode"])
        return context
    import torchvision.io  # noqa: F401 (once here instead of in each forked process)

    return multiprocessing.get_context()


def _start_reader() -> None:
    torch.set_num_threads(1)
    # The whole job receives these signals; the parent decides what follows.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    # Without this, readers of a killed parent wait at the pool's queue forever. A forked reader then has another
    # parent id; a reader of a fork server keeps the server's, but its pipe to the parent closes.
    process = multiprocessing.parent_process()
    while os.getppid() == parent and process is not None and process.is_alive():
        process.join(1)
    os._exit(1)


class ImageFiles:
    """The images of a split, in place of a tensor ``(n, 3, size, size)`` uint8.

    All processes of the pool share each batch, so that the first batch of a task comes as fast as any other.

    Args:
        folder: folder of the files.
        names: n file names relative to the folder.
        size: side in pixels of an image as the network sees it.
        resize: length of the shorter side before evaluation's center crop; ``size`` x 256 / 224 if None.
        random_crop: whether training takes random crops of 8 to 100 % of the area instead of evaluation's crop.

    Attributes:
        reader_pool: the processes that read; none unless a data module sets its own pool.
    """

    dtype = torch.uint8

    def __init__(
        self, folder: str, names: Sequence[str], size: int, *, resize: int | None = None, random_crop: bool = True
    ) -> None:
        self.folder, self.size, self.random_crop = folder, size, random_crop
        self.resize = resize if resize is not None else round(size * 256 / 224)
        # One array: access to a million strings would copy each into every forked process.
        self._names = np.array([os.fsencode(name) for name in names], dtype=bytes)
        self.reader_pool = ReaderPool(0)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(n, 3, size, size)``."""
        return len(self), 3, self.size, self.size

    def path(self, row: int) -> str:
        """Return the file of the image at a 0-based row."""
        return os.path.join(self.folder, os.fsdecode(self._names[row]))

    def fill(
        self, batches: Iterable[Batch], key: tuple[int, int] | None = None, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches in their order with inputs ``(B, 3, size, size)`` uint8.

        Args:
            batches: batches with ``sample_ids`` and ``draw_ids``.
            key: seed and epoch of training's crops; None for evaluation's crop.
            pin_memory: whether inputs lie in page-locked memory, from which a GPU copies asynchronously.

        Raises:
            DataError: an image that cannot be read; the message names its file.
        """
        key = key if self.random_crop else None
        waiting: deque[tuple[Batch, list[Future[Tensor]]]] = deque()
        ahead = _PREFETCHED_BATCHES if self.reader_pool.num_workers else 0
        try:
            for batch in batches:
                waiting.append((batch, self._request(batch.sample_ids, batch.draw_ids, key)))
                if len(waiting) > ahead:
                    yield self._filled(*waiting.popleft(), pin_memory)
            while waiting:
                yield self._filled(*waiting.popleft(), pin_memory)
        finally:
            for _, parts in waiting:
                for part in parts:
                    part.cancel()

    def read(self, rows: Tensor, epochs: Tensor, seed: int, draw_ids: Tensor) -> Tensor:
        """Return images ``(n, 3, size, size)`` uint8 as they were in earlier epochs.

        Args:
            rows: ``(n,)`` int64.
            epochs: ``(n,)`` int64, the epoch of each random crop; ``AS_EVALUATED`` for evaluation's crop.
            seed: seed of the crops.
            draw_ids: ``(n,)`` int64, by which each crop was drawn.
        """
        images = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
        requests = []
        for epoch in epochs.unique().tolist():
            places = torch.nonzero(epochs == epoch).flatten()
            key = (seed, epoch) if epoch >= 0 and self.random_crop else None
            requests.append((places, self._request(rows[places], draw_ids[places], key)))
        for places, parts in requests:
            images[places] = torch.cat([self.reader_pool.result(part) for part in parts])
        return images

    def _request(self, ids: Tensor, draws: Tensor, key: tuple[int, int] | None) -> list[Future[Tensor]]:
        paths, draw_ids = [self.path(row) for row in ids.tolist()], draws.tolist()
        step = -(-len(paths) // max(1, self.reader_pool.num_workers)) or 1
        return [
            self.reader_pool.submit(
                read_images, paths[low : low + step], self.size, self.resize, key, draw_ids[low : low + step]
            )
            for low in range(0, len(paths), step)
        ]

    def _filled(self, batch: Batch, parts: list[Future[Tensor]], pin_memory: bool) -> Batch:
        inputs = torch.empty((len(batch.sample_ids), *self.shape[1:]), dtype=torch.uint8, pin_memory=pin_memory)
        if parts:
            torch.cat([self.reader_pool.result(part) for part in parts], out=inputs)
        return batch._replace(inputs=inputs)
