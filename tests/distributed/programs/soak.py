"""A shortened long run on two workers: 20 tasks of 10 epochs, background memory work, many checkpoints."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning import ContinualDataModule
from dcl_lightning.agents.short_names import nil_global
from dcl_lightning.backbones import MLP
from dcl_lightning.memory.config import RehearsalConfig

TASKS, EPOCHS = 20, 10


class Watch(pl.Callback):
    """Records memory, threads, open files and the time of a step at the end of each task."""

    def __init__(self) -> None:
        self.tasks: list[dict[str, float]] = []
        self.times: list[float] = []
        self.mark = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self.mark = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(time.perf_counter() - self.mark)

    def on_task_evaluated(self, trainer: pl.Trainer, agent: pl.LightningModule, task: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.tasks.append(
            {"task": task.index, "rss": pages * os.sysconf("SC_PAGE_SIZE"),
             "threads": len(os.listdir("/proc/self/task")), "files": len(os.listdir("/proc/self/fd")),
             "step_ms": 1e3 * sorted(self.times)[len(self.times) // 10]}
        )  # fmt: skip
        self.times = []


def long_run(folder: Path) -> None:
    """Leave what was recorded, and what is left in shared memory, in ``RANK.json``."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(TASKS).repeat(512)
    x = torch.randn(TASKS, 1, 8, 8, generator=g)[y] + torch.randn(len(y), 1, 8, 8, generator=g)
    data = ContinualDataModule((x, y, x[:200], y[:200]), increment=1, batch_size=8, seed=0)
    pl.seed_everything(0)
    config = RehearsalConfig(buffer_size=400, num_samples=8, scope="global", execution="blocking")
    agent = nil_global(MLP([32]), TASKS, epochs_per_task=EPOCHS, lr=0.01, input_spec=data.input_spec, rehearsal=config)
    watch = Watch()
    saver = ModelCheckpoint(folder / "c", every_n_train_steps=50, save_last=True)
    trainer = pl.Trainer(
        strategy="horovod", accelerator="cpu", logger=False, default_root_dir=folder, callbacks=[watch, saver],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    shared = sorted(os.listdir("/dev/shm"))
    trainer.fit(agent, datamodule=data)
    left = sorted(set(os.listdir("/dev/shm")) - set(shared))
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps({"tasks": watch.tasks, "shm": left}))
