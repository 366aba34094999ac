"""Every deterministic agent under ``horovod`` and under ``ddp`` on the same two workers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from dcl_lightning import ContinualDataModule
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import TaskReport
from tests.distributed.programs.place import elastic_ddp, flat

NAMES = (
    "base", "icarl", "icarl_v1", "nil", "nil_v1", "nil_v3", "nil_v4", "nil_global", "derpp", "agem", "gem", "si", "bic",
    "mir", "scr", "pcr", "icarl_online", "ranpac",
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


class Normed(nn.Sequential):
    """A network with a normalisation layer."""

    feature_dim = 8

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())


# Agent, strategy, options of the trainer, and how far the weights may be apart.
COMPILED: dict[str, tuple[str, dict[str, Any], float]] = {
    "agem": ("horovod", {"sync_batchnorm": True}, 1e-5),
    "derpp": ("horovod", {"accumulate_grad_batches": 2}, 1e-6),
    "er_ace": ("ddp", {"precision": "bf16-mixed", "gradient_clip_val": 1.0}, 2e-2),
}


def compiled_ends_alike(folder: Path, name: str) -> None:
    """A compiled network learns what an eager one does, with all that wraps it or its gradients."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    strategy, options, tolerance = COMPILED[name]
    ends = [
        # A strategy serves one trainer.
        fit(folder, name, elastic_ddp() if strategy == "ddp" else strategy, True, Normed, compile, 3, **options)[0]
        for compile in (False, {"backend": "aot_eager"})
    ]
    torch.testing.assert_close(*ends, atol=tolerance, rtol=tolerance)


def fit(
    folder: Path,
    name: str,
    strategy: str | Strategy,
    sizes: bool,
    network: type[nn.Module] | None = None,
    compile: bool | dict[str, Any] = False,
    batch_size: int = 4,
    **trainer_options: Any,
) -> tuple[Tensor, Tensor]:
    """Return weights and matrix."""
    pl.seed_everything(0, verbose=False)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(9)
    x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    data = ContinualDataModule(
        (x, y, x.clone(), y.clone()), increment=2, batch_size=batch_size, seed=0, augment=name == "scr"
    )
    kind = getattr(short_names, name)
    options: dict[str, Any] = {"num_classes": data.num_classes, "input_spec": data.input_spec} if sizes else {}
    if kind.rehearses:
        options["rehearsal"] = {"buffer_size": 12}
    if hasattr(kind, "memory"):
        options["rehearsal"]["num_samples"] = 3
    if name == "mir":
        options["num_rehearsed"] = 1
    if name == "ranpac":
        options |= {"projection_dim": 12, "first_session": True}
    agent = kind(network() if network else MLP([8]), epochs_per_task=2, lr=0.05, compile=compile, **options)
    trainer = pl.Trainer(
        accelerator="cpu", strategy=strategy, devices=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        callbacks=[TaskReport(show_table=False)], default_root_dir=folder, **trainer_options,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    assert trainer.world_size == 2
    return flat(agent), agent.clock.matrix.compute()
