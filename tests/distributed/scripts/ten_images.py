"""A user's script: ten test images on three workers; each worker writes how many the matrix counts to ``totalRANK``."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch

from dcl_lightning import ContinualDataModule, FineTuning
from dcl_lightning.backbones import MLP

if __name__ == "__main__":
    x = torch.randn(22, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(22) % 2
    data = ContinualDataModule((x, y, x[:10], y[:10]), increment=2, batch_size=4)
    agent = FineTuning(MLP([4]), data.num_classes, input_spec=data.input_spec)
    trainer = pl.Trainer(
        strategy="horovod", devices=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    Path(f"total{trainer.global_rank}").write_text(str(int(agent.clock.matrix.total[0, 0])))
