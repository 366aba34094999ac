"""Logged values and metrics on workers with uneven and empty shards against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score

from dcl_lightning import ContinualDataModule, FineTuning
from dcl_lightning.backbones import MLP
from dcl_lightning.data.loader import TaskLoader
from dcl_lightning.metrics import AccuracyMatrix
from tests.distributed.programs.place import rank, size
from tests.distributed.toy import trainer

SAMPLES = 61


class Measured(pl.LightningModule):
    """Logs metrics and values in every way; a step without rows counts for nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        self.accuracy = MulticlassAccuracy(num_classes=3, average="macro")
        self.auroc = BinaryAUROC(thresholds=None)
        self.more = MetricCollection([MulticlassF1Score(num_classes=3), MulticlassAccuracy(num_classes=3)])
        self.mean, self.highest, self.rows = MeanMetric(), MaxMetric(), CatMetric()

    def validation_step(self, batch: Any, index: int) -> None:
        """Take inputs, targets and perhaps weights."""
        inputs, targets = batch[0], batch[1]
        n, out = len(inputs), self.net(inputs)
        losses = nn.functional.cross_entropy(out, targets, reduction="none")
        if n:
            self.accuracy.update(out, targets)
            self.auroc.update(out[:, 0].sigmoid(), (targets == 0).long())
            self.more.update(out, targets)
            self.mean.update(losses, inputs[:, 0].abs())
            self.highest.update(losses)
            self.rows.update(losses)
        both: Any = {"on_step": False, "on_epoch": True}
        self.log("accuracy", self.accuracy, **both)
        self.log("auroc", self.auroc, **both)
        self.log_dict(self.more, **both)
        self.log("mean", self.mean, **both)
        self.log("highest", self.highest, **both)
        logged: Any = {**both, "sync_dist": True, "batch_size": n}
        self.log("loss", losses.sum() / max(n, 1), **logged)
        nothing = torch.tensor([-torch.inf])
        self.log("max", torch.cat([losses, nothing]).max(), reduce_fx="max", **logged)
        self.log("min", -torch.cat([-losses, nothing]).max(), reduce_fx="min", **logged)
        self.log("sum", losses.sum(), reduce_fx="sum", **logged)
        self.log("count", float(n), reduce_fx="sum", **logged)

    def on_validation_epoch_end(self) -> None:
        """Log a function of all rows."""
        self.log("spread", self.rows.compute().std())
        self.rows.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end


def check(found: list[Any], wanted: list[Any]) -> None:
    """Compare two evaluations."""
    assert found[0].keys() == wanted[0].keys()
    for name, value in wanted[0].items():
        assert abs(found[0][name] - value) < 1e-6 * max(1, abs(value)), (name, found, wanted)
    assert found[0]["count"] == SAMPLES


def logged(folder: Path) -> None:
    """Plain modules on any number of workers, agents on those that divide a batch of six."""
    check_modules()
    if 6 % size() == 0:
        check_agents(folder)


def check_modules() -> None:
    """A plain module: uneven shards, and shards of which only worker 0's has anything at all."""
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(SAMPLES, 4, generator=g), torch.randint(0, 3, (SAMPLES,), generator=g)
    whole = trainer("auto").validate(Measured(), DataLoader(TensorDataset(x, y), batch_size=7), verbose=False)
    # Other numbers of rows and of batches on each worker.
    cuts = {2: [0, 40, 61], 3: [0, 34, 60, 61]}[size()]
    mine = TensorDataset(x[cuts[rank()] : cuts[rank() + 1]], y[cuts[rank()] : cuts[rank() + 1]])
    t = trainer("horovod")
    check(t.validate(Measured(), DataLoader(mine, batch_size=7), verbose=False), whole)
    check(t.test(Measured(), DataLoader(mine, batch_size=7), verbose=False), whole)
    alone = TaskLoader(x, y, torch.zeros_like(y), 7, torch.arange(SAMPLES), 0, 1 if rank() == 0 else 10**6)
    alone.rank, alone.for_all = (0 if rank() == 0 else 10**6 - 1), True
    check(trainer("horovod").validate(Measured(), alone, verbose=False), whole)


def check_agents(folder: Path) -> None:
    """The package's own data and agents, a loader for each task: tests of 1, 2 and 5 images, trained on 1, 2 and 9."""
    matrix, logged, predicted, _ = agent_run("auto", folder, 6)
    theirs, found, few, job = agent_run("horovod", folder, 6 // size())
    assert torch.equal(theirs.correct, matrix.correct)
    assert torch.equal(theirs.total, matrix.total)
    assert found.keys() == logged.keys()
    assert "val/acc_task_0" in found
    for name, value in logged.items():
        assert abs(found[name] - value) < 1e-5, (name, found, logged)
    everyones = job.strategy.reduce(torch.tensor(few), reduce_op="sum")
    assert isinstance(everyones, Tensor)
    assert everyones == predicted == 8


def agent_run(strategy: str, folder: Path, batch_size: int) -> tuple[AccuracyMatrix, dict[str, float], int, pl.Trainer]:
    """Fit, test and predict."""
    train = torch.tensor([0] + [1] * 2 + [2] * 9)
    test = torch.tensor([0] + [1] * 2 + [2] * 5)
    pictures = torch.randn(20, 1, 2, 2, generator=torch.Generator().manual_seed(6))
    splits = pictures[:12], train, pictures[12:], test
    data = ContinualDataModule(splits, increment=1, batch_size=batch_size, validate_on="test")
    torch.manual_seed(0)
    agent = FineTuning(MLP([4]), data.num_classes, input_spec=data.input_spec, epochs_per_task=2)
    t = trainer(strategy, max_epochs=-1, num_sanity_val_steps=2, default_root_dir=folder)
    t.fit(agent, datamodule=data)
    logged = {k: float(v) for k, v in t.callback_metrics.items() if k.startswith("val/")}
    logged |= t.test(agent, datamodule=data, verbose=False)[0]
    parts: Any = t.predict(agent, datamodule=data)
    return agent.clock.matrix, logged, sum(len(rows.labels) for part in parts for rows in part), t
