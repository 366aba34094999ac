"""Collective operations, for one process and for torch.distributed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = [
    "Comm",
    "Pending",
    "ReduceOp",
    "RowComm",
    "SingleProcessComm",
    "TorchDistributedComm",
    "allgather_text",
    "broadcast_buffers",
    "broadcast_tensors",
    "comm_of",
    "gather_rows",
    "is_parted",
    "own_part",
    "part_of",
    "raise_together",
    "sum_async",
    "used_here",
    "whole",
]

ReduceOp = Literal["sum", "mean", "min", "max"]
_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip
# Both backends reduce these; other dtypes travel in a wider one and come back in their own.
_REDUCIBLE = (torch.int32, torch.int64, torch.float32, torch.float64)
_MAX_DIMS = 8
_MESSAGE_BYTES = 32 << 20  # of broadcast_tensors: bounds the copies, and is large enough to hide the latency


class Pending(Protocol):
    """An asynchronous operation."""

    def wait(self) -> Tensor:
        """Return the rows received, worker 0's first, or raise the operation's error; call it once."""
        ...


class Comm(Protocol):
    """Collective operations; every worker calls the same ones in the same order."""

    @property
    def rank(self) -> int:
        """0-based rank of this worker."""
        ...

    @property
    def size(self) -> int:
        """Number of workers."""
        ...

    def allreduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Return a new tensor, reduced over workers, which give the same shape and dtype; integer means are float64."""
        ...

    def allgather(self, tensor: Tensor) -> list[Tensor]:
        """Return every worker's tensor, of any dtype.

        First dimensions may differ. The others and the dtype must agree between workers that have rows; an empty tensor
        takes them over from a worker that has rows.
        """
        ...

    def prepare_async(self) -> None:
        """Make what asynchronous operations need; else the first of them does.

        Every worker calls it at the same place among its other operations, if another thread will start the first one:
        torch.distributed numbers groups as they are made, and threads make them in another order on each worker.
        """
        ...

    def alltoall_async(self, tensor: Tensor, splits: list[int], received: list[int], name: str) -> Pending:
        """Start to send ``splits[k]`` rows to worker k and to receive ``received[k]`` rows from it.

        Only rows travel, because all counts are known beforehand.

        Args:
            tensor: contiguous uint8 ``(n, row bytes)``, the rows for worker 0 first; unchanged from now on.
            splits: one count per worker, adding up to n.
            received: one count per worker, equal to the number of rows that it sends to this worker.
            name: the same at every step and on every worker; at most one operation of a name may be pending. Under
                torch.distributed every worker must start operations of several names in the same order.
        """
        ...

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return worker ``src``'s tensor, same shape and dtype on all."""
        ...

    def barrier(self) -> None:
        """Return once every worker has called it."""
        ...


def check_async_rows(rank: int, size: int, tensor: Tensor, splits: list[int], received: list[int]) -> None:
    """Raise ``ValueError`` if worker ``rank`` of ``size`` cannot give these arguments to ``Comm.alltoall_async``."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 2 or not tensor.shape[1] or not tensor.is_contiguous():
        raise ValueError(f"give contiguous uint8 rows (n, row bytes), not {tensor.dtype} {list(tensor.shape)}")
    if len(splits) != size or sum(splits) != tensor.shape[0] or min(splits) < 0:
        raise ValueError(f"splits {splits}: give {size} counts that add up to the {tensor.shape[0]} rows")
    if len(received) != size or min(received) < 0 or received[rank] != splits[rank]:
        raise ValueError(
            f"received {received}: give {size} counts, for worker {rank} the {splits[rank]} it sends itself"
        )


class _Started:
    """A pending operation, which keeps the sent tensor alive and the name taken until ``wait``."""

    def __init__(self, finish: Callable[[], Tensor], release: Callable[[], None] = lambda: None) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._release = release

    def wait(self) -> Tensor:
        finish, self._finish = self._finish, None
        if finish is None:
            raise RuntimeError("wait() was already called on this operation")
        try:
            return finish()
        finally:
            self._release()


class SingleProcessComm:
    """A cluster of one worker."""

    rank = 0
    size = 1

    def allreduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Return a copy; means of integers are float64."""
        if op == "mean" and not tensor.is_floating_point():
            return tensor.double()
        return tensor.clone()

    def allgather(self, tensor: Tensor) -> list[Tensor]:
        """Return a list of the tensor."""
        return [tensor]

    def prepare_async(self) -> None:
        """Do nothing."""

    def alltoall_async(self, tensor: Tensor, splits: list[int], received: list[int], name: str) -> Pending:
        """Return a completed operation with the same rows."""
        check_async_rows(0, 1, tensor, splits, received)
        return _Started(lambda: tensor)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return the tensor."""
        return tensor

    def barrier(self) -> None:
        """Do nothing."""


class RowComm(ABC):
    """A ``Comm`` whose workers first exchange shapes and dtypes, and then move rows of bytes.

    Subclasses implement the four operations on bytes, and ``barrier``.

    Args:
        rank: 0-based rank of this worker.
        size: number of workers.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._taken: set[str] = set()

    def allreduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Return a new tensor, reduced over workers; integer means are float64."""
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
        """Return every worker's tensor; see ``Comm.allgather``."""
        if tensor.ndim == 0:
            return [rows[0] for rows in self.allgather(tensor.reshape(1))]
        table = self._table(tensor)
        value = _adopt(table, tensor.detach())
        counts = [row[0] for row in table]
        if not _row_bytes(value) or not sum(counts):
            return [value.new_empty((count, *value.shape[1:])) for count in counts]
        return [_from_bytes(part, value) for part in self._gather(_as_bytes(value), counts).split(counts)]

    def alltoall_async(self, tensor: Tensor, splits: list[int], received: list[int], name: str) -> Pending:
        """Start an all-to-all of rows; see ``Comm.alltoall_async``."""
        check_async_rows(self.rank, self.size, tensor, splits, received)
        if name in self._taken:
            raise RuntimeError(f"{name} is pending: wait for it before starting it again")
        finish = self._start(tensor.detach(), splits, received, name)
        self._taken.add(name)
        return _Started(finish, lambda: self._taken.discard(name))

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return worker ``src``'s tensor; see ``Comm.broadcast``."""
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
    def prepare_async(self) -> None:
        """Make what asynchronous operations need; see ``Comm.prepare_async``."""

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
    """Collectives through torch.distributed's default group, and asynchronous ones through a second group.

    torch.distributed matches the operations of a group by their order, so operations that another thread starts need
    their own group. All workers create it in ``prepare_async``, or when the first asynchronous operation starts.
    """

    def __init__(self) -> None:
        super().__init__(torch.distributed.get_rank(), torch.distributed.get_world_size())
        self._backend = torch.distributed.get_backend()
        self._async_group: torch.distributed.ProcessGroup | None = None

    def _wire(self, tensor: Tensor) -> Tensor:
        """Return the tensor on a device that the backend can use: NCCL transfers CUDA tensors only."""
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

    def prepare_async(self) -> None:
        """Create the second group."""
        if self._async_group is None:
            group = torch.distributed.new_group(backend=self._backend)
            assert isinstance(group, torch.distributed.ProcessGroup)  # all workers are members
            self._async_group = group

    def _start(self, data: Tensor, splits: list[int], received: list[int], name: str) -> Callable[[], Tensor]:
        self.prepare_async()
        sent = self._wire(data)
        out = sent.new_empty((sum(received), sent.shape[1]))
        work = torch.distributed.all_to_all_single(out, sent, received, splits, group=self._async_group, async_op=True)
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


def comm_of(strategy: object) -> Comm:
    """Return the cluster of a Lightning strategy.

    Args:
        strategy: its attribute ``comm`` is used if it has one; otherwise torch.distributed, if that runs with several
            workers, or a single process.
    """
    comm: Comm | None = getattr(strategy, "comm", None)
    if comm is not None:
        return comm
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return TorchDistributedComm()
    return SingleProcessComm()


def broadcast_buffers(module: nn.Module, comm: Comm) -> None:
    """Overwrite a module's buffers with worker 0's, since running statistics of batch normalization are per worker.

    ddp does so at each step. But training does not depend on them, so before each validation and at the end of each
    task is enough.
    """
    broadcast_tensors(module.buffers(), comm)


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor], comm: Comm) -> None:
    """Overwrite tensors with worker 0's values, many in one message.

    ``horovod.torch.broadcast_parameters`` would refuse bool, bfloat16 and channels-last tensors.

    Args:
        tensors: same shapes and dtypes in the same order on all workers.
        comm: the cluster.
    """
    if comm.size == 1:
        return
    batches: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        size += tensor.nbytes
        like = batches and (batches[-1][0].dtype, batches[-1][0].device) == (tensor.dtype, tensor.device)
        if not like or size > _MESSAGE_BYTES:
            batches.append([])
            size = tensor.nbytes
        batches[-1].append(tensor)
    for batch in batches:
        values = comm.broadcast(torch.cat([tensor.reshape(-1) for tensor in batch]))
        for tensor, value in zip(batch, values.split([tensor.numel() for tensor in batch]), strict=True):
            tensor.copy_(value.view(tensor.shape))


def sum_async(tensor: Tensor, comm: Comm, name: str) -> Callable[[], Tensor]:
    """Start to add up a small tensor over the workers; return what waits for the sum, the same bits on all workers.

    Args:
        tensor: same shape and dtype on all workers.
        comm: the cluster.
        name: as for ``Comm.alltoall_async``.
    """
    sent = tensor.contiguous().view(-1).view(torch.uint8)[None].repeat(comm.size, 1)
    one_each = [1] * comm.size
    pending = comm.alltoall_async(sent, one_each, one_each, name)
    return lambda: pending.wait().contiguous().view(tensor.dtype).view(comm.size, *tensor.shape).sum(0)


def gather_rows(rows: Tensor, comm: Comm) -> tuple[Tensor, slice]:
    """Return the rows of all workers, through which gradients reach the worker that a row is from.

    Every worker calls it, and computes a gradient of its result. That of a row is the sum over the workers: where each
    has a loss, the gradient is that of the sum of all losses.

    Args:
        rows: ``(n, ...)`` floating; only n may differ between workers.
        comm: the cluster.

    Returns:
        The rows, worker 0's first, and which of them are this worker's.
    """
    if comm.size == 1:
        return rows, slice(None)
    gathered, first = _GatheredRows.apply(rows, comm)
    return gathered, slice(first, first + len(rows))


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, comm: Comm) -> tuple[Tensor, int]:
        parts = comm.allgather(rows)
        ctx.comm, ctx.first, ctx.count = comm, sum(map(len, parts[: comm.rank])), len(rows)
        return torch.cat(parts), ctx.first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: object) -> tuple[Tensor, None]:
        # Before any gradient of a weight, all of which depend on it: their averaging has not begun.
        return ctx.comm.allreduce(gradient).narrow(0, ctx.first, ctx.count), None


def allgather_text(comm: Comm, text: str) -> list[str]:
    """Return every worker's text; every worker calls this."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
    return [bytes(part.tolist()).decode() for part in comm.allgather(mine)]


def raise_together(comm: Comm, error: str, kind: type[Exception]) -> None:
    """Raise on all workers if one has an error.

    Args:
        comm: the cluster; every worker calls this.
        error: this worker's message; empty if it has none.
        kind: class of the exception, which gets the message of the lowest rank that has one.
    """
    errors = [text for text in allgather_text(comm, error) if text]
    if errors:
        raise kind(errors[0])


def used_here(rows: Tensor) -> None:
    """Tell the CUDA allocator that rows made on an operation's own stream are used on the present stream.

    Otherwise it could reuse their memory, once the tensor is freed, before kernels queued here have read it.
    """
    if rows.is_cuda:
        rows.record_stream(torch.cuda.current_stream(rows.device))


def _adopt(table: list[list[int]], tensor: Tensor) -> Tensor:
    """Return the tensor; an empty one with the dtype and row shape of a worker that has rows."""
    kinds = [(row[1], tuple(row[3 : 3 + row[2]])) for row in table]
    filled = {kind for kind, row in zip(kinds, table, strict=True) if row[0]}
    if len(filled) > 1:
        words = sorted(f"{_DTYPES[dtype]} {list(shape)}" for dtype, shape in filled)
        raise ValueError(f"the workers' rows differ in dtype or shape: {', '.join(words)}")
    # If no worker has rows, the first kind with the most dimensions, so that all workers agree.
    dtype, shape = filled.pop() if filled else max(kinds, key=lambda kind: len(kind[1]))
    return tensor if len(tensor) else tensor.new_empty((0, *shape), dtype=_DTYPES[dtype])


def _row_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return the rows as bytes ``(n, row bytes)``, since the backends do not transfer every dtype."""
    if not tensor.numel():
        return tensor.new_empty((tensor.shape[0], _row_bytes(tensor)), dtype=torch.uint8)
    return tensor.contiguous().view(tensor.shape[0], -1).view(torch.uint8)


def _from_bytes(data: Tensor, like: Tensor) -> Tensor:
    if not data.numel():
        return like.new_empty((data.shape[0], *like.shape[1:]))
    return data.contiguous().view(like.dtype).view(-1, *like.shape[1:])


# -- tensors of which each worker has a part, PyTorch's DTensor --------------------------------------------------------


def is_parted(tensor: Tensor) -> bool:
    """Return whether workers have parts of a tensor, as of weights under ``strategy="fsdp2"``."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that workers may have in parts; if they have, every worker calls it."""
    untyped: Any = tensor
    return untyped.full_tensor() if is_parted(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return this worker's part of a tensor, which shares its memory; the tensor itself if it is whole."""
    untyped: Any = tensor
    return untyped.to_local() if is_parted(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the same parts as another one, without a message; unchanged if that is whole.

    Args:
        tensor: whole, the same on all workers, with as many rows as the other one.
        like: the other one.
    """
    if not is_parted(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # of PyTorch 2.5

    parts: Any = like
    return distribute_tensor(tensor.to(like.device), parts.device_mesh, parts.placements, src_data_rank=None)
