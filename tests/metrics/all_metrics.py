"""Random streams, and every metric over them against plain NumPy, in one process or on one of several workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn
from torchmetrics import MetricCollection

from dcl_lightning.metrics import (
    AccuracyMatrix,
    AverageAccuracy,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    ClassAccuracy,
    Forgetting,
    ForwardTransfer,
    LearningAccuracy,
)
from tests.metrics import numpy_metrics


@st.composite
def streams(draw):
    """Evaluations of T tasks of two classes each: rows, columns, scores and classes of samples; any task may have none.

    Some evaluate tasks to come, some stop before the last task.
    """
    num_tasks, future = draw(st.integers(1, 5)), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = [draw(st.integers(0, 6)) for _ in range(num_tasks)]
    parts = [
        (row, column, sizes[column])
        for row in range(draw(st.integers(1, num_tasks)))
        for column in range(num_tasks if future else row + 1)
    ]
    row = np.concatenate([np.full(n, i) for i, _, n in parts]).astype(np.int64)
    column = np.concatenate([np.full(n, j) for _, j, n in parts]).astype(np.int64)
    target = 2 * column + rng.integers(0, 2, len(column))
    scores = rng.normal(size=(len(row), 2 * num_tasks))
    scores[np.arange(len(row)), target] += 1.5  # right about half of the time
    return num_tasks, row, column, scores, target


def check(
    stream: Any, rank: int = 0, workers: int = 1, prepare: Callable[[nn.Module], object] = lambda metric: None
) -> None:
    """Compare; each worker is given an uneven part of every evaluation."""
    num_tasks, row, column, scores, target = stream
    mine = np.random.default_rng(len(row)).choice(workers, len(row), p=WEIGHTS[workers]) == rank
    baseline = np.linspace(0.0, 0.5, num_tasks)
    for k in (1, 3):
        metrics = MetricCollection(
            {
                "matrix": AccuracyMatrix(num_tasks, top_k=k),
                "average": AverageAccuracy(num_tasks, top_k=k),
                "incremental": AverageIncrementalAccuracy(num_tasks, top_k=k),
                "without_first": AverageIncrementalAccuracy(num_tasks, top_k=k, skip_first=True),
                "forgetting": Forgetting(num_tasks, top_k=k),
                "with_last": Forgetting(num_tasks, top_k=k, mode="max_with_last"),
                "first_last": Forgetting(num_tasks, top_k=k, mode="first_last"),
                "backward": BackwardTransfer(num_tasks, top_k=k),
                "ahead": ForwardTransfer(num_tasks, baseline, top_k=k),
                "learning": LearningAccuracy(num_tasks, top_k=k),
            }
        )
        prepare(metrics)
        correct, total = np.zeros((2, num_tasks, num_tasks), dtype=int)
        for i in range(num_tasks):
            for j in range(num_tasks):
                here = (row == i) & (column == j)
                hits = [t in np.argsort(-s)[:k] for s, t in zip(scores[here], target[here], strict=True)]
                correct[i, j], total[i, j] = sum(hits), here.sum()
                here &= mine
                metrics.update(torch.from_numpy(scores[here]), torch.from_numpy(target[here]), row=i, column=j)
        found = {name: value.numpy() for name, value in metrics.compute().items()}
        wanted = numpy_metrics.figures(correct, total, baseline)
        wanted["without_first"] = numpy_metrics.figures(correct, total, skip_first=True)["incremental"]
        wanted["matrix"] = np.divide(correct, total, out=np.full(total.shape, np.nan), where=total > 0)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=f"{name}, k={k}")
    by_class = ClassAccuracy(num_tasks, 2 * num_tasks)
    prepare(by_class)
    for i in range(num_tasks):
        here = (row == i) & mine
        by_class.update(torch.from_numpy(scores[here]), torch.from_numpy(target[here]), row=i)
    wanted = numpy_metrics.classes(row, scores.argmax(1), target, num_tasks, 2 * num_tasks)
    np.testing.assert_allclose(by_class.compute().numpy(), wanted, atol=1e-12)


WEIGHTS = {1: [1.0], 2: [0.8, 0.2]}
