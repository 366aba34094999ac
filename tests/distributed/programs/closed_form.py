"""Classifiers in closed form on several workers against NumPy over all samples at once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from dcl_lightning.callbacks import TaskReport
from tests.agents.closed_form_truth import NAMES, Normed, make, stream, truth_of
from tests.distributed.programs.place import elastic_ddp, size


def as_numpy(folder: Path, strategy: str) -> None:
    """Statistics and classifiers are those of all samples, each in another order of the classes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, order in zip(NAMES, (None, [4, 1, 5, 0, 3, 2], [5, 4, 3, 2, 1, 0]), strict=True):
        _compare(fit(folder, make(name), strategy, stream(class_order=order)), 1e-10)


def with_a_first_session(folder: Path, strategy: str) -> None:
    """The network learns in the first task only, and the statistics are of the network as it is then."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    agent = make("ranpac", backbone=Normed, first_session=True, lr=0.1, momentum=0.9, weight_decay=0.01,
                 optimizer_reset=False)  # fmt: skip
    before = agent.backbone[1].weight.detach().clone()
    _compare(fit(folder, agent, strategy, stream(batch_size=4)), 1e-10)
    assert not torch.equal(agent.backbone[1].weight, before)
    weights = torch.cat([p.detach().flatten() for p in agent.parameters()])
    assert all(torch.equal(weights, other) for other in agent.comm.allgather(weights))


def _compare(agent: Any, tolerance: float) -> None:
    truth = truth_of(agent, agent.trainer.datamodule)
    for key, value in truth.statistics.items():
        np.testing.assert_allclose(agent.statistics[key].numpy(), value, rtol=tolerance, atol=tolerance, err_msg=key)
    np.testing.assert_allclose(agent.coefficients.numpy(), truth.coefficients, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(agent.offsets.numpy(), truth.offsets, rtol=1e-8, atol=1e-9)


def fit(folder: Path, agent: Any, strategy: str, data: Any) -> Any:
    """Return the agent after its fit on all workers."""
    pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, devices=size(),
        callbacks=[TaskReport(show_table=False)], default_root_dir=folder, precision="64-true",
        strategy=elastic_ddp() if strategy == "ddp" else strategy,
    ).fit(agent, datamodule=data)  # fmt: skip
    assert agent.comm.size == size()
    return agent
