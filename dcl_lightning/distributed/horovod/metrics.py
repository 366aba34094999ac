"""Lets torchmetrics reduce through Horovod in place of torch.distributed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from dcl_lightning.distributed.horovod.comm import HorovodComm

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
    return HorovodComm("metric").allgather(tensor)
