"""Figures of an accuracy matrix against loops in NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcl_lightning.functional import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)

NAN = float("nan")


def lower(rows):
    matrix = torch.full((len(rows), len(rows)), NAN, dtype=torch.float64)
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return matrix


@st.composite
def full_matrices(draw):
    size = draw(st.integers(2, 6))
    values = draw(st.lists(st.floats(0, 1), min_size=size * size, max_size=size * size))
    return np.array(values).reshape(size, size)


@pytest.mark.parametrize(
    ("rows", "forgot", "transfer", "average"),
    [([[1], [0, 1]], 1.0, -1.0, 0.5), ([[1], [0.5, 1], [0, 0.5, 1]], 0.75, -0.75, 0.5)],
)
def test_hand_made_matrices(rows, forgot, transfer, average):
    matrix = lower(rows)
    assert forgetting(matrix).item() == forgot
    assert backward_transfer(matrix).item() == transfer
    assert average_accuracy(matrix).item() == average
    assert learning_accuracy(matrix).item() == 1.0


def test_forgetting_can_be_negative_only_without_the_last_row():
    matrix = lower([[0.5], [0.8, 1.0]])
    assert forgetting(matrix).item() == pytest.approx(-0.3)
    assert forgetting(matrix, "max_with_last").item() == 0.0
    assert forgetting(matrix, "first_last").item() == pytest.approx(-0.3)


def test_unknown_mode_names_the_modes():
    with pytest.raises(ValueError, match="max_with_last"):
        forgetting(lower([[1], [1, 1]]), "best")


def test_future_tasks_do_not_count_as_learnt():
    matrix = torch.tensor([[1.0, 0.9, 0.9], [1.0, 0.5, 0.9], [1.0, 0.5, 1.0]])
    assert forgetting(matrix).item() == 0.0
    assert forward_transfer(matrix, torch.tensor([0.0, 0.1, 0.3])).item() == pytest.approx(0.7)


@given(full_matrices())
@settings(max_examples=60, deadline=None)
def test_against_numpy_loops(values):
    size = len(values)
    matrix = torch.from_numpy(values)
    last = values[-1]
    best = [max(values[step, j] for step in range(j, size - 1)) for j in range(size - 1)]
    assert forgetting(matrix).item() == pytest.approx(np.mean([b - last[j] for j, b in enumerate(best)]))
    own = [last[j] - values[j, j] for j in range(size - 1)]
    assert backward_transfer(matrix).item() == pytest.approx(np.mean(own))
    assert forgetting(matrix, "first_last").item() == pytest.approx(-np.mean(own))
    lost = [max(b, last[j]) - last[j] for j, b in enumerate(best)]
    assert forgetting(matrix, "max_with_last").item() == pytest.approx(np.mean(lost))
    ahead = [values[j - 1, j] - 0.1 for j in range(1, size)]
    baseline = torch.full((size,), 0.1)
    assert forward_transfer(matrix, baseline).item() == pytest.approx(np.mean(ahead), abs=1e-7)
    assert average_accuracy(matrix).item() == pytest.approx(np.mean(last))
    assert learning_accuracy(matrix).item() == pytest.approx(np.mean(np.diag(values)))


def test_one_task_leaves_all_but_the_average_open():
    matrix = torch.tensor([[0.4]])
    assert average_accuracy(matrix).item() == pytest.approx(0.4)
    for figure in (forgetting, backward_transfer, learning_accuracy):
        assert math.isnan(figure(matrix).item())
    assert math.isnan(forward_transfer(matrix, torch.zeros(1)).item())
    assert math.isnan(average_incremental_accuracy(torch.tensor([0.4])).item())


def test_forward_transfer_is_open_where_future_tasks_were_not_evaluated():
    assert math.isnan(forward_transfer(lower([[1], [1, 1]]), torch.zeros(2)).item())


def test_average_incremental_accuracy_with_and_without_the_first():
    pooled = torch.tensor([1.0, 0.5, 0.3])
    assert average_incremental_accuracy(pooled).item() == pytest.approx(0.6)
    assert average_incremental_accuracy(pooled, skip_first=True).item() == pytest.approx(0.4)


def test_not_square_is_refused():
    with pytest.raises(ValueError, match="square"):
        average_accuracy(torch.zeros(2, 3))
