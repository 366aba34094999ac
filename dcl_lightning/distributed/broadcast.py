"""Broadcasts worker 0's tensors to all workers, many in one message."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dcl_lightning.comm import Comm

__all__ = ["share_buffers", "share_tensors"]

_MESSAGE_BYTES = 32 << 20  # bounds the copies, and is long enough for latency not to matter


def share_buffers(module: nn.Module, comm: Comm) -> None:
    """Give all workers worker 0's buffers: the running statistics of batch normalisation differ between them.

    ddp does it at each step. Training does not depend on them, so before they are used is soon enough:
    before each validation, and at the end of each task.

    Args:
        module: whose buffers are overwritten.
        comm: the cluster.
    """
    share_tensors(module.buffers(), comm)


@torch.no_grad()
def share_tensors(tensors: Iterable[Tensor], comm: Comm) -> None:
    """Overwrite tensors with worker 0's values.

    Args:
        tensors: same shapes and dtypes in the same order on all workers.
        comm: the cluster.
    """
    if comm.size == 1:
        return
    batch: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if batch and (
            size + tensor.nbytes > _MESSAGE_BYTES or (tensor.dtype, tensor.device) != (batch[0].dtype, batch[0].device)
        ):
            _share(batch, comm)
            batch, size = [], 0
        batch.append(tensor)
        size += tensor.nbytes
    if batch:
        _share(batch, comm)


def _share(tensors: list[Tensor], comm: Comm) -> None:
    values = comm.broadcast(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    for tensor, value in zip(tensors, values.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(value.view(tensor.shape))
