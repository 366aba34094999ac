"""Runs of two workers whose reports are checked: a memory on each worker, and shared exemplars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from dcl_lightning import NIL, ContinualDataModule, ICaRL, RehearsalConfig, TaskReport
from dcl_lightning.backbones import MLP
from tests.distributed.toy import trainer


def own_memories(folder: Path) -> None:
    """Fit on both workers and print what this one holds; worker 0 then reports the same network alone."""
    agent, job = fit(folder / "two", "horovod")
    manager: Any = agent.rehearsal.manager
    rows = manager.memory_rows()
    print("HELD", len(rows.sample_ids))
    print("IDS", *rows.sample_ids.tolist())
    if job.global_rank == 0:
        fit(folder / "one", "auto", evaluated=agent)


def fit(folder: Path, strategy: str, evaluated: NIL | None = None) -> tuple[NIL, pl.Trainer]:
    """Fit; after each task ``evaluated`` is evaluated in the agent's place, whatever is trained."""
    train = torch.tensor([0] * 5 + [1] * 4 + [2] * 4 + [3] * 5 + [4] * 5 + [5] * 4)
    test = torch.tensor([0, 1, 2, 2, 1, 0, 0, 3, 4, 5])
    n = len(train)
    x = torch.randn(n + len(test), 1, 2, 2, generator=torch.Generator().manual_seed(1))
    x[:, 0, 0, 0] += 3 * torch.cat([train, test])
    data = ContinualDataModule((x[:n], train, x[n:], test), increment=3, batch_size=3, seed=0)
    memory = RehearsalConfig(buffer_size=12, num_candidates=3, num_samples=2)
    torch.manual_seed(0)
    agent = NIL(MLP([8]), 6, memory, input_spec=data.input_spec, epochs_per_task=2, task_aware=True)
    if evaluated is not None:
        agent.evaluate = evaluated.evaluate  # type: ignore[method-assign]
    options: dict[str, Any] = {"limit_val_batches": 0, "callbacks": [TaskReport(pictures=False)]}
    job = trainer(strategy, max_epochs=-1, default_root_dir=folder, **options)
    job.fit(agent, datamodule=data)
    return agent, job


def shared_exemplars(folder: Path) -> None:
    """Fit iCaRL, whose exemplars are the same on all workers."""
    y = torch.arange(6).repeat(4)
    x = torch.randn(24, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    data = ContinualDataModule((x, y, x, y), increment=3, batch_size=3)
    agent = ICaRL(MLP([8]), 6, {"buffer_size": 12}, input_spec=data.input_spec)
    options: dict[str, Any] = {"limit_val_batches": 0, "callbacks": [TaskReport(pictures=False)]}
    trainer("horovod", max_epochs=-1, default_root_dir=folder, **options).fit(agent, datamodule=data)
