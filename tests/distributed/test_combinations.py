"""Gradients: every option of the strategy, and what users do with optimizers, against ddp and one process.

All cases run within one launch of two workers; each test looks at what its case left.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dcl_lightning.distributed.horovod.batchnorm import HorovodBatchNormSync
from dcl_lightning.distributed.horovod.gradients import GradientAverager
from dcl_lightning.errors import ConfigurationError
from tests.distributed.programs.combinations import CASES, Case, run_all
from tests.distributed.workers import assert_ended_well, run_workers

pytestmark = pytest.mark.timeout(600)  # for the launch, which the first test waits for

Results = list[dict[str, dict[str, "Tensor | str"]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("combinations")
    assert_ended_well(run_workers(run_all, 2, folder, deadline=540))
    return [torch.load(Path(folder, f"worker_{rank}.pt"), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_workers_equal_ddp_bitwise_and_one_process_closely(case: Case, results: Results) -> None:
    found = [worker[case.name] for worker in results]
    for worker in found:
        for text in worker.values():
            assert not isinstance(text, str), text
    mine, other = (worker["horovod"] for worker in found)
    assert mine.isfinite().all()
    if case.name != "batchnorm":  # running statistics are each worker's own until they are used
        assert torch.equal(mine, other), "the workers differ"
    if "ddp" in found[0]:
        assert torch.equal(mine, found[0]["ddp"]), (mine - found[0]["ddp"]).abs().max()
    if case.one is not None:
        torch.testing.assert_close(mine, found[0]["one"], atol=case.one, rtol=case.one)


def fake_horovod(monkeypatch: pytest.MonkeyPatch, size: int, mpi: bool) -> None:
    hvd = SimpleNamespace(size=lambda: size, mpi_enabled=lambda: mpi, Sum=1, Adasum=2)
    package = SimpleNamespace(torch=hvd)
    monkeypatch.setitem(sys.modules, "horovod", package)
    monkeypatch.setitem(sys.modules, "horovod.torch", hvd)


@pytest.mark.parametrize(("size", "mpi", "words"), [(2, False, "start the job with mpirun"), (3, True, "not on 3")])
def test_adasum_is_refused_where_it_cannot_work(
    size: int, mpi: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_horovod(monkeypatch, size, mpi)
    with pytest.raises(ConfigurationError, match=words):
        GradientAverager("adasum", "none", 1.0, False).attach(nn.Linear(2, 2))


def test_sparse_gradients_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_horovod(monkeypatch, 2, False)
    module = nn.ModuleDict({"table": nn.Embedding(3, 2, sparse=True)})
    GradientAverager("average", "none", 1.0, False).attach(module)
    with pytest.raises(ConfigurationError, match=r"table\.weight is a sparse tensor"):
        module["table"](torch.tensor([1])).sum().backward()


class OwnNorm(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_synchronised_layers_stay_what_they_are_and_can_be_copied() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(3))
    before, state = list(module.parameters()), module.state_dict()
    sync = HorovodBatchNormSync()
    sync.apply(module)
    assert isinstance(module[0], nn.BatchNorm1d)
    assert type(module[0]) is not nn.BatchNorm1d
    assert type(copy.deepcopy(module)[1]) is type(module[1])
    assert module.state_dict().keys() == state.keys()
    x = torch.randn(4, 2)
    assert torch.equal(module.eval()[0](x), nn.BatchNorm1d(2).eval()(x)), "evaluation needs no other worker"
    sync.revert(module)
    assert [type(layer) for layer in module] == [nn.BatchNorm1d, nn.BatchNorm2d]
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert "sync_name" not in vars(module[0])


def test_a_batchnorm_with_a_forward_of_its_own_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"layer 1 is a OwnNorm"):
        HorovodBatchNormSync().apply(nn.Sequential(nn.Linear(2, 2), OwnNorm(2)))
