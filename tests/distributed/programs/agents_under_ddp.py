"""Every deterministic agent under ``horovod`` and under ``ddp`` on the same two workers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from dcl_lightning import ContinualDataModule
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import TaskReport
from tests.distributed.programs.place import elastic_ddp, flat

NAMES = (
    "base", "icarl", "icarl_v1", "nil", "nil_v1", "nil_v3", "nil_v4", "nil_global", "derpp", "agem", "gem", "si", "bic",
    "mir", "scr", "pcr", "icarl_online",
)  # fmt: skip


def ends_alike(folder: Path) -> None:
    """Weights and matrices are the same, also where one of the two takes the network's sizes from the data module."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number, name in enumerate(NAMES):
        ours, matrix = fit(folder, name, "horovod", sizes=number % 2 == 0)
        theirs, other = fit(folder, name, elastic_ddp(), sizes=number % 2 == 1)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, msg=name)
        torch.testing.assert_close(matrix, other, atol=0, rtol=0, equal_nan=True, msg=name)


def fit(folder: Path, name: str, strategy: str | Strategy, sizes: bool) -> tuple[Tensor, Tensor]:
    """Return weights and matrix."""
    pl.seed_everything(0, verbose=False)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(9)
    x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    data = ContinualDataModule((x, y, x.clone(), y.clone()), increment=2, batch_size=4, seed=0, augment=name == "scr")
    kind = getattr(short_names, name)
    options: dict[str, Any] = {"num_classes": data.num_classes, "input_spec": data.input_spec} if sizes else {}
    if kind.rehearses:
        options["rehearsal"] = {"buffer_size": 12}
    if hasattr(kind, "memory"):
        options["rehearsal"]["num_samples"] = 3
    if name == "mir":
        options["num_rehearsed"] = 1
    agent = kind(MLP([8]), epochs_per_task=2, lr=0.05, **options)
    trainer = pl.Trainer(
        accelerator="cpu", strategy=strategy, devices=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        callbacks=[TaskReport(show_table=False)], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    assert trainer.world_size == 2
    return flat(agent), agent.clock.matrix.compute()
