"""Image folders on two workers of a host: staged by one of them; index rows against input rows."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from dcl_lightning import NIL, ContinualDataModule
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import TaskReport
from dcl_lightning.types import Batch
from tests.distributed.programs.place import elastic_ddp, flat


def staged(folder: Path) -> None:
    """Write each copied file into ``copied``; losses and weights are the same for every kind of row and strategy."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    inner = shutil.copyfile

    def copyfile(source: str, target: str) -> None:
        with open(folder / "copied", "a") as file:
            file.write(f"{source}\n")
        inner(source, target)

    shutil.copyfile = copyfile  # type: ignore[assignment]
    plain = fit(folder, "horovod")
    same(fit(folder, "horovod", "a", row_format="index"), plain)
    torch.testing.assert_close(fit(folder, elastic_ddp(), "b", execution="blocking"), plain, atol=1e-5, rtol=1e-5)
    everyones = {"scope": "global", "execution": "blocking"}
    same(fit(folder, "horovod", "a", row_format="index", **everyones), fit(folder, "horovod", **everyones))


def same(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Compare bitwise."""
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def fit(folder: Path, strategy: str | Strategy, stage_to: str | None = None, **memory: Any) -> tuple[Tensor, Tensor]:
    """Return losses and weights."""
    pl.seed_everything(0, verbose=False)
    data = ContinualDataModule(
        "imagenet", root=str(folder), stage_to=stage_to and str(folder / stage_to), batch_size=4, num_workers=0,
        source_options={"num_classes": 4, "size": 8},
    )  # fmt: skip
    config = {"buffer_size": 12, "num_candidates": 3, "num_samples": 3, **memory}
    agent = NIL(MLP([8]), 4, config, epochs_per_task=2, lr=0.01, input_spec=data.input_spec)
    losses: list[Tensor] = []
    inner = agent.training_loss

    def spy(batch: Batch) -> tuple[Tensor, Tensor]:
        loss, logits = inner(batch)
        losses.append(loss.detach().clone())
        return loss, logits

    agent.training_loss = spy  # type: ignore[method-assign]  # records what it is given
    pl.Trainer(
        accelerator="cpu", strategy=strategy, devices=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        callbacks=[TaskReport(show_table=False)], default_root_dir=folder,
    ).fit(agent, datamodule=data)  # fmt: skip
    inputs: Any = data.train_inputs
    assert inputs.folder.startswith(str(folder / (stage_to or "ImageNet")))
    return torch.stack(losses), flat(agent)
