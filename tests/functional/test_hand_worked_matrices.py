"""Matrices worked by hand with the papers' formulas; continuum gets the first two wrong."""

from __future__ import annotations

from fractions import Fraction as F

import pytest
import torch

from dcl_lightning.functional import average_accuracy, backward_transfer, forgetting, learning_accuracy

N = None  # not evaluated, or not defined

# rows; average accuracy, forgetting (max-last), the same with the last row, backward transfer, learning accuracy
WORKED = {
    "all is lost": ([[1], [0, 1]], F(1, 2), F(1), F(1), F(-1), F(1)),
    "half is lost": ([[1], [F(1, 2), 1], [0, F(1, 2), 1]], F(1, 2), F(3, 4), F(3, 4), F(-3, 4), F(1)),
    "one task": ([[F(2, 5)]], F(2, 5), N, N, N, N),
    "nothing is lost": ([[1], [1, 1], [1, 1, 1]], F(1), F(0), F(0), F(0), F(1)),
    # R[2, 0] is better than ever before: (1/2 - 3/4 + 1 - 1) / 2.
    "later tasks help": ([[F(1, 2)], [F(1, 4), 1], [F(3, 4), 1, 1]], F(11, 12), F(-1, 8), F(0), F(1, 8), F(5, 6)),
    # The best of task 0 is in row 1: (3/4 - 1/4) and, for task 1, (1/2 - 1/2).
    "best in between": ([[F(1, 2)], [F(3, 4), F(1, 2)], [F(1, 4), F(1, 2), 1]], F(7, 12), F(1, 4), F(1, 4), F(-1, 8),
                        F(2, 3)),
    # What an entry above the diagonal shows was not learnt and cannot be forgotten.
    "tasks to come": ([[1, 1, 1], [1, F(1, 2), 1], [1, F(1, 2), 1]], F(5, 6), F(0), F(0), F(0), F(5, 6)),
    # Task 1 has no test samples: its terms are left out of every mean.
    "an empty task": ([[1], [F(1, 2), N], [F(1, 4), N, 1]], F(5, 8), F(3, 4), F(3, 4), F(-3, 4), F(1)),
    # Task 0 has none: of two tasks no term is left.
    "first task empty": ([[N], [N, F(1, 2)]], F(1, 2), N, N, N, F(1, 2)),
    "last task empty": ([[1], [F(1, 2), N]], F(1, 2), F(1, 2), F(1, 2), F(-1, 2), F(1)),
    "nothing is learnt": ([[0], [0, 0], [0, 0, 0]], F(0), F(0), F(0), F(0), F(0)),
    # Max of task 0 over rows 0..2 is 4/5; of task 1 over rows 1..2 it is 3/5; of task 2 in row 2 it is 1.
    "four tasks": (
        [[F(4, 5)], [F(3, 5), F(2, 5)], [F(1, 5), F(3, 5), 1], [F(2, 5), F(1, 5), F(4, 5), 1]],
        F(3, 5), F(1, 3), F(1, 3), F(-4, 15), F(4, 5),
    ),
    # Row 1 was not evaluated at all: the maximum is over the rows that were.
    "a row left out": ([[1], [N, N], [F(1, 2), F(1, 2), 1]], F(2, 3), F(1, 2), F(1, 4), F(-1, 2), F(1)),
}  # fmt: skip


@pytest.mark.parametrize("case", WORKED.values(), ids=WORKED.keys())
def test_worked_by_hand(case):
    rows, average, forgot, with_last, transfer, learning = case
    size = len(rows)
    full = [[*row, *[N] * (size - len(row))] for row in rows]
    matrix = torch.tensor([[float("nan") if v is N else float(v) for v in row] for row in full], dtype=torch.float64)
    found = [
        average_accuracy(matrix),
        forgetting(matrix),
        forgetting(matrix, "max_with_last"),
        backward_transfer(matrix),
        learning_accuracy(matrix),
    ]
    for value, wanted in zip(found, (average, forgot, with_last, transfer, learning), strict=True):
        assert value.isnan() if wanted is N else value.item() == pytest.approx(float(wanted), abs=1e-15)
    assert forgetting(matrix, "first_last").item() == pytest.approx(-backward_transfer(matrix).item(), nan_ok=True)
