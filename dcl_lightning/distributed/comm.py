"""The cluster under Horovod and under torch.distributed, as the ``Comm`` of ``memory/comm.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcl_lightning.memory.comm import Comm, ReduceOp, SingleProcessComm

__all__ = ["HorovodComm", "TorchDistributedComm", "comm_of"]


def comm_of(strategy: Any) -> Comm:
    """Return the cluster as a Lightning strategy knows it: its ``comm``, torch.distributed, or one process."""
    comm: Comm | None = getattr(strategy, "comm", None)
    if comm is not None:
        return comm
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return TorchDistributedComm()
    return SingleProcessComm()


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return rows of bytes ``(n, row bytes)``: every dtype travels, bool and bfloat16 too."""
    rows = tensor.detach().contiguous()
    if rows.numel() == 0:
        return torch.empty(rows.shape[0], 0, dtype=torch.uint8, device=rows.device)
    return rows.view(rows.shape[0], -1).view(torch.uint8)


def _from_bytes(data: Tensor, like: Tensor) -> Tensor:
    if data.numel() == 0:
        return like.new_empty((data.shape[0], *like.shape[1:]))
    return data.contiguous().view(like.dtype).view(-1, *like.shape[1:])


class HorovodComm:
    """Collectives through Horovod, which matches operations by name.

    Args:
        stream: prefix of the names; two streams may be in use by two threads at once.
    """

    def __init__(self, stream: str = "comm") -> None:
        import horovod.torch as hvd

        self._hvd = hvd
        self._stream = stream

    @property
    def rank(self) -> int:
        """0-based number of this worker."""
        return int(self._hvd.rank())

    @property
    def size(self) -> int:
        """Number of workers."""
        return int(self._hvd.size())

    def _name(self, what: str) -> str:
        # Every operation here is waited for, so a name is free again when it is used again.
        return f"{self._stream}.{what}"

    def allreduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Return a new tensor, reduced over workers; integer means are float64, bfloat16 goes through float32."""
        value = tensor.detach().contiguous()
        if op == "mean" and not value.is_floating_point():
            value = value.double()
        dtype = value.dtype
        if dtype in (torch.bfloat16, torch.bool, torch.uint8):
            value = value.to(torch.float32 if dtype == torch.bfloat16 else torch.int64)
        shape = value.shape
        kind = {"sum": self._hvd.Sum, "mean": self._hvd.Sum, "min": self._hvd.Min, "max": self._hvd.Max}[op]
        result = self._hvd.allreduce(value.reshape(-1), op=kind, name=self._name("allreduce")).reshape(shape)
        return (result / self.size if op == "mean" else result).to(dtype)

    def allgather(self, tensor: Tensor) -> list[Tensor]:
        """Return every worker's tensor; all but the first dimension must agree."""
        value = tensor.detach()
        if value.ndim == 0:
            return [t[0] for t in self.allgather(value.reshape(1))]
        counts = self._hvd.allgather(torch.tensor([value.shape[0]], dtype=torch.int64), name=self._name("counts"))
        width = _row_bytes(value)
        data = _as_bytes(value) if value.numel() else value.new_empty((value.shape[0], width), dtype=torch.uint8)
        gathered = self._hvd.allgather(data, name=self._name("allgather"))
        return [_from_bytes(part, value) for part in gathered.split(counts.tolist())]

    def alltoall(self, tensor: Tensor, splits: list[int]) -> tuple[Tensor, list[int]]:
        """Send ``splits[k]`` rows to worker k; return the rows received and how many came from each."""
        _check_splits(splits, tensor, self.size)
        data = _as_bytes(tensor) if tensor.numel() else tensor.new_empty((0, _row_bytes(tensor)), dtype=torch.uint8)
        wanted = torch.tensor(splits, dtype=torch.int32)
        out, received = self._hvd.alltoall(data, splits=wanted, name=self._name("alltoall"))
        return _from_bytes(out, tensor), received.tolist()

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return worker ``src``'s tensor."""
        value = tensor.detach().reshape(1, *tensor.shape)
        if not value.numel():
            return tensor.detach().clone()
        data = self._hvd.broadcast(_as_bytes(value), root_rank=src, name=self._name("broadcast"))
        return _from_bytes(data, value)[0]

    def barrier(self) -> None:
        """Return once every worker has called it."""
        self._hvd.barrier()


class TorchDistributedComm:
    """Collectives through torch.distributed's default group."""

    @property
    def rank(self) -> int:
        """0-based number of this worker."""
        return torch.distributed.get_rank()

    @property
    def size(self) -> int:
        """Number of workers."""
        return torch.distributed.get_world_size()

    def allreduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Return a new tensor, reduced over workers; integer means are float64."""
        value = tensor.detach().clone()
        if op == "mean" and not value.is_floating_point():
            value = value.double()
        ops = torch.distributed.ReduceOp
        kind = {"sum": ops.SUM, "mean": ops.SUM, "min": ops.MIN, "max": ops.MAX}[op]
        torch.distributed.all_reduce(value, op=kind)
        return value / self.size if op == "mean" else value

    def allgather(self, tensor: Tensor) -> list[Tensor]:
        """Return every worker's tensor; all but the first dimension must agree."""
        value = tensor.detach()
        if value.ndim == 0:
            return [t[0] for t in self.allgather(value.reshape(1))]
        counts = self._counts(value.shape[0], value.device)
        padded = value.new_zeros((max(counts), *value.shape[1:]))
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def _counts(self, count: int, device: torch.device) -> list[int]:
        mine = torch.tensor([count], device=device)
        counts = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(counts, mine)
        return [int(c) for c in counts]

    def alltoall(self, tensor: Tensor, splits: list[int]) -> tuple[Tensor, list[int]]:
        """Send ``splits[k]`` rows to worker k; return the rows received and how many came from each."""
        _check_splits(splits, tensor, self.size)
        table = torch.stack(self.allgather(torch.tensor([splits], device=tensor.device)))[:, 0]
        received = table[:, self.rank].tolist()
        out = tensor.new_empty((sum(received), *tensor.shape[1:]))
        torch.distributed.all_to_all_single(out, tensor.detach().contiguous(), received, splits)
        return out, received

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return worker ``src``'s tensor."""
        value = tensor.detach().clone().contiguous()
        torch.distributed.broadcast(value, src)
        return value

    def barrier(self) -> None:
        """Return once every worker has called it."""
        torch.distributed.barrier()


def _row_bytes(tensor: Tensor) -> int:
    count = 1
    for length in tensor.shape[1:]:
        count *= length
    return count * tensor.element_size()


def _check_splits(splits: list[int], tensor: Tensor, size: int) -> None:
    if len(splits) != size or sum(splits) != tensor.shape[0] or min(splits) < 0:
        raise ValueError(f"splits {splits}: give {size} counts that add up to the {tensor.shape[0]} rows")
