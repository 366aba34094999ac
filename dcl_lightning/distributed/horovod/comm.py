"""Collectives through Horovod."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcl_lightning.comm import RowComm, used_here

__all__ = ["HorovodComm"]


class HorovodComm(RowComm):
    """Collectives through Horovod, which matches operations by name.

    Args:
        stream: prefix of the names; two streams may be in use by two threads at once.
    """

    def __init__(self, stream: str = "comm") -> None:
        import horovod.torch as hvd

        super().__init__(int(hvd.rank()), int(hvd.size()))
        self._hvd = hvd
        self._stream = stream

    # Every operation is waited for, so its name is free again when it is used again, and Horovod's
    # cache of known operations stays small.

    def _call(self, what: str, data: Tensor, **options: Any) -> Any:
        # Lightning evaluates in inference mode, and Horovod's own thread, which is not in it, may not
        # resize a result that was made there.
        with torch.inference_mode(False), torch.no_grad():
            sent = data.clone() if data.is_inference() else data
            return getattr(self._hvd, what)(sent, name=f"{self._stream}.{what}", **options)

    def _reduce(self, flat: Tensor, op: str) -> Tensor:
        kinds = {"sum": self._hvd.Sum, "min": self._hvd.Min, "max": self._hvd.Max}
        return self._call("allreduce", flat, op=kinds[op])

    def _gather(self, data: Tensor, counts: list[int]) -> Tensor:
        return self._call("allgather", data)

    def _start(self, data: Tensor, splits: list[int], received: list[int], name: str) -> Callable[[], Tensor]:
        counts = torch.tensor(splits, dtype=torch.int32)
        with torch.inference_mode(False), torch.no_grad():
            sent = data.clone() if data.is_inference() else data
            handle = self._hvd.alltoall_async(sent, splits=counts, name=f"{self._stream}.{name}")

        def finish(sent: Tensor = sent) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                rows, found = self._hvd.synchronize(handle)
            used_here(rows)
            if found.tolist() != received:
                raise RuntimeError(f"{name}: received {found.tolist()} rows from the workers, expected {received}")
            return rows.view(-1, sent.shape[1])

        return finish

    def _send(self, data: Tensor, src: int) -> Tensor:
        return self._call("broadcast", data, root_rank=src)

    def barrier(self) -> None:
        """Return once every worker has called it."""
        self._hvd.barrier()
