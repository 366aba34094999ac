"""Hits among the top scores against sorting in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from dcl_lightning.functional.scores import restricted, top_k_hits
from dcl_lightning.metrics import ClassAccuracy
from dcl_lightning.metrics.evaluation import StreamResults

INF = float("inf")


def sorted_hits(scores: torch.Tensor, targets: torch.Tensor, k: int) -> list[bool]:
    """Classes by score, the highest first, of equal ones the smaller number first; NaN is above all, as in torch."""
    found = []
    for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda y: (-INF if math.isnan(row[y]) else -row[y], y))
        found.append(target in order[:k] and math.isfinite(row[target]))
    return found


@pytest.mark.parametrize("k", [1, 2, 5, 6, 9])
def test_only_finite_scores_count_and_ties_have_an_order(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(3, (200, 6), generator=generator).float()  # many ties
    special = torch.randint(12, scores.shape, generator=generator)
    for number, value in enumerate((-INF, -INF, math.nan, INF)):
        scores[special == number] = value
    targets = torch.randint(6, (200,), generator=generator)
    assert top_k_hits(scores, targets, k).tolist() == sorted_hits(scores, targets, k)


def test_classes_not_learnt_yet_are_never_among_the_five_highest() -> None:
    scores = torch.full((10, 10), -INF)
    scores[:, :2] = torch.rand(10, 2, generator=torch.Generator().manual_seed(0))
    assert top_k_hits(scores, torch.arange(10), 5).tolist() == [True, True] + 8 * [False]


def test_scores_without_a_finite_one_are_never_right() -> None:
    targets = torch.tensor([0, 1, 0])
    for scores in (torch.full((3, 7), -INF), torch.full((3, 7), math.nan)):
        for k in (1, 5):
            assert not top_k_hits(scores, targets, k).any()
        metric = ClassAccuracy(1, 7)
        metric.update(scores, targets, 0)
        assert metric.compute()[0, :2].tolist() == [0, 0]


def test_one_row_of_the_matrix_counts_finite_scores_alone() -> None:
    results = StreamResults([[0, 1], [2, 3], [4, 5, 6]], 7, task_aware=True)
    counts = results.new_counts()
    learnt = torch.tensor([True, True, True, True, False, False, False])
    for column, classes in enumerate(results.tested):
        targets = torch.tensor(classes)
        scores = torch.zeros(len(targets), 7).scatter(1, targets[:, None], 1.0)  # right, but for what is not learnt
        counts.add(column, restricted(scores, learnt), targets)
    results.add(1, counts, lambda tensor: tensor)
    for metric in (results.matrix, results.top5, results.task_aware):
        assert metric.values[1].tolist() == [1, 1, 0]
    assert results.classes.values[1].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert int(results.confusion.sum()) == 7
    assert results.confusion.diagonal().tolist() == [1, 1, 1, 1, 0, 0, 0]
