"""A job that can be resumed by other workers: ``resumed_job.py OUT WORKERS STRATEGY STOP CKPT SCOPE``.

Each worker leaves in ``OUT/RANK.json`` its rank, the ids in its memory at the first step, the memory's capacity, all
steps, the matrix, and the sum of its weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning import ContinualDataModule
from dcl_lightning.agents.short_names import nil
from dcl_lightning.backbones import MLP
from dcl_lightning.memory.config import RehearsalConfig
from tests.distributed.programs.place import flat


class Watch(pl.Callback):
    """Records each step: task, epoch, batch, number of rehearsed rows, and learning rate."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.ids: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, agent: Any, batch: Any, index: int) -> None:
        """Record; and before the first step what is stored."""
        buffer = agent.rehearsal.manager.buffer
        if not self.steps:
            self.ids = buffer.store.gather(buffer.slots_at(torch.arange(len(buffer))))["sample_ids"].tolist()
        epoch = trainer.current_epoch
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append([agent.clock.task_at(epoch), epoch, index, len(batch.targets) - batch.num_new, rate])


def main(out: Path, workers: int, strategy: str, stop: int, ckpt: str, scope: Any) -> None:
    """Fit up to a step; 0: to the end."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(20)
    x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    data = ContinualDataModule((x, y, x.clone(), y.clone()), increment=2, batch_size=2, seed=0)
    pl.seed_everything(0)
    config = RehearsalConfig(num_representatives=3, num_candidates=2, num_samples=4, scope=scope)
    agent = nil(MLP([8]), 6, epochs_per_task=2, lr=0.05, milestones=[1], input_spec=data.input_spec, rehearsal=config)
    watch = Watch()
    saver = ModelCheckpoint(out, every_n_train_steps=stop or 1000, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(
        strategy=strategy, devices=workers, accelerator="cpu", logger=False, default_root_dir=out,
        callbacks=[watch, saver], enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, max_steps=stop or -1,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data, ckpt_path=ckpt or None)
    manager: Any = agent.rehearsal.manager
    matrix = agent.clock.matrix.compute().nan_to_num(-1).tolist()
    state = [
        trainer.global_rank,
        watch.ids,
        manager.buffer.store.capacity,
        watch.steps,
        matrix,
        flat(agent).sum().item(),
    ]
    (out / f"{trainer.global_rank}.json").write_text(json.dumps(state))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5], sys.argv[6])
