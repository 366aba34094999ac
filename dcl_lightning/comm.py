"""Collective operations, for one process and for torch.distributed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = [
    "Comm",
    "Pending",
    "ReduceOp",
    "RowComm",
    "SingleProcessComm",
    "TorchDistributedComm",
    "allgather_text",
    "comm_of",
    "raise_together",
    "used_here",
]

ReduceOp = Literal["sum", "mean", "min", "max"]
_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip
# What both backends reduce as it is; the rest travels in a wider type and comes back in its own.
_REDUCIBLE = (torch.int32, torch.int64, torch.float32, torch.float64)
_MAX_DIMS = 8


class Pending(Protocol):
    """An operation that was started and is not waited for yet."""

    def wait(self) -> Tensor:
        """Return the rows received, worker 0's first, or raise what went wrong; call it once."""
        ...


class Comm(Protocol):
    """Collective operations; every worker calls the same ones in the same order."""

    @property
    def rank(self) -> int:
        """0-based number of this worker."""
        ...

    @property
    def size(self) -> int:
        """Number of workers."""
        ...

    def allreduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Return a new tensor, reduced over workers; integer means are computed in float64."""
        ...

    def allgather(self, tensor: Tensor) -> list[Tensor]:
        """Return every worker's tensor; first dimensions may differ, any dtype, also empty."""
        ...

    def alltoall_async(self, tensor: Tensor, splits: list[int], received: list[int], name: str) -> Pending:
        """Start to send ``splits[k]`` rows to worker k and to receive ``received[k]`` from it.

        Nothing but the rows travels: all counts are known beforehand. The tensor must stay as it is
        until it is waited for.

        Args:
            tensor: contiguous uint8 ``(n, row bytes)``, the rows for worker 0 first.
            splits: one count per worker, together all rows.
            received: one count per worker, equal to what that worker sends here.
            name: the same at every step and on every worker; it may be pending once.
        """
        ...

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return worker ``src``'s tensor, same shape and dtype on all."""
        ...

    def barrier(self) -> None:
        """Return once every worker has called it."""
        ...


def check_async_rows(rank: int, size: int, tensor: Tensor, splits: list[int], received: list[int]) -> None:
    """Raise ``ValueError`` if these cannot be the arguments of ``Comm.alltoall_async``.

    Args:
        rank: 0-based number of this worker.
        size: number of workers.
        tensor: the rows to send.
        splits: rows for each worker.
        received: rows from each worker.
    """
    if tensor.dtype != torch.uint8 or tensor.ndim != 2 or not tensor.shape[1] or not tensor.is_contiguous():
        raise ValueError(f"give contiguous uint8 rows (n, row bytes), not {tensor.dtype} {list(tensor.shape)}")
    if len(splits) != size or sum(splits) != tensor.shape[0] or min(splits) < 0:
        raise ValueError(f"splits {splits}: give {size} counts that add up to the {tensor.shape[0]} rows")
    if len(received) != size or min(received) < 0 or received[rank] != splits[rank]:
        raise ValueError(
            f"received {received}: give {size} counts, for worker {rank} the {splits[rank]} it sends itself"
        )


@dataclass(frozen=True)
class _Here:
    """What was sent is here already.

    Args:
        rows: what ``wait`` returns.
    """

    rows: Tensor

    def wait(self) -> Tensor:
        """Return the rows."""
        return self.rows


class SingleProcessComm:
    """The cluster of one worker."""

    rank = 0
    size = 1

    def allreduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Return a copy; means of integers are float64, as over several workers."""
        if op == "mean" and not tensor.is_floating_point():
            return tensor.double()
        return tensor.clone()

    def allgather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensor alone."""
        return [tensor]

    def alltoall_async(self, tensor: Tensor, splits: list[int], received: list[int], name: str) -> Pending:
        """Return what gives the tensor back."""
        check_async_rows(0, 1, tensor, splits, received)
        return _Here(tensor)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return the tensor."""
        return tensor

    def barrier(self) -> None:
        """Do nothing."""


class _Started:
    """An operation on its way; keeps what it sends alive, and its name taken, until it is waited for.

    Args:
        finish: waits and returns the result.
        release: gives the name free.
    """

    def __init__(self, finish: Callable[[], Tensor], release: Callable[[], None]) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._release = release

    def wait(self) -> Tensor:
        """Return the rows received, or raise what went wrong."""
        finish, self._finish = self._finish, None
        if finish is None:
            raise RuntimeError("this operation was waited for before")
        try:
            return finish()
        finally:
            self._release()


class RowComm(ABC):
    """Moves rows of bytes, after all workers have told each other what they hold.

    Args:
        rank: 0-based number of this worker.
        size: number of workers.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._taken: set[str] = set()

    @property
    def rank(self) -> int:
        """0-based number of this worker."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of workers."""
        return self._size

    def allreduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Return a new tensor, reduced over workers; integer means are float64.

        Args:
            tensor: same shape and dtype on all workers.
            op: ``sum``, ``mean``, ``min`` or ``max``.
        """
        if op not in ("sum", "mean", "min", "max"):
            raise ValueError(f"op={op!r}: give sum, mean, min or max")
        value = tensor.detach()
        if op == "mean" and not (value.is_floating_point() or value.is_complex()):
            value = value.double()
        dtype = value.dtype
        if dtype not in _REDUCIBLE:
            value = value.to(torch.float32 if value.is_floating_point() else torch.int64)
        if value.numel():
            flat = value.contiguous().reshape(-1)
            value = self._reduce(flat, "sum" if op == "mean" else op).reshape(value.shape)
        if op == "mean":
            value = value / self.size
        value = value.to(dtype)
        return value.clone() if value.data_ptr() == tensor.data_ptr() else value

    def allgather(self, tensor: Tensor) -> list[Tensor]:
        """Return every worker's tensor.

        Args:
            tensor: first dimensions may differ; the others and the dtype must agree where there are
                rows. An empty tensor takes them from a worker that has rows.
        """
        if tensor.ndim == 0:
            return [rows[0] for rows in self.allgather(tensor.reshape(1))]
        table = self._table(tensor)
        value = _adopt(table, tensor.detach())
        counts = [row[0] for row in table]
        if not _row_bytes(value) or not sum(counts):
            return [value.new_empty((count, *value.shape[1:])) for count in counts]
        return [_from_bytes(part, value) for part in self._gather(_as_bytes(value), counts).split(counts)]

    def alltoall_async(self, tensor: Tensor, splits: list[int], received: list[int], name: str) -> Pending:
        """Start to send ``splits[k]`` rows to worker k and to receive ``received[k]`` from it.

        Args:
            tensor: contiguous uint8 ``(n, row bytes)``, the rows for worker 0 first; it must stay as
                it is until it is waited for.
            splits: one count per worker, together all rows.
            received: one count per worker, equal to what that worker sends here.
            name: the same at every step and on every worker; it may be pending once. Under
                torch.distributed several names must be started in the same order on every worker.
        """
        check_async_rows(self.rank, self.size, tensor, splits, received)
        if name in self._taken:
            raise RuntimeError(f"{name} is pending: wait for it before it is started again")
        finish = self._start(tensor.detach(), splits, received, name)
        self._taken.add(name)
        return _Started(finish, lambda: self._taken.discard(name))

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return worker ``src``'s tensor.

        Args:
            tensor: same shape and dtype on all workers.
            src: the worker whose values count.
        """
        value = tensor.detach()
        if not value.numel():
            return value.clone()
        return _from_bytes(self._send(_as_bytes(value.reshape(1, *value.shape)), src), value[None])[0]

    def _table(self, tensor: Tensor) -> list[list[int]]:
        """Return every worker's number of rows, dtype and shape of a row."""
        shape = tensor.shape[1:]
        if len(shape) > _MAX_DIMS or tensor.dtype not in _DTYPES:
            raise ValueError(f"cannot send {tensor.dtype} with {tensor.ndim} dimensions")
        padding = [0] * (_MAX_DIMS - len(shape))
        mine = [tensor.shape[0], _DTYPES.index(tensor.dtype), len(shape), *shape, *padding]
        packed = torch.tensor(mine, dtype=torch.int64).view(torch.uint8)[None]
        return self._gather(packed, [1] * self.size).cpu().view(torch.int64).tolist()

    @abstractmethod
    def _reduce(self, flat: Tensor, op: str) -> Tensor: ...

    @abstractmethod
    def _gather(self, data: Tensor, counts: list[int]) -> Tensor: ...

    @abstractmethod
    def _start(self, data: Tensor, splits: list[int], received: list[int], name: str) -> Callable[[], Tensor]: ...

    @abstractmethod
    def _send(self, data: Tensor, src: int) -> Tensor: ...

    @abstractmethod
    def barrier(self) -> None:
        """Return once every worker has called it."""


class TorchDistributedComm(RowComm):
    """Collectives through torch.distributed's default group; asynchronous ones through a group of their own.

    torch.distributed matches the operations of a group by their order, so what a second thread starts
    needs another group than what the first one runs. It is made, by all workers together, when the
    first asynchronous operation starts.
    """

    def __init__(self) -> None:
        super().__init__(torch.distributed.get_rank(), torch.distributed.get_world_size())
        self._backend = torch.distributed.get_backend()
        self._own_group: Any = None

    def _wire(self, tensor: Tensor) -> Tensor:
        """Return the tensor where the backend can reach it: NCCL knows CUDA memory alone."""
        if self._backend == "nccl":
            return tensor.cuda()
        return tensor.cpu() if self._backend == "gloo" else tensor

    def _reduce(self, flat: Tensor, op: str) -> Tensor:
        ops = torch.distributed.ReduceOp
        value = self._wire(flat).clone()
        torch.distributed.all_reduce(value, op={"sum": ops.SUM, "min": ops.MIN, "max": ops.MAX}[op])
        return value.to(flat.device)

    def _gather(self, data: Tensor, counts: list[int]) -> Tensor:
        sent = self._wire(data)
        padded = sent.new_zeros((max(counts), *sent.shape[1:]))
        padded[: len(sent)] = sent
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(data.device)

    def _start(self, data: Tensor, splits: list[int], received: list[int], name: str) -> Callable[[], Tensor]:
        if self._own_group is None:
            self._own_group = torch.distributed.new_group(backend=self._backend)
        sent = self._wire(data)
        out = sent.new_empty((sum(received), sent.shape[1]))
        work = torch.distributed.all_to_all_single(out, sent, received, splits, group=self._own_group, async_op=True)
        assert work is not None

        def finish(sent: Tensor = sent) -> Tensor:
            work.wait()
            used_here(out)
            return out.to(data.device)

        return finish

    def _send(self, data: Tensor, src: int) -> Tensor:
        value = self._wire(data).clone()
        torch.distributed.broadcast(value, src)
        return value.to(data.device)

    def barrier(self) -> None:
        """Return once every worker has called it."""
        torch.distributed.barrier()


def comm_of(strategy: Any) -> Comm:
    """Return the cluster as a Lightning strategy knows it.

    Args:
        strategy: the trainer's strategy; its attribute ``comm`` is taken if it has one, else
            torch.distributed if that runs with several workers, else one process.
    """
    comm: Comm | None = getattr(strategy, "comm", None)
    if comm is not None:
        return comm
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return TorchDistributedComm()
    return SingleProcessComm()


def allgather_text(comm: Comm, text: str) -> list[str]:
    """Return every worker's text.

    Args:
        comm: the cluster; every worker calls this.
        text: this worker's.
    """
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
    return [bytes(part.tolist()).decode() for part in comm.allgather(mine)]


def raise_together(comm: Comm, error: str, kind: type[Exception]) -> None:
    """Raise on all workers if one has an error.

    Args:
        comm: the cluster; every worker calls this.
        error: this worker's; empty if it has none.
        kind: what is raised, with the first worker's error.
    """
    errors = [text for text in allgather_text(comm, error) if text]
    if errors:
        raise kind(errors[0])


def used_here(rows: Tensor) -> None:
    """Tell the allocator that what an operation's own stream made is used on the present one.

    It would give the memory away, once the tensor is dropped, while kernels queued here have not read it yet.
    """
    if rows.is_cuda:
        rows.record_stream(torch.cuda.current_stream(rows.device))


def _adopt(table: list[list[int]], tensor: Tensor) -> Tensor:
    """Return the tensor; an empty one in the dtype and row shape of a worker that has rows."""
    kinds = [(row[1], tuple(row[3 : 3 + row[2]])) for row in table]
    filled = {kind for kind, row in zip(kinds, table, strict=True) if row[0]}
    if len(filled) > 1:
        words = sorted(f"{_DTYPES[dtype]} {list(shape)}" for dtype, shape in filled)
        raise ValueError(f"the workers' rows differ in dtype or shape: {', '.join(words)}")
    # Nobody has rows: the first of those with the most dimensions, so that all workers agree.
    dtype, shape = filled.pop() if filled else max(kinds, key=lambda kind: len(kind[1]))
    return tensor if len(tensor) else tensor.new_empty((0, *shape), dtype=_DTYPES[dtype])


def _row_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return rows of bytes ``(n, row bytes)``: every dtype travels, bool and bfloat16 too."""
    if not tensor.numel():
        return tensor.new_empty((tensor.shape[0], _row_bytes(tensor)), dtype=torch.uint8)
    return tensor.contiguous().view(tensor.shape[0], -1).view(torch.uint8)


def _from_bytes(data: Tensor, like: Tensor) -> Tensor:
    if not data.numel():
        return like.new_empty((data.shape[0], *like.shape[1:]))
    return data.contiguous().view(like.dtype).view(-1, *like.shape[1:])
