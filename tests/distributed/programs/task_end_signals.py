"""Fits that a signal to the last worker stops or requeues during a task's end."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from tests.conformance.rehearsal_runs import memory_state, same
from tests.conformance.small_stream import make_data, make_trainer, matrix, weights
from tests.distributed.programs.place import rank, size


class Signalled(MLP):
    """Sends a signal to the last worker's own process at a forward pass of evaluation."""

    signum = signal.SIGTERM
    at: int | None = None
    count = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Count passes outside of training."""
        if not self.training:
            self.count += 1
            if self.count == self.at and rank() == size() - 1:
                os.kill(os.getpid(), self.signum)
        return super().forward(inputs)


class Job(NamedTuple):
    """A fit that is repeated, with and without the signal."""

    folder: Path
    name: str
    signum: signal.Signals
    sharding: str = "epoch"
    strategy: str = "horovod"

    def fit(
        self, at: int | None = None, callbacks: Sequence[pl.Callback] = (), ckpt: Path | None = None
    ) -> tuple[Any, list[Any]]:
        """Return the agent and its end. Of a task's 21 samples worker 0 has three batches, worker 1 two."""
        data = make_data(increment=3, eval_batch_size=5, batch_size=4, sharding=self.sharding)
        pl.seed_everything(0)
        config = {"buffer_size": 12} | ({} if self.name == "icarl" else {"num_samples": 4})
        backbone = Signalled([8])
        agent = getattr(short_names, self.name)(
            backbone, 6, input_spec=data.input_spec, epochs_per_task=2, lr=0.05, rehearsal=config
        )
        agent.backbone.at, agent.backbone.signum = at, self.signum  # not the teacher's
        trainer = make_trainer(
            self.folder, callbacks, strategy=self.strategy, enable_checkpointing=bool(callbacks), limit_val_batches=0
        )
        trainer.fit(agent, datamodule=data, ckpt_path=ckpt)
        manager = getattr(agent.rehearsal, "manager", None)
        memory = None if manager is None else memory_state(manager)
        return agent, [weights(agent), matrix(agent).nan_to_num(-1), dict(agent.named_buffers()), memory]


def stop(folder: Path, name: str, sharding: str) -> None:
    """Both workers stop at the same batch, and a resumed job ends as the one that went straight on."""
    job = Job(folder, name, signal.SIGTERM, sharding)
    straight, expected = job.fit()
    for share in (0.0, 0.4, 0.8):
        at, saved = 1 + int(share * straight.backbone.count), folder / name / str(share)
        with pytest.raises(SystemExit) as end:
            job.fit(at, [ModelCheckpoint(saved, save_last=True, every_n_epochs=100)])
        assert end.value.code == 143
        assert os.listdir(saved).count("last.ckpt") == 1
        _, found = job.fit(ckpt=saved / "last.ckpt")
        ended = torch.load(saved / "last.ckpt")["callbacks"]["TaskClock"]["schedule"]["ended"]
        # A thread hears of the signal: where that was after all was done, nothing was left to make the memory for.
        nothing_left = ended == 2 and found[3] is None
        assert same(found[:3], expected[:3]), share
        assert nothing_left or same(found[3], expected[3]), share


def requeue(folder: Path, name: str, strategy: str) -> None:
    """The job goes on where it was, and the requeued one finds by itself what was saved."""
    job = Job(folder, name, signal.SIGUSR1, strategy=strategy)
    straight, expected = job.fit()
    _, found = job.fit(1 + straight.backbone.count // 2)
    assert same(found, expected), "it goes on where it was"
    assert (folder / "hpc_ckpt_1.ckpt").exists()
    _, found = job.fit()
    assert same(found, expected)
