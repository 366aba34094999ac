"""A step's loss and accuracy: logged when a logger or bar reads them, and always those of that step."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from dcl_lightning.callbacks import TaskReport
from tests.conformance.small_stream import ON, make_agent, make_data


class Reader(pl.Callback):
    """Somebody's callback that looks at the values after each batch."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))
        self.losses.append(float(outputs["loss"]))


def fit(folder: Path, callbacks: list[pl.Callback], **options: Any) -> tuple[list[int], pl.Trainer, int]:
    """Return the batches whose values were logged, the trainer, and how many batches an epoch has."""
    data = make_data()
    agent = make_agent("base", data, epochs_per_task=2)
    logged: list[int] = []
    log_dict, count = agent.log_dict, [0]
    step = agent.training_step

    def training_step(batch: Any, batch_idx: int) -> torch.Tensor:
        count[0] += 1
        return step(batch, batch_idx)

    def noted(values: dict[str, Any], **kwargs: Any) -> None:
        logged.append(count[0] - 1)
        log_dict(values, **kwargs)

    agent.training_step, agent.log_dict = training_step, noted
    options = {"logger": False, "enable_checkpointing": bool(callbacks), "enable_progress_bar": False} | options
    callbacks = [*callbacks, TaskReport(pictures=False, show_table=False)]
    trainer = pl.Trainer(default_root_dir=folder, callbacks=callbacks, num_sanity_val_steps=0, **ON, **options)
    trainer.fit(agent, datamodule=data)
    return logged, trainer, count[0]


def test_where_no_one_looks_at_every_step_few_are_logged(tmp_path: Path) -> None:
    # Three tasks of two epochs of three batches: the first and the last of each epoch, and each fifth step.
    logged, trainer, steps = fit(tmp_path, [], log_every_n_steps=5, max_steps=17)
    assert steps == 17
    assert logged == sorted({i for i in range(17) if i % 3 in (0, 2)} | {4, 9, 14} | {16})
    assert {"train/loss", "train/acc", "train/lr"} <= set(trainer.callback_metrics)
    # What is logged for a bar Lightning turns into a number after every step.
    assert not {"train/loss", "train/acc"} & set(trainer.progress_bar_metrics)


@pytest.mark.parametrize("kind", ["reader", "monitor", "bar", "fast_dev_run"])
def test_where_someone_looks_every_step_is_logged(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcl_lightning.callbacks.progress.is_watched", lambda: True)
    reader = Reader()
    callbacks: dict[str, list[pl.Callback]] = {
        "reader": [reader],
        "monitor": [ModelCheckpoint(tmp_path / "best", monitor="train/loss", every_n_train_steps=2, save_top_k=1)],
        "bar": [TQDMProgressBar()],
    }
    options: dict[str, Any] = {"log_every_n_steps": 50, "enable_progress_bar": kind == "bar"}
    options |= {"fast_dev_run": 3} if kind == "fast_dev_run" else {}
    logged, trainer, steps = fit(tmp_path, callbacks.get(kind, []), **options)
    assert logged == list(range(steps))
    assert steps >= 3
    assert reader.values == reader.losses
    assert ("train/loss" in trainer.progress_bar_metrics) == (kind == "bar")


def test_loggers_get_the_values_of_their_steps(tmp_path: Path) -> None:
    rows = []
    for callbacks in ([], [Reader()]):
        logger = CSVLogger(tmp_path, version=len(callbacks))
        pl.seed_everything(0)
        fit(tmp_path, callbacks, log_every_n_steps=4, logger=logger)
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            rows.append([(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert [step for step, _ in rows[0]] == ["3", "7", "11", "15"]
    assert rows[0] == rows[1]
