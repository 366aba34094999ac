"""A small stream of three tasks, and agents and trainers for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from dcl_lightning import ContinualDataModule, FineTuning, ICaRL, TaskReport
from dcl_lightning.backbones import MLP
from dcl_lightning.memory.config import MemorySize

# `TEST_ACCELERATOR=gpu pytest tests/conformance` runs what does not ask for a device of its own on a GPU.
ON: dict[str, Any] = {"accelerator": os.environ.get("TEST_ACCELERATOR", "cpu"), "devices": 1}


def arrays(num_classes: int = 6, per_class: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(num_classes).repeat(per_class)
    centres = torch.randn(num_classes, 1, 4, 4, generator=g) * 2
    x = centres[y] + torch.randn(len(y), 1, 4, 4, generator=g)
    return x, y, x.clone(), y.clone()


def make_data(**kwargs: Any) -> ContinualDataModule:
    kwargs = {"increment": 2, "batch_size": 5, "seed": 0} | kwargs
    return ContinualDataModule(arrays(), **kwargs)


def make_agent(kind: str, data: ContinualDataModule, seed: int = 0, **kwargs: Any) -> Any:
    pl.seed_everything(seed)
    common = {"epochs_per_task": 2, "lr": 0.05, "momentum": 0.9, "input_spec": data.input_spec} | kwargs
    if kind == "icarl":
        return ICaRL(MLP([8]), data.num_classes, rehearsal=MemorySize(buffer_size=12), bce_reduction="sum", **common)
    return FineTuning(MLP([8]), data.num_classes, **common)


def make_trainer(folder: Path, callbacks: Sequence[pl.Callback] = (), **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=[*callbacks, TaskReport(pictures=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(ON | {"enable_checkpointing": bool(callbacks), "num_sanity_val_steps": 0} | kwargs),
    )


def weights(agent: nn.Module) -> Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in agent.parameters()])


def matrix(agent: Any) -> Tensor:
    return agent.clock.matrix.compute()
