"""``killed_job.py FOLDER AGENT WORKERS``: fits an agent, saves at each step, and resumes from the last one.

Each worker writes its process id into ``FOLDER/pids`` when it trains, and what it ended with into
``FOLDER/end_RANK.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning.callbacks import TaskReport
from dcl_lightning.checkpoint.directory import latest_checkpoint
from tests.conformance.agents import make
from tests.conformance.rehearsal_runs import memory_state
from tests.conformance.small_stream import make_data, matrix, weights


class Tell(pl.Callback):
    """Tells when training begins, and at which step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.first = folder, -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first = trainer.global_step
        with (self.folder / "pids").open("a") as file:
            file.write(f"{os.getpid()}\n")


def main(folder: Path, name: str, workers: int) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    path, problems = latest_checkpoint((folder / "checkpoints").glob("*.ckpt"))
    assert not problems, problems
    data: Any = make_data(batch_size=2)
    agent = make(name, data)
    tell = Tell(folder)
    saver = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_last=True, filename="{step}")
    trainer = pl.Trainer(
        strategy="horovod",
        devices=workers,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[tell, saver, TaskReport(pictures=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(agent, datamodule=data, ckpt_path=path)
    manager = getattr(agent.rehearsal, "manager", None)
    end = {
        "weights": weights(agent),
        "matrix": matrix(agent).nan_to_num(-1),
        "memory": None if manager is None else memory_state(manager),
        "first": tell.first,
        "steps": trainer.global_step,
    }
    torch.save(end, folder / f"end_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
