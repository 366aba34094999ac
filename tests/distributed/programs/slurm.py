"""Fits within a SLURM allocation: a worker gets SLURM's signal, the job is saved, requeued, and goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from tests.conformance.agents import make
from tests.conformance.rehearsal_runs import memory_state, same
from tests.conformance.small_stream import make_data, make_trainer, matrix, weights
from tests.distributed import toy
from tests.distributed.programs.place import rank, size


class Signalled(toy.Toy):
    """Signals itself on worker 1 in the midst of an accumulation; worker 0 is slow."""

    def __init__(self, seed: int = 0, signalled: bool = True) -> None:
        super().__init__(seed)
        self.signalled = signalled
        self.steps: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor | None:
        self.steps.append(self.global_step)
        if self.signalled and rank() == 1 and (self.current_epoch, index) == (1, 0):
            os.kill(os.getpid(), signal.SIGUSR1)
        if rank() == 0:
            time.sleep(0.02)
        return super().training_step(batch, index)


def requeue(folder: Path) -> None:
    """What is saved is the end of the accumulation; a job without a word of a checkpoint goes on from it."""

    def trainer() -> pl.Trainer:
        return toy.trainer("horovod", default_root_dir=folder, accumulate_grad_batches=2, max_epochs=3)

    t = trainer()
    t.fit(Signalled(), toy.shard(rank(), 2, 8))
    assert t.current_epoch == 3
    t.strategy.barrier()
    saved = torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (1, 3)
    again = Signalled(seed=5, signalled=False)
    trainer().fit(again, toy.shard(rank(), 2, 8))
    assert min(again.steps) == 3
    both = t.strategy.all_gather(toy.weights(again))
    assert torch.equal(both[0], both[1])


def srun_ddp() -> DDPStrategy:
    """Return Lightning's ``ddp`` on these workers, as srun would have started them."""
    os.environ |= {
        "SLURM_NTASKS": str(size()), "SLURM_NTASKS_PER_NODE": str(size()), "SLURM_NNODES": "1",
        "SLURM_PROCID": str(rank()), "SLURM_LOCALID": str(rank()), "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["TORCH_PORT"],
    }  # fmt: skip
    return DDPStrategy(cluster_environment=SLURMEnvironment(), process_group_backend="gloo")


class SignalAt(pl.Callback):
    """Signals the last worker at a step, and records the steps."""

    def __init__(self, step: int | None) -> None:
        self.step = step
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append(trainer.global_step)
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def requeue_with_memory(folder: Path, strategy: str) -> None:
    """In the second task; the requeued job ends as the one that was not."""

    def fit(step: int | None) -> tuple[Any, list[int]]:
        data = make_data(batch_size=2)
        agent, at = make("nil_global", data), SignalAt(step)
        way = {"strategy": srun_ddp(), "devices": size()} if strategy == "ddp" else {"strategy": strategy}
        trainer = make_trainer(folder, [at], enable_checkpointing=False, limit_val_batches=0, **way)
        trainer.fit(agent, data)
        return agent, at.steps

    straight, steps = fit(11 if size() == 2 else 20)
    saved = torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"]
    again, later = fit(None)
    assert saved > 10
    assert steps[0] == 0
    assert later
    assert later == steps[saved:]
    assert torch.equal(weights(straight), weights(again))
    assert torch.equal(matrix(straight).nan_to_num(-1), matrix(again).nan_to_num(-1))
    assert straight.clock.samples_seen == again.clock.samples_seen
    assert same(memory_state(straight.rehearsal.manager), memory_state(again.rehearsal.manager))
