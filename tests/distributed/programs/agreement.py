"""Workers that would not train the same thing are refused, all alike, before the first step."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from dcl_lightning import NIL, ContinualDataModule
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import TaskReport
from dcl_lightning.errors import ConfigurationError
from tests.distributed.programs.place import elastic_ddp, rank

# What worker 1 has of its own: of the agent, of the data module, of the trainer; and what all are told.
CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"lr": 0.2}, {}, {}, "workers differ: model.lr is 0.1 on worker 0 and 0.2 on worker 1; give all of them"),
    ({"epochs_per_task": 2}, {}, {}, "model.epochs_per_task is 1 on worker 0 and 2 on worker 1"),
    ({"rehearsal": {"buffer_size": 24}}, {}, {}, "model.rehearsal.buffer_size is 12 on worker 0 and 24 on worker 1"),
    ({}, {"batch_size": 2}, {}, "data.batch_size is 3 on worker 0 and 2 on worker 1"),
    ({}, {"seed": 5}, {}, "data.seed is 0 on worker 0 and 5 on worker 1"),
    ({}, {}, {"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches is 1 on worker 0 and 2 on worker 1"),
    ({}, {"pixel": 9.0}, {}, "the images of the data is [0-9a-f]{12} on worker 0 and"),
    ({}, {"label": 1}, {}, "the labels of the data is [0-9a-f]{12} on worker 0 and"),
]


def refused(folder: Path, strategy: str) -> None:
    """Each difference is named; folders may differ."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for model, data, trainer, told in CASES:
        with pytest.raises(ConfigurationError) as error:
            fit(folder, strategy, model, data, trainer)
        assert re.search(told, str(error.value)), f"{told}: {error.value}"
    fit(folder, strategy, {}, {"root": f"other/{folder.name}"}, {})


def fit(folder: Path, strategy: str, model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Train, worker 1 with values of its own."""
    model, data, trainer = (dict(values) if rank() == 1 else {} for values in (model, data, trainer))
    y = torch.arange(6).repeat(6)
    x = torch.randn(len(y), 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0] = data.pop("pixel", 0.0)
    y[0] = data.pop("label", 0)
    pl.seed_everything(0, verbose=False)
    data = {"increment": 3, "batch_size": 3, **data}
    model = {"lr": 0.1, "rehearsal": {"buffer_size": 12}, **model}
    stream = ContinualDataModule((x, y, x.clone(), y.clone()), **data)
    agent = NIL(MLP([4]), **model)
    pl.Trainer(
        accelerator="cpu", strategy="horovod" if strategy == "horovod" else elastic_ddp(), devices=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[TaskReport(show_table=False, pictures=False)], default_root_dir=folder, **trainer,
    ).fit(agent, datamodule=stream)  # fmt: skip
