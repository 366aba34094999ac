"""Herding and nearest-mean scores against NumPy."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcl_lightning.functional import class_means, herd, nearest_mean_scores, nearest_to_mean, normalise


def herd_by_hand(features, m):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean, chosen = unit.mean(0), []
    for k in range(1, m + 1):
        costs = {
            i: np.linalg.norm(mean - (unit[i] + sum(unit[c] for c in chosen)) / k)
            for i in range(len(unit))
            if i not in chosen
        }
        chosen.append(min(costs, key=costs.get))
    return chosen


# Of two samples both are equally near to their mean: rounding decides.
@given(st.integers(0, 10_000), st.integers(1, 25).filter(lambda n: n != 2), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_herding_against_numpy(seed, n, d):
    features = np.random.default_rng(seed).normal(size=(n, d)) * 3
    m = min(n, 8) if d > 1 else 1  # in one dimension rounding decides among equals
    assert herd(torch.from_numpy(features), m).tolist() == herd_by_hand(features, m)


def test_a_shorter_list_is_the_start_of_a_longer_one():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    assert herd(features, 20)[:7].tolist() == herd(features, 7).tolist()


def test_all_are_chosen_once_and_ties_go_to_the_lowest_index():
    order = herd(torch.ones(6, 3), 10)
    assert order.dtype == torch.int64
    assert order.tolist() == [0, 1, 2, 3, 4, 5]
    assert nearest_to_mean(torch.ones(6, 3), 4).tolist() == [0, 1, 2, 3]


def test_herding_ignores_the_norm_and_nearest_does_not():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    scaled = features * torch.tensor([[100.0], [1.0], [1.0]])
    assert herd(scaled, 3).tolist() == herd(features, 3).tolist() == [2, 0, 1]
    assert nearest_to_mean(scaled, 3).tolist() == [2, 1, 0]


def test_nothing_wanted_nothing_chosen():
    assert herd(torch.randn(3, 2), 0).shape == nearest_to_mean(torch.randn(3, 2), 0).shape == (0,)


def test_herded_exemplars_approach_the_mean_better_than_the_first_ones():
    unit = normalise(torch.randn(200, 8, generator=torch.Generator().manual_seed(1)).double())
    errors = [(unit[rows].mean(0) - unit.mean(0)).norm() for rows in (herd(unit, 10), torch.arange(10))]
    assert errors[0] < errors[1] / 3


def test_normalise_keeps_zero_vectors_finite():
    assert normalise(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        [0.6000000238418579, 0.800000011920929],
        [0, 0],
    ]


def test_nearest_mean_scores():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    means = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    scores = nearest_mean_scores(features, means, torch.tensor([True, True, False]))
    assert scores.tolist() == [[0.0, -3.0, -float("inf")], [-5.0, -4.0, -float("inf")]]


@given(st.integers(0, 10_000), st.lists(st.integers(0, 4), max_size=15), st.integers(1, 4))
def test_class_means_against_numpy(seed, labels, width):
    features = np.random.default_rng(seed).normal(size=(len(labels), width))
    means, known = class_means(torch.from_numpy(features), torch.tensor(labels, dtype=torch.int64), 6)
    for y in range(6):
        rows = [feature for feature, label in zip(features, labels, strict=True) if label == y]
        assert bool(known[y]) == bool(rows)
        np.testing.assert_allclose(means[y], np.mean(rows, axis=0) if rows else np.zeros(width), atol=1e-12)
