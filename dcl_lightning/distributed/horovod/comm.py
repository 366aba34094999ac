"""Collective operations through Horovod, for the package and for torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from dcl_lightning.comm import RowComm, used_here
from dcl_lightning.distributed.horovod.mesh import Mesh

__all__ = ["HorovodComm", "attach_metrics"]


class HorovodComm(RowComm):
    """Collectives through Horovod, which matches operations by name.

    Every operation is waited for before its name is used again, so Horovod's cache of known operations stays small.

    Args:
        stream: prefix of the names; two streams may be in use by two threads at once.
        mesh: direct connections, over which asynchronous operations travel whose rows are not on a GPU.
    """

    def __init__(self, stream: str = "comm", mesh: Mesh | None = None) -> None:
        import horovod.torch as hvd

        super().__init__(int(hvd.rank()), int(hvd.size()))
        self._hvd = hvd
        self._stream, self._mesh = stream, mesh

    def prepare_async(self) -> None:
        """Do nothing: Horovod knows operations by their names, whichever thread starts them."""

    def _reduce(self, flat: Tensor, op: str) -> Tensor:
        kinds = {"sum": self._hvd.Sum, "min": self._hvd.Min, "max": self._hvd.Max}
        with _usable_by_horovod(flat) as sent:
            return self._hvd.allreduce(sent, op=kinds[op], name=f"{self._stream}.allreduce")

    def _gather(self, data: Tensor, counts: list[int]) -> Tensor:
        with _usable_by_horovod(data) as sent:
            return self._hvd.allgather(sent, name=f"{self._stream}.allgather")

    def _start(self, data: Tensor, splits: list[int], received: list[int], name: str) -> Callable[[], Tensor]:
        mesh = self._mesh
        if mesh is not None and data.device.type == "cpu":
            mesh.send(name, data.split(splits))
            return lambda: _rows(mesh.receive(name), received, data.shape[1], name)
        counts = torch.tensor(splits, dtype=torch.int32)
        with _usable_by_horovod(data) as sent:
            handle = self._hvd.alltoall_async(sent, splits=counts, name=f"{self._stream}.{name}")

        def finish(sent: Tensor = sent) -> Tensor:
            with _usable_by_horovod(sent):
                rows, found = self._hvd.synchronize(handle)
            used_here(rows)
            _check_counts(found.tolist(), received, name)
            return rows.view(-1, sent.shape[1])

        return finish

    def _send(self, data: Tensor, src: int) -> Tensor:
        with _usable_by_horovod(data) as sent:
            return self._hvd.broadcast(sent, root_rank=src, name=f"{self._stream}.broadcast")

    def barrier(self) -> None:
        """Return once every worker has called it."""
        self._hvd.barrier()


def _rows(parts: list[Tensor], received: list[int], width: int, name: str) -> Tensor:
    _check_counts([len(part) // width for part in parts], received, name)
    with torch.inference_mode(False):
        return torch.cat(parts).view(-1, width)


def _check_counts(found: list[int], expected: list[int], name: str) -> None:
    if found != expected:
        raise RuntimeError(f"{name}: received {found} rows from the workers, expected {expected}")


@contextmanager
def _usable_by_horovod(data: Tensor) -> Iterator[Tensor]:
    """Yield the tensor in a form that Horovod's thread can use, outside inference mode.

    Lightning evaluates in inference mode, but Horovod's thread is not in it and may not resize tensors made there.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield data.clone() if data.is_inference() else data


def attach_metrics(module: nn.Module) -> None:
    """Let every metric within a module reduce over Horovod's workers instead of torch.distributed's.

    Args:
        module: a ``Metric``, a ``MetricCollection`` or any module. Metrics in plain lists or in callbacks must be
            passed one by one.
    """
    for metric in module.modules():
        if isinstance(metric, Metric):
            metric.distributed_available_fn = _several_workers
            if metric.dist_sync_fn is None:
                metric.dist_sync_fn = _gather_state


# Module-level functions, because metrics are copied and pickled.
def _several_workers() -> bool:
    import horovod.torch as hvd

    return bool(hvd.is_initialized() and hvd.size() > 1)


def _gather_state(tensor: Tensor, group: object = None) -> list[Tensor]:
    """Return every worker's state; an empty list state takes shape and dtype from a worker that has rows."""
    return HorovodComm("metric").allgather(tensor)
