"""In a SLURM allocation, whose variables the tests set: Horovod's ranks, Lightning's requeueing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from torch import Tensor

from dcl_lightning import HorovodStrategy
from dcl_lightning.distributed.horovod.environment import HorovodEnvironment, HorovodSLURMEnvironment
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import make_agent, make_data, make_trainer, weights
from tests.distributed.programs import slurm
from tests.distributed.workers import assert_ended_well, environment, run_workers


def test_the_place_is_horovods_and_the_environment_slurms(allocation: pytest.MonkeyPatch) -> None:
    given = "RANK=5 SIZE=6 LOCAL_RANK=1 LOCAL_SIZE=2 CROSS_RANK=2 CROSS_SIZE=3"
    for name, value in (pair.split("=") for pair in given.split()):
        allocation.setenv(f"HOROVOD_{name}", value)
    trainer = pl.Trainer(strategy="horovod", accelerator="cpu", devices="auto", logger=False)
    place = trainer.strategy.cluster_environment
    assert isinstance(place, SLURMEnvironment)
    assert isinstance(place, HorovodSLURMEnvironment)
    assert (place.auto_requeue, place.requeue_signal) == (True, signal.SIGUSR1)
    assert (trainer.global_rank, trainer.world_size, trainer.local_rank) == (5, 6, 1)
    assert (trainer.node_rank, trainer.num_nodes) == (2, 3)
    assert place.creates_processes_externally
    place.validate_settings(num_devices=3, num_nodes=7)


def test_an_import_leaves_the_environment_as_it_is(allocation: pytest.MonkeyPatch) -> None:
    """What a worker starts, as another ``srun``, would else see what this package has made of the allocation."""
    for name in ("HOROVOD_RANK", "HOROVOD_LOCAL_RANK"):
        allocation.setenv(name, "0")
    for name in ("HOROVOD_SIZE", "HOROVOD_LOCAL_SIZE"):
        allocation.setenv(name, "2")
    variables = {**environment(), **os.environ}
    done = subprocess.run([sys.executable, "-c", IMPORTED], env=variables, text=True, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr


IMPORTED = """
import os, pkgutil
import lightning.pytorch, torchmetrics
before = dict(os.environ)
import dcl_lightning
for name in dir(dcl_lightning):
    getattr(dcl_lightning, name)
import dcl_lightning.distributed.horovod.strategy, dcl_lightning.cli.program
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
"""


def test_lightning_alone_still_refuses_tasks_that_srun_did_not_place(allocation: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="ntasks-per-node"):
        pl.Trainer(accelerator="cpu", devices=1, logger=False)


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_an_interactive_allocation_is_not_requeued(name: str, allocation: pytest.MonkeyPatch) -> None:
    allocation.setenv("SLURM_JOB_NAME", name)
    assert type(HorovodStrategy().cluster_environment) is HorovodEnvironment


def test_without_slurm_there_is_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert type(HorovodStrategy().cluster_environment) is HorovodEnvironment


def test_several_tasks_of_srun_that_do_not_know_of_each_other_are_refused(allocation: pytest.MonkeyPatch) -> None:
    allocation.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ConfigurationError, match="horovodrun or mpirun in the batch script"):
        pl.Trainer(strategy=HorovodStrategy(), accelerator="cpu", devices=1, logger=False)
    allocation.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert pl.Trainer(strategy=HorovodStrategy(), accelerator="cpu", devices=1, logger=False).world_size == 1


def test_a_signal_to_one_worker_saves_and_requeues_once_and_the_job_goes_on_from_there(
    tmp_path: Path, requeued: Path
) -> None:
    assert_ended_well(run_workers(slurm.requeue, 2, tmp_path))
    assert requeued.read_text() == "requeue 123\n"
    assert [file.name for file in tmp_path.glob("**/*.ckpt")] == ["hpc_ckpt_1.ckpt"]


@pytest.mark.parametrize(("workers", "strategy"), [(1, "auto"), (2, "horovod")])
def test_a_requeued_job_with_a_memory_ends_as_one_that_was_not(
    workers: int, strategy: str, tmp_path: Path, requeued: Path
) -> None:
    assert_ended_well(run_workers(slurm.requeue_with_memory, workers, tmp_path, strategy))
    assert requeued.read_text() == "requeue 123\n"
    assert len(list(tmp_path.glob("hpc_ckpt_1.ckpt.memory/*/rank_*"))) == workers


def test_a_job_goes_on_from_its_own_checkpoint_alone(
    tmp_path: Path, requeued: Path, allocation: pytest.MonkeyPatch
) -> None:
    """Jobs and tasks of a job array that share a folder, with a seed of their own each."""
    allocation.setenv("SLURM_NTASKS", "1")

    def fit(seed: int, saves_at: int | None = None, **kwargs: str) -> tuple[list[int], Tensor]:
        data, at = make_data(), slurm.SignalAt(saves_at)
        agent = make_agent("finetuning", data, seed)
        trainer = make_trainer(tmp_path, [at], enable_checkpointing=False, limit_val_batches=0)
        trainer.fit(agent, data, **kwargs)
        return at.steps, weights(agent)

    steps, first = fit(1, saves_at=3)
    allocation.setenv("SLURM_JOB_ID", "124")
    with pytest.warns(UserWarning, match="hpc_ckpt_1.ckpt is of SLURM job 123, and this is job 124: to resume"):
        assert fit(2, saves_at=5)[0] == steps
    assert fit(2)[0] == steps[6:]
    allocation.setenv("SLURM_JOB_ID", "123")
    with pytest.warns(UserWarning, match="hpc_ckpt_2.ckpt is of SLURM job 124"):
        later, again = fit(9)
    assert later == steps[4:]
    assert torch.equal(first, again)
    allocation.setenv("SLURM_JOB_ID", "125")
    assert fit(9, ckpt_path=str(tmp_path / "hpc_ckpt_1.ckpt"))[0] == steps[4:]
    with pytest.raises(ValueError, match="no HPC checkpoint was found"):
        fit(9, ckpt_path="hpc")
    for name, value in (("ARRAY_JOB_ID", "123"), ("ARRAY_TASK_ID", "7"), ("JOB_ID", "123")):
        allocation.setenv(f"SLURM_{name}", value)
    assert fit(3, saves_at=8)[0] == steps
    assert fit(9)[0] == steps[9:]
    with (tmp_path / "hpc_ckpt_3.ckpt").open("r+b") as file:
        file.truncate(1000)
    with pytest.warns(UserWarning, match="passed over: .*hpc_ckpt_3.ckpt is damaged"):
        assert fit(3)[0] == steps
    assert requeued.read_text() == "requeue 123\nrequeue 124\nrequeue 123_7\n"
