"""``strategy=horovod`` on real workers: results and launch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from dcl_lightning.distributed import HorovodStrategy
from dcl_lightning.distributed.horovod.environment import HorovodEnvironment
from dcl_lightning.errors import ConfigurationError, HorovodNotFoundError
from tests.distributed.programs import fixed_order, strategy
from tests.distributed.workers import assert_ended_well, environment, run_script, run_workers


def test_without_horovod_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "horovod" else find(name, *a))
    with pytest.raises(HorovodNotFoundError, match=r"python -m dcl_lightning\.tools\.install_horovod"):
        HorovodStrategy()


def test_a_horovod_without_pytorch_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModuleSpec("horovod", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec)
    with pytest.raises(HorovodNotFoundError):
        HorovodStrategy()


def test_the_constructor_does_not_import_horovod_and_one_device_needs_no_launcher() -> None:
    code = (
        "import sys, lightning.pytorch as pl, dcl_lightning\n"
        "t = pl.Trainer(strategy='horovod', accelerator='cpu', devices=2, logger=False)\n"
        "assert 'horovod' not in sys.modules and t.world_size == 2 and t.strategy.launcher is not None\n"
        "t = pl.Trainer(strategy='horovod', accelerator='cpu', devices=1, logger=False)\n"
        "assert t.strategy.launcher is None and t.world_size == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=120)


def test_open_mpi_variables_give_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "SIZE": 6, "LOCAL_RANK": 1, "LOCAL_SIZE": 2, "NODE_RANK": 1}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    place = HorovodEnvironment()
    assert (place.global_rank(), place.world_size(), place.local_rank()) == (5, 6, 1)
    assert (place.node_rank(), place.num_nodes()) == (2, 3)


@pytest.mark.parametrize("launched", [False, True])
def test_gpus_need_a_horovod_that_was_built_for_them(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a worker is started: Horovod's own thread would end the process on the first tensor."""
    import horovod.torch as hvd

    devices = [torch.device("cuda", k) for k in range(2)]
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", staticmethod(lambda: 2))
    monkeypatch.setattr(CUDAAccelerator, "parse_devices", staticmethod(lambda given: [0, 1][: int(given)]))
    monkeypatch.setattr(CUDAAccelerator, "get_parallel_devices", staticmethod(lambda given: devices[: len(given)]))
    if launched:
        for name, value in {"RANK": 0, "SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 2}.items():
            monkeypatch.setenv(f"HOROVOD_{name}", str(value))

    def trainer(devices: int = 1 if launched else 2) -> pl.Trainer:
        return pl.Trainer(strategy="horovod", accelerator="gpu", devices=devices, logger=False)

    for name in ("nccl_built", "cuda_built", "rocm_built"):
        monkeypatch.setattr(hvd, name, lambda: 0)
    with pytest.raises(ConfigurationError, match=r"install_horovod --gpu cuda`, or set trainer\.accelerator=cpu"):
        trainer()
    if not launched:
        assert trainer(devices=1).world_size == 1, "a worker alone asks nothing of Horovod"
    monkeypatch.setattr(hvd, "nccl_built", lambda: 21003)
    assert trainer().world_size == 2


def test_other_accelerators_are_refused_where_workers_would_exchange_tensors() -> None:
    with pytest.raises(ConfigurationError, match="works on cpu and gpu, not on mps"):
        HorovodStrategy(parallel_devices=[torch.device("mps", k) for k in range(2)])._configure_launcher()


def test_devices_other_than_the_launchers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_LOCAL_SIZE", "2")
    for devices in ("auto", 1, 2):
        assert (
            pl.Trainer(strategy="horovod", accelerator="cpu", devices=devices, logger=False).strategy.launcher is None
        )
    with pytest.raises(ConfigurationError, match="started 2 workers"):
        pl.Trainer(strategy="horovod", accelerator="cpu", devices=3, logger=False)


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="gradient_predivide_factor"):
        HorovodStrategy(op="sum", gradient_predivide_factor=2.0)
    with pytest.raises(ConfigurationError, match="start_timeout"):
        HorovodStrategy(start_timeout=0)


def test_numbers_of_two_workers() -> None:
    assert_ended_well(run_workers(strategy.numbers, 2))


def test_a_plain_script_starts_its_workers_once(tmp_path: Path) -> None:
    done = run_script("two_fits", tmp_path, "--word", "two words")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"horovod: 2 workers on 1 host, {threads()} each") == 1
    for fit in (1, 2):
        # Not line by line: a print of worker 0's may be cut by a line of the other's before its own end of line.
        assert done.stdout.count(f"FIT {fit} of 2 two words") == 2
        assert done.stdout.count(f"[rank 1] FIT {fit} of 2 two words") == 1
    assert "[rank 1] on stderr" in done.stderr.splitlines()


def threads() -> str:
    count = int(os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // 2)))
    return "1 thread" if count == 1 else f"{count} threads"


@pytest.mark.parametrize("count", [3, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_sums_do_not_depend_on_when_gradients_come(count: int) -> None:
    assert_ended_well(run_workers(fixed_order.same_bits, count, count))
