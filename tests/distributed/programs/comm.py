"""The contract of ``Comm``, and metrics, on Horovod and on torch workers."""

from __future__ import annotations

from types import SimpleNamespace

import horovod.torch as hvd
import torch
from torchmetrics import CatMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from dcl_lightning.comm import Pending, TorchDistributedComm, comm_of
from dcl_lightning.distributed import attach_metrics
from dcl_lightning.distributed.horovod.comm import HorovodComm
from tests.distributed.comm_contract import check_contract
from tests.distributed.programs.place import join_torch_group


class Metrics(torch.nn.Module):
    """Metrics that keep lists, sums and a collection, over 13 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.auroc, self.cat = BinaryAUROC(thresholds=None), CatMetric()
        self.accuracy = MetricCollection([MulticlassAccuracy(num_classes=3, average="micro")])
        g = torch.Generator().manual_seed(0)
        self.score, self.label = torch.rand(13, generator=g), torch.randint(0, 2, (13,), generator=g)
        self.logits = torch.rand(13, 3, generator=g)

    def feed(self, start: int, stop: int) -> None:
        """Update all of them with some samples."""
        if stop > start:
            self.auroc.update(self.score[start:stop], self.label[start:stop])
            self.cat.update(self.score[start:stop])
            self.accuracy.update(self.logits[start:stop], self.label[start:stop])

    def values(self) -> list[torch.Tensor]:
        """Compute all of them."""
        found: list[torch.Tensor] = []
        for metric in (self.auroc, self.cat, self.accuracy):
            assert isinstance(metric, Metric | MetricCollection)
            value = metric.compute()
            found += value.values() if isinstance(value, dict) else [value]
        return found


def horovod_contract() -> None:
    """Also in inference mode, in which Lightning evaluates."""
    hvd.init()
    check_contract(HorovodComm())
    with torch.inference_mode():
        check_contract(HorovodComm())
    whole, shard = Metrics(), Metrics()
    attach_metrics(shard)
    whole.feed(0, 13)
    # Worker 0 has no state at all.
    shard.feed(*[(0, 0), (0, 9), (9, 13)][hvd.rank()])
    for mine, wanted in zip(shard.values(), whole.values(), strict=True):
        torch.testing.assert_close(mine, wanted)


def torch_contract() -> None:
    """Without Horovod."""
    join_torch_group()
    pending: dict[int, Pending] = {}
    comm = comm_of(SimpleNamespace())
    assert isinstance(comm, TorchDistributedComm)
    check_contract(comm)
    # Two that were made ready in one order, and are first used in another one on each worker, as threads do.
    pair = [TorchDistributedComm(), TorchDistributedComm()]
    for one in pair:
        one.prepare_async()
    for width in (0, 1) if comm.rank % 2 else (1, 0):
        rows = torch.full((comm.size, 1 + width), comm.rank, dtype=torch.uint8)
        pending[width] = pair[width].alltoall_async(rows, [1] * comm.size, [1] * comm.size, "rows")
    for width, started in pending.items():
        assert started.wait().tolist() == [[rank] * (1 + width) for rank in range(comm.size)]
    torch.distributed.destroy_process_group()
