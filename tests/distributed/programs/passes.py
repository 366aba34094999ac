"""Two passes a step on two workers: each worker's statistics are those of its own rows, the gradient is the mean."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dcl_lightning import ContinualDataModule
from dcl_lightning.agents import short_names
from dcl_lightning.callbacks import TaskReport
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Batch


class _Normed(nn.Sequential):
    feature_dim = 8

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())


class _ByHand(pl.Callback):
    """Repeats each step with a copy of the network."""

    def __init__(self) -> None:
        self.uneven = 0

    def on_train_batch_start(self, trainer: pl.Trainer, agent: Any, batch: Batch, batch_idx: int) -> None:
        self.net = copy.deepcopy(nn.Sequential(agent.backbone, agent.head))

    def on_train_batch_end(self, trainer: pl.Trainer, agent: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        n, parameters = batch.num_new, [*self.net.parameters()]
        rows = [slice(n)] if n == len(batch.targets) else [slice(n), slice(n, None)]
        losses = torch.cat(
            [F.cross_entropy(self.net(batch.inputs[part]), batch.targets[part], reduction="none") for part in rows]
        )
        counts = agent.comm.allgather(torch.tensor([[n, len(batch.targets) - n]]))
        self.uneven += int(counts[0][0, 1]) != int(counts[1][0, 1])
        loss = (losses * batch.weights).sum() / agent.comm.allreduce(batch.weights.sum())
        gradients = torch.autograd.grad(loss, parameters)
        for ours, start, gradient in zip(_parameters(agent), parameters, gradients, strict=True):
            torch.testing.assert_close(ours, start - 0.05 * agent.comm.allreduce(gradient), atol=1e-6, rtol=1e-4)
        for name, buffer in self.net[0].named_buffers():
            torch.testing.assert_close(agent.backbone.get_buffer(name), buffer, msg=name)


def _parameters(agent: Any) -> list[nn.Parameter]:
    return [*agent.backbone.parameters(), *agent.head.parameters()]


def steps(folder: Path) -> None:
    """Each step of ER equals the hand-made one; synchronised layers are refused."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    by_hand = _ByHand()
    agent = _fit(folder, callbacks=[by_hand])
    assert agent.comm.size == 2
    assert int(agent.backbone[2].num_batches_tracked) > agent.trainer.global_step
    assert by_hand.uneven
    with pytest.raises(ConfigurationError, match=r"model\.forward=separate does not go with trainer\.sync_batchnorm"):
        _fit(folder, sync_batchnorm=True)


def _fit(folder: Path, callbacks: list[pl.Callback] | None = None, **options: Any) -> Any:
    pl.seed_everything(0, verbose=False)
    g = torch.Generator().manual_seed(0)
    # 19 samples in the first task, of which the memories hold 10 and 9; 16 in the others.
    y = torch.cat([torch.arange(6).repeat(8), torch.tensor([0, 0, 1])])
    x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    data = ContinualDataModule((x, y, x.clone(), y.clone()), increment=2, batch_size=4, seed=0)
    agent = short_names.er(
        _Normed(), data.num_classes, lr=0.05, input_spec=data.input_spec, forward="separate",
        rehearsal={"buffer_size": 48, "num_samples": 24},
    )  # fmt: skip
    pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, devices=2, strategy="horovod",
        callbacks=[TaskReport(show_table=False), *(callbacks or [])], default_root_dir=folder, **options,
    ).fit(agent, datamodule=data)  # fmt: skip
    return agent
