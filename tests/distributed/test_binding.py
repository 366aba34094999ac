"""Cores and threads of a worker."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dcl_lightning import HorovodStrategy
from dcl_lightning.comm import SingleProcessComm
from dcl_lightning.distributed import cpu_binding as binding
from dcl_lightning.distributed.cpu_binding import bind_worker, divide_cores, numa_nodes
from dcl_lightning.distributed.horovod.strategy import fork_hazard
from dcl_lightning.errors import ConfigurationError
from tests.distributed.programs.binding import bound
from tests.distributed.workers import assert_ended_well, run_workers


@pytest.mark.parametrize(
    ("option", "words"),
    [("bind", "none, core, numa"), ("op", "average, sum, adasum"), ("compression", "none, fp16, bf16")],
)
def test_an_unknown_word_is_refused(option: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"strategy\.{option}='socket': give {words}"):
        HorovodStrategy(**{option: "socket"})


@pytest.mark.parametrize(
    ("cores", "workers", "wanted"),
    [
        (4, 2, [{0, 1}, {2, 3}]),
        (5, 2, [{0, 1}, {2, 3, 4}]),
        (3, 3, [{0}, {1}, {2}]),
        (2, 4, [{0}, {0}, {1}, {1}]),
        (1, 3, [{0}, {0}, {0}]),
    ],
)
def test_shares_of_cores(cores: int, workers: int, wanted: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_location", lambda core: core)
    assert divide_cores("core", set(range(cores)), workers, []) == wanted


def test_hyperthreads_of_a_core_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_location", lambda core: (0, core % 4, core))
    assert divide_cores("core", set(range(8)), 2, []) == [{0, 4, 1, 5}, {2, 6, 3, 7}]


@pytest.mark.parametrize(
    ("nodes", "workers", "wanted"),
    [
        ([{0, 1}, {2, 3}], 2, [{0, 1}, {2, 3}]),
        ([{0, 1}, {2, 3}], 4, [{0, 1}, {0, 1}, {2, 3}, {2, 3}]),
        ([{0}, {1}, {2}, {3}], 2, [{0, 1}, {2, 3}]),
        ([{0, 1}, {2, 3}, {8, 9}], 2, [{0, 1}, {2, 3}]),  # the last node is not ours
        ([], 2, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
    ],
)
def test_shares_of_numa_nodes(nodes: list[set[int]], workers: int, wanted: list[set[int]]) -> None:
    assert divide_cores("numa", {0, 1, 2, 3}, workers, nodes) == wanted


def test_nodes_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, text in {0: "0-1,4\n", 2: "2\n", 10: "\n"}.items():
        (tmp_path / "node" / f"node{number}").mkdir(parents=True)
        (tmp_path / "node" / f"node{number}" / "cpulist").write_text(text)
    assert numa_nodes(tmp_path) == [{0, 1, 4}, {2}, set()]
    assert numa_nodes(tmp_path / "none") == []


class Host(SimpleNamespace):
    """Worker ``rank`` of a host whose workers have these masks."""

    def allgather(self, mine: Tensor) -> list[Tensor]:
        return [torch.tensor([int(mine[0]), *sorted(mask)]) for mask in self.masks]


@pytest.mark.parametrize(
    ("bind", "masks", "rank", "bound", "threads"),
    [
        ("none", [range(8)] * 2, 1, None, 4),
        ("core", [range(8)] * 2, 1, {4, 5, 6, 7}, 4),
        ("core", [range(2)] * 4, 3, {1}, 1),
        ("numa", [range(8)] * 4, 2, {4, 5, 6, 7}, 2),
        ("core", [range(4), range(4, 8)], 1, None, 4),  # bound by the launcher
        ("none", [range(4), range(4, 8)], 1, None, 4),
    ],
)
def test_threads_are_the_cores_shared_by_those_that_run_on_them(
    bind: str, masks: list[range], rank: int, bound: set[int] | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[set[int]] = []
    monkeypatch.setattr(binding, "available_cores", lambda: set(masks[rank]))
    monkeypatch.setattr(binding, "_location", lambda core: core)
    monkeypatch.setattr(binding, "numa_nodes", lambda: [{0, 1, 2, 3}, {4, 5, 6, 7}])
    monkeypatch.setattr(binding, "_bind_all_threads", calls.append)
    assert bind_worker(bind, Host(rank=rank, masks=masks)) == threads
    assert calls == ([bound] if bound else [])


def test_a_system_that_cannot_bind_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert bind_worker("numa", SingleProcessComm()) == os.cpu_count()


def test_two_workers_run_on_cores_of_their_own() -> None:
    assert_ended_well(run_workers(bound, 2))


@pytest.mark.parametrize(
    ("options", "mpi", "cuda", "words"),
    [
        ({"num_workers": 2}, True, False, "MPI"),
        ({"num_workers": 2}, False, True, "CUDA"),
        ({"num_workers": 2}, False, False, ""),
        ({"num_workers": 0}, True, True, ""),
        ({"num_workers": 2, "multiprocessing_context": "forkserver"}, True, True, ""),
        ({"num_workers": 2, "multiprocessing_context": "fork"}, True, False, "MPI"),
    ],
)
def test_loaders_that_fork_beside_mpi_or_cuda_are_told_of(
    options: dict[str, object], mpi: bool, cuda: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(value: bool) -> Callable[[], bool]:
        return lambda: value

    hvd = SimpleNamespace(is_initialized=always(True), mpi_enabled=always(mpi))
    monkeypatch.setitem(sys.modules, "horovod.torch", hvd)
    monkeypatch.setattr(torch.cuda, "is_initialized", always(cuda))
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *a, **k: "fork")
    hazard = fork_hazard(DataLoader([1, 2], **options))
    assert words in hazard
    assert bool(hazard) == bool(words)
