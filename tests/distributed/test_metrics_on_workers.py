"""What is logged and measured on two and three workers with uneven and empty shards equals one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.workers import assert_ended_well, run_workers


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_logged_values_and_metrics_equal_one_process(workers: int, tmp_path: Path) -> None:
    assert_ended_well(run_workers(f"FOLDER = {str(tmp_path)!r}\n{SOURCE}", workers))


SOURCE = """
import os, torch, lightning.pytorch as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score
from tests.distributed.toy import trainer
from dcl_lightning import ContinualDataModule, FineTuning
from dcl_lightning.backbones import MLP
from dcl_lightning.data.loader import TaskLoader

rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
g = torch.Generator().manual_seed(5)
x, y = torch.randn(61, 4, generator=g), torch.randint(0, 3, (61,), generator=g)


class Measured(pl.LightningModule):
    # Each step takes inputs, targets and weights; a step without rows counts for nothing.
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        self.accuracy = MulticlassAccuracy(num_classes=3, average="macro")
        self.auroc = BinaryAUROC(thresholds=None)
        self.more = MetricCollection([MulticlassF1Score(num_classes=3), MulticlassAccuracy(num_classes=3)])
        self.mean, self.highest, self.rows = MeanMetric(), MaxMetric(), CatMetric()

    def validation_step(self, batch, index):
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
        both = {"on_step": False, "on_epoch": True}
        self.log("accuracy", self.accuracy, **both)
        self.log("auroc", self.auroc, **both)
        self.log_dict(self.more, **both)
        self.log("mean", self.mean, **both)
        self.log("highest", self.highest, **both)
        logged = {**both, "sync_dist": True, "batch_size": n}
        self.log("loss", losses.sum() / max(n, 1), **logged)
        nothing = torch.tensor([-torch.inf])
        self.log("max", torch.cat([losses, nothing]).max(), reduce_fx="max", **logged)
        self.log("min", -torch.cat([-losses, nothing]).max(), reduce_fx="min", **logged)
        self.log("sum", losses.sum(), reduce_fx="sum", **logged)
        self.log("count", float(n), reduce_fx="sum", **logged)

    def on_validation_epoch_end(self):
        self.log("spread", self.rows.compute().std())
        self.rows.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end


def check(found, wanted):
    assert found[0].keys() == wanted[0].keys(), (found, wanted)
    for name in wanted[0]:
        assert abs(found[0][name] - wanted[0][name]) < 1e-6 * max(1, abs(wanted[0][name])), (name, found, wanted)
    assert found[0]["count"] == len(x)


whole = trainer("auto").validate(Measured(), DataLoader(TensorDataset(x, y), batch_size=7), verbose=False)

# Uneven: other numbers of rows and of batches on each worker.
cuts = {2: [0, 40, 61], 3: [0, 34, 60, 61]}[size]
mine = TensorDataset(x[cuts[rank] : cuts[rank + 1]], y[cuts[rank] : cuts[rank + 1]])
t = trainer("horovod")
check(t.validate(Measured(), DataLoader(mine, batch_size=7), verbose=False), whole)
check(t.test(Measured(), DataLoader(mine, batch_size=7), verbose=False), whole)

# Empty: only worker 0 has anything at all.
alone = TaskLoader(x, y, torch.zeros_like(y), 7, torch.arange(61), 0, 1 if rank == 0 else 10**6)
alone.rank, alone.for_all = (0 if rank == 0 else 10**6 - 1), True
check(trainer("horovod").validate(Measured(), alone, verbose=False), whole)


# The package's own data and agents, a loader for each task: tests of 1, 2 and 5 images, trained on 1, 2 and 9.
def run(strategy):
    train = torch.tensor([0] + [1] * 2 + [2] * 9)
    test = torch.tensor([0] + [1] * 2 + [2] * 5)
    pictures = torch.randn(20, 1, 2, 2, generator=torch.Generator().manual_seed(6))
    data = ContinualDataModule((pictures[:12], train, pictures[12:], test), increment=1, batch_size=6 // t_size)
    torch.manual_seed(0)
    agent = FineTuning(MLP([4]), data.num_classes, input_spec=data.input_spec, epochs_per_task=2)
    fitted = trainer(strategy, max_epochs=-1, num_sanity_val_steps=2, default_root_dir=FOLDER)
    fitted.fit(agent, datamodule=data)
    logged = {k: float(v) for k, v in fitted.callback_metrics.items() if k.startswith("val/")}
    logged |= fitted.test(agent, datamodule=data, verbose=False)[0]
    parts = fitted.predict(agent, datamodule=data)
    return agent.clock.matrix, logged, sum(len(rows.labels) for part in parts for rows in part)


t_size = 1
matrix, logged, predicted = run("auto")
t_size = size
if 6 % size == 0:
    theirs, found, few = run("horovod")
    assert torch.equal(theirs.correct, matrix.correct) and torch.equal(theirs.total, matrix.total)
    assert found.keys() == logged.keys() and "val/acc_task_0" in found
    for name in logged:
        assert abs(found[name] - logged[name]) < 1e-5, (name, found, logged)
    assert t.strategy.reduce(torch.tensor(few), reduce_op="sum") == predicted == 8
"""
