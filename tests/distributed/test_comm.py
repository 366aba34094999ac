"""The one contract of all ``Comm``s, and metrics over workers."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import torch
from torchmetrics.classification import MulticlassAccuracy

from dcl_lightning.comm import SingleProcessComm, comm_of
from dcl_lightning.distributed import attach_metrics
from tests.distributed.comm_contract import check_contract
from tests.distributed.workers import assert_ended_well, run_workers


def test_one_process_keeps_the_contract() -> None:
    check_contract(SingleProcessComm())
    with torch.inference_mode():
        check_contract(SingleProcessComm())


def test_comm_of_takes_the_strategys_own_and_else_one_process() -> None:
    own = SingleProcessComm()
    assert comm_of(SimpleNamespace(comm=own)) is own
    assert isinstance(comm_of(SimpleNamespace()), SingleProcessComm)


def test_attached_metrics_can_be_pickled() -> None:
    metric = MulticlassAccuracy(num_classes=3)
    attach_metrics(metric)
    assert pickle.loads(pickle.dumps(metric)).dist_sync_fn is metric.dist_sync_fn


def test_three_horovod_workers_keep_the_contract_and_metrics_agree() -> None:
    assert_ended_well(run_workers(HOROVOD, 3))


def test_three_torch_workers_keep_the_contract() -> None:
    assert_ended_well(run_workers(TORCH, 3))


HOROVOD = """
import torch, horovod.torch as hvd
from tests.distributed.comm_contract import check_contract
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy
from torchmetrics import CatMetric, MetricCollection
from dcl_lightning.distributed import attach_metrics
from dcl_lightning.distributed.horovod.comm import HorovodComm
hvd.init()
check_contract(HorovodComm())
with torch.inference_mode():  # Lightning evaluates in it
    check_contract(HorovodComm())

# Shards of 0, 9 and 4 samples: worker 0 has no state at all.
g = torch.Generator().manual_seed(0)
score, label = torch.rand(13, generator=g), torch.randint(0, 2, (13,), generator=g)
logits = torch.rand(13, 3, generator=g)
start, stop = [(0, 0), (0, 9), (9, 13)][hvd.rank()]
def metrics():
    return torch.nn.ModuleDict({
        "auroc": BinaryAUROC(thresholds=None), "cat": CatMetric(),
        "acc": MetricCollection([MulticlassAccuracy(num_classes=3, average="micro")]),
    })
def feed(m, a, b):
    if b > a:
        m["auroc"].update(score[a:b], label[a:b])
        m["cat"].update(score[a:b])
        m["acc"].update(logits[a:b], label[a:b])
whole, shard = metrics(), metrics()
attach_metrics(shard)
feed(whole, 0, 13)
feed(shard, start, stop)
for name in whole:
    a, b = whole[name].compute(), shard[name].compute()
    a, b = (list(v.values())[0] if isinstance(v, dict) else v for v in (a, b))
    torch.testing.assert_close(b, a, msg=name)
"""

TORCH = """
import os, torch
from tests.distributed.comm_contract import check_contract
from types import SimpleNamespace
from dcl_lightning.comm import TorchDistributedComm, comm_of
port = os.environ["TORCH_PORT"]
rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
comm = comm_of(SimpleNamespace())
assert isinstance(comm, TorchDistributedComm)
check_contract(comm)
torch.distributed.destroy_process_group()
"""
