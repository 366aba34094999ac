"""The accuracy matrix: counts, figures, state."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.metrics import AccuracyMatrix


def test_always_class_zero():
    matrix = AccuracyMatrix(2)
    zeros = torch.zeros(4, dtype=torch.int64)
    for row, column, target in [(0, 0, [0, 0, 1, 1]), (1, 0, [0, 0, 1, 1]), (1, 1, [2, 2, 3, 3])]:
        matrix.update(zeros, torch.tensor(target), row, column)
    got = matrix.compute()
    assert got.dtype == torch.float64
    assert got[0, 0] == 0.5
    assert math.isnan(got[0, 1])
    assert got[1].tolist() == [0.5, 0.0]
    assert matrix.pooled.tolist() == [0.5, 0.25]


@given(st.integers(0, 1000), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_top_k_against_numpy(seed, k):
    rng = np.random.default_rng(seed)
    scores, target = rng.normal(size=(12, 5)), rng.integers(0, 5, 12)
    matrix = AccuracyMatrix(1, top_k=k)
    for part in (slice(5), slice(5, 12)):
        matrix.update(torch.from_numpy(scores[part]), torch.from_numpy(target[part]), 0, 0)
    hits = [t in np.argsort(-s)[:k] for s, t in zip(scores, target, strict=True)]
    assert matrix.compute().item() == pytest.approx(np.mean(hits))


def test_top_k_of_fewer_classes_is_always_right():
    matrix = AccuracyMatrix(1, top_k=5)
    matrix.update(torch.randn(3, 2), torch.tensor([0, 1, 1]), 0, 0)
    assert matrix.compute().item() == 1.0


def test_counts_replace_and_nothing_is_carried_over():
    matrix = AccuracyMatrix(2)
    matrix.add_counts(1, 2, 0, 0)
    assert matrix.compute()[0, 0] == 0.5
    matrix.add_counts(torch.tensor(3), torch.tensor(3), 0, 0)
    assert matrix.compute()[0, 0] == 1.0
    matrix.reset()
    assert matrix.compute().isnan().all()


def test_figures_of_the_rows_so_far():
    matrix = AccuracyMatrix(3)
    matrix.add_counts(10, 10, 0, 0)
    assert matrix.average_accuracy == 1.0
    assert math.isnan(matrix.forgetting)
    matrix.add_counts(5, 10, 1, 0)
    matrix.add_counts(30, 30, 1, 1)
    assert (matrix.average_accuracy, matrix.forgetting, matrix.backward_transfer) == (0.75, 0.5, -0.5)
    assert matrix.pooled[:2].tolist() == [1.0, 0.875]
    assert matrix.average_incremental_accuracy == 0.9375
    assert matrix.learning_accuracy == 1.0


def test_pooled_leaves_future_tasks_out():
    matrix = AccuracyMatrix(2)
    matrix.add_counts(1, 1, 0, 0)
    matrix.add_counts(0, 9, 0, 1)
    assert matrix.pooled[0] == 1.0


@pytest.mark.parametrize(("preds", "target"), [((3, 2), 4), ((3,), 2), ((2, 2, 2), 2)])
def test_shapes_that_do_not_fit(preds, target):
    with pytest.raises(ValueError, match="target"):
        AccuracyMatrix(1).update(torch.zeros(preds), torch.zeros(target, dtype=torch.int64), 0, 0)


def test_wrong_arguments():
    with pytest.raises(ConfigurationError, match="num_tasks=0"):
        AccuracyMatrix(0)
    with pytest.raises(IndexError, match="tasks 0 to 1"):
        AccuracyMatrix(2).add_counts(1, 1, 2, 0)
    with pytest.raises(ValueError, match="needs scores"):
        AccuracyMatrix(1, top_k=2).update(torch.zeros(2), torch.zeros(2), 0, 0)


def test_plot_writes_the_values_into_the_cells():
    pytest.importorskip("matplotlib").use("Agg")
    matrix = AccuracyMatrix(2)
    matrix.add_counts(1, 8, 0, 0)
    matrix.add_counts(1, 1, 1, 1)
    figure, ax = matrix.plot()
    assert [t.get_text() for t in ax.texts] == ["12.5", "100.0"]
    assert "task" in ax.get_xlabel()
    assert "task" in ax.get_ylabel()
    assert matrix.plot(ax=ax)[0] is figure
