"""The contract of every ``Comm``, and metrics over workers."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import torch
from torchmetrics.classification import MulticlassAccuracy

from dcl_lightning.comm import SingleProcessComm, comm_of
from dcl_lightning.distributed import attach_metrics
from tests.distributed.comm_contract import check_contract
from tests.distributed.programs import comm
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
    assert_ended_well(run_workers(comm.horovod_contract, 3))


def test_three_torch_workers_keep_the_contract() -> None:
    assert_ended_well(run_workers(comm.torch_contract, 3))
