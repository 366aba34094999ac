"""All that memory, data and metrics know of the cluster, and its form for one process."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

__all__ = ["Comm", "ReduceOp", "SingleProcessComm"]

ReduceOp = Literal["sum", "mean", "min", "max"]


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

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return worker ``src``'s tensor, same shape and dtype on all."""
        ...

    def barrier(self) -> None:
        """Return once every worker has called it."""
        ...


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

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return the tensor."""
        return tensor

    def barrier(self) -> None:
        """Do nothing."""
