"""Inside a SLURM allocation, whose variables are set by hand: Horovod's ranks, Lightning's requeueing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment

from dcl_lightning import HorovodStrategy
from dcl_lightning.distributed.horovod.environment import HorovodEnvironment, HorovodSLURMEnvironment
from dcl_lightning.errors import ConfigurationError
from tests.distributed.workers import assert_ended_well, environment, run_workers


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    # As sbatch gives them for two nodes of four tasks: Lightning alone refuses --ntasks without --ntasks-per-node.
    given = "JOB_ID=123 JOB_NAME=train NTASKS=8 NNODES=2 PROCID=0 LOCALID=0 NODEID=0"
    for name, value in (pair.split("=") for pair in given.split()):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    return monkeypatch


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


def stub_scontrol(folder: Path, allocation: pytest.MonkeyPatch) -> None:
    """Let what is asked of SLURM be written into ``requeued``."""
    (folder / "bin").mkdir()
    command = folder / "bin" / "scontrol"
    command.write_text(f"#!/bin/sh\necho $@ >> {folder}/requeued\n")
    command.chmod(0o755)
    allocation.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")


def test_a_signal_to_one_worker_saves_and_requeues_once_and_the_job_goes_on_from_there(
    tmp_path: Path, allocation: pytest.MonkeyPatch
) -> None:
    stub_scontrol(tmp_path, allocation)
    assert_ended_well(run_workers(REQUEUE.replace("FOLDER", str(tmp_path)), 2))
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"
    assert [file.name for file in tmp_path.glob("**/*.ckpt")] == ["hpc_ckpt_1.ckpt"]


REQUEUE = """
import os, signal, time, torch
from tests.distributed.toy import Toy, shard, trainer, weights
import dcl_lightning

rank = int(os.environ["HOROVOD_RANK"])
steps = []

class Signalled(Toy):
    signalled = True
    def training_step(self, batch, index):
        steps.append(self.global_step)
        # In the midst of an accumulation: saved is at its end. Worker 0 is slow, worker 1 alone is told.
        if self.signalled and rank == 1 and (self.current_epoch, index) == (1, 0):
            os.kill(os.getpid(), signal.SIGUSR1)
        if rank == 0:
            time.sleep(0.02)
        return super().training_step(batch, index)

options = {"default_root_dir": "FOLDER", "accumulate_grad_batches": 2, "max_epochs": 3}
straight = Signalled()
t = trainer("horovod", **options)
t.fit(straight, shard(rank, 2, 8))
assert t.current_epoch == 3
t.strategy.barrier()
saved = torch.load("FOLDER/hpc_ckpt_1.ckpt", weights_only=True)
assert (saved["epoch"], saved["global_step"]) == (1, 3), (saved["epoch"], saved["global_step"])

# Requeued: a job without a word of a checkpoint goes on from it.
steps.clear()
again = Signalled(seed=5)
again.signalled = False
trainer("horovod", **options).fit(again, shard(rank, 2, 8))
assert min(steps) == 3, steps
both = t.strategy.all_gather(weights(again))
assert torch.equal(both[0], both[1])
"""


@pytest.mark.parametrize(("workers", "strategy"), [(1, "auto"), (2, "horovod")])
def test_a_requeued_job_with_a_memory_ends_as_one_that_was_not(
    workers: int, strategy: str, tmp_path: Path, allocation: pytest.MonkeyPatch
) -> None:
    stub_scontrol(tmp_path, allocation)
    source = f"FOLDER, STRATEGY = {str(tmp_path)!r}, {strategy!r}\n"
    assert_ended_well(run_workers(source + REQUEUE_MEMORY, workers))
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"
    assert len(list(tmp_path.glob("hpc_ckpt_1.ckpt.memory/*/rank_*"))) == workers


REQUEUE_MEMORY = """
import os, signal, torch
import lightning.pytorch as pl
from tests.conformance.agents import make
from tests.conformance.rehearsal_runs import memory_state, same
from tests.conformance.small_stream import make_data, make_trainer, matrix, weights

rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])

class Tell(pl.Callback):
    def __init__(self, signal_at):
        self.signal_at, self.steps = signal_at, []

    def on_train_batch_start(self, trainer, *args):
        self.steps.append(trainer.global_step)
        # In the second task; the last worker alone is told.
        if trainer.global_step == self.signal_at and rank == size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

def fit(signal_at):
    data = make_data(batch_size=2)
    agent, tell = make("nil_global", data), Tell(signal_at)
    make_trainer(FOLDER, [tell], strategy=STRATEGY, enable_checkpointing=False, limit_val_batches=0).fit(agent, data)
    return agent, tell.steps

told, steps = fit(11 if size == 2 else 20)
saved = torch.load(f"{FOLDER}/hpc_ckpt_1.ckpt", weights_only=True)["global_step"]
again, later = fit(None)
assert steps[0] == 0 and steps[-1] == later[-1] and later == steps[saved:] and saved > 10, (saved, later)
assert torch.equal(weights(told), weights(again))
assert torch.equal(matrix(told).nan_to_num(-1), matrix(again).nan_to_num(-1))
assert same(memory_state(told.rehearsal.manager), memory_state(again.rehearsal.manager))
"""
