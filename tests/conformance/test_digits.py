"""The reference protocol on digits: floors that a wrong method falls below.

A floor is the reference mean - 3 standard errors - 1, for the number of seeds run here.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import lightning.pytorch as pl
import protocol
import pytest
import torch

from dcl_lightning import ContinualDataModule


@pytest.mark.parametrize(
    ("case", "low", "high"),
    [
        ("naive", 0, 25),
        pytest.param("transfer", 92.4, 100, marks=pytest.mark.exhaustive),
        pytest.param("scratch", 90.2, 100, marks=pytest.mark.exhaustive),
        ("icarl, 50 exemplars", 80.8, 100),
        ("icarl, 200 exemplars", 85.5, 100),
        ("nil, 50 stored", 73.3, 100),
        ("nil, 200 stored", 81.1, 100),
        ("er of the tasks' ends, 200 stored", 84.1, 100),
        ("derpp, 50 stored", 87.2, 100),
        ("derpp_task_end, 50 stored", 89.8, 100),
    ],
)
def test_final_accuracy(case: str, low: float, high: float, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    values = [protocol.final_accuracy(protocol.CASES[case], seed, str(tmp_path)) for seed in range(2)]
    assert low <= statistics.mean(values) <= high


def test_icarl_rises_from_task_to_task_where_every_task_has_every_class(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(0)
    data = ContinualDataModule("digits", scenario="domain", num_tasks=5, batch_size=16)
    agent = protocol.icarl(200).build(data)
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(agent, datamodule=data)
    pooled = agent.clock.matrix.pooled
    assert float(pooled[-1]) > float(pooled[0]) + 0.01
