"""Every metric equals plain NumPy on random streams, with empty tasks, future tasks and truncated streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torchmetrics import MetricCollection

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.metrics import AverageAccuracy, ClassAccuracy, Forgetting, ForwardTransfer
from tests.metrics.all_metrics import check, streams


@given(streams())
@settings(max_examples=25, deadline=None)
def test_every_metric_equals_plain_numpy(stream):
    check(stream)


def test_a_collection_keeps_one_set_of_counts():
    metrics = MetricCollection([AverageAccuracy(3), Forgetting(3)])
    metrics.update(torch.tensor([0, 1]), torch.tensor([0, 0]), row=0, column=0)
    metrics.update(torch.tensor([0, 0]), torch.tensor([0, 0]), row=1, column=0)
    assert len(metrics.compute_groups) == 1
    assert metrics.compute()["AverageAccuracy"] == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Forgetting(2, mode="best"), "max_with_last"),
        (lambda: ForwardTransfer(3, baseline=[0.1]), "baseline has 1 numbers for num_tasks=3"),
        (lambda: ClassAccuracy(2, 0), "num_classes=0"),
    ],
)
def test_wrong_arguments_are_named(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_class_accuracy_refuses_what_does_not_fit():
    metric = ClassAccuracy(2, 3)
    with pytest.raises(IndexError, match="tasks 0 to 1"):
        metric.update(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), row=2)
    with pytest.raises(ValueError, match="target"):
        metric.update(torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), row=0)


def test_reset_leaves_nothing():
    metric = Forgetting(2)
    for row, right in ((0, 1), (1, 0)):
        metric.update(torch.tensor([right]), torch.tensor([1]), row=row, column=0)
    assert metric.compute() == 1.0
    assert metric.over_tasks[1] == 1.0
    metric.reset()
    assert metric.compute().isnan()
