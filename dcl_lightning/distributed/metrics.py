"""torchmetrics reduce through torch.distributed alone; this makes them reduce through Horovod."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from dcl_lightning.distributed.comm import HorovodComm

__all__ = ["attach_metrics"]


def attach_metrics(module: nn.Module) -> None:
    """Let a metric, and every metric within a module, reduce over Horovod's workers.

    Args:
        module: a ``Metric``, a ``MetricCollection`` or any module. Metrics in plain lists or in callbacks
            have to be given one by one.
    """
    for metric in module.modules():
        if isinstance(metric, Metric):
            metric.distributed_available_fn = _several_workers
            if metric.dist_sync_fn is None:
                metric.dist_sync_fn = _gather


# Functions of the module, not closures: metrics are copied and pickled.
def _several_workers() -> bool:
    import horovod.torch as hvd

    return bool(hvd.is_initialized() and hvd.size() > 1)


def _gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Return every worker's state; an empty list state takes shape and dtype from a worker that has rows."""
    comm = HorovodComm("metric")
    if tensor.ndim == 0:
        return comm.allgather(tensor)
    rows = comm.allgather(torch.tensor([len(tensor)]))
    if any(int(n) for n in rows) and not all(int(n) for n in rows):
        owner = next(k for k, n in enumerate(rows) if int(n))
        dtypes = sorted(_DTYPES, key=str)
        header = torch.zeros(10, dtype=torch.int64)
        if comm.rank == owner:
            header[0], header[1] = dtypes.index(tensor.dtype), tensor.ndim
            header[2 : 1 + tensor.ndim] = torch.tensor(tensor.shape[1:])
        header = comm.broadcast(header, owner)
        if not len(tensor):
            shape = header[2 : 1 + int(header[1])].tolist()
            tensor = torch.empty((0, *shape), dtype=dtypes[int(header[0])], device=tensor.device)
    return comm.allgather(tensor)


_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
