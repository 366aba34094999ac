"""All that memory, data and metrics know of the cluster, and its form for one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

__all__ = ["Comm", "Pending", "ReduceOp", "SingleProcessComm", "check_async_rows"]

ReduceOp = Literal["sum", "mean", "min", "max"]


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

    def alltoall(self, tensor: Tensor, splits: list[int]) -> tuple[Tensor, list[int]]:
        """Send ``splits[k]`` rows to worker k; return the rows received and how many from each."""
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

    def alltoall(self, tensor: Tensor, splits: list[int]) -> tuple[Tensor, list[int]]:
        """Return the tensor and its number of rows."""
        if splits != [tensor.shape[0]]:
            raise ValueError(f"splits {splits} must be [{tensor.shape[0]}], the number of rows")
        return tensor, splits

    def alltoall_async(self, tensor: Tensor, splits: list[int], received: list[int], name: str) -> Pending:
        """Return what gives the tensor back."""
        check_async_rows(0, 1, tensor, splits, received)
        return _Here(tensor)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return the tensor."""
        return tensor

    def barrier(self) -> None:
        """Do nothing."""
