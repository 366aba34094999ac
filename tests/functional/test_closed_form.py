"""Classifiers in closed form against plain NumPy over the samples themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcl_lightning.functional import (
    best_ridge,
    class_sums,
    held_out,
    lda_classifier,
    ridge_classifier,
    ridge_errors,
)

RNG = np.random.default_rng(0)
N, D, K = 60, 5, 4
LABELS = RNG.integers(0, K - 1, N)  # the last class has no samples
FEATURES = RNG.normal(size=(N, D)) + 3 * LABELS[:, None]
ONE_HOT = np.eye(K)[LABELS]


def of(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def pair(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return of(FEATURES[rows].T @ FEATURES[rows]), of(FEATURES[rows].T @ ONE_HOT[rows])


def test_sums_of_classes() -> None:
    sums, counts = class_sums(of(FEATURES), of(LABELS), K)
    np.testing.assert_allclose(sums.numpy(), [FEATURES[k == LABELS].sum(0) for k in range(K)], rtol=1e-13)
    assert counts.tolist() == [(k == LABELS).sum() for k in range(K)]


@pytest.mark.parametrize("shrinkage", [1e-4, 0.5, 1.0])
def test_lda_is_that_of_the_samples(shrinkage: float) -> None:
    weights, biases = lda_classifier(*class_sums(of(FEATURES), of(LABELS), K), of(FEATURES.T @ FEATURES), shrinkage)
    means = np.stack([FEATURES[k == LABELS].mean(0) for k in range(K - 1)])
    around = FEATURES - means[LABELS]
    inverse = np.linalg.inv((1 - shrinkage) * around.T @ around / N + shrinkage * np.eye(D))
    np.testing.assert_allclose(weights[: K - 1].numpy(), means @ inverse, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        biases[: K - 1].numpy(), -np.einsum("ki,ij,kj->k", means, inverse, means) / 2, rtol=1e-10
    )
    assert not weights[-1].any()
    assert biases[-1] == 0
    # Up to a constant of the sample it is minus half the squared Mahalanobis distance.
    scores = FEATURES @ weights[: K - 1].numpy().T + biases[: K - 1].numpy()
    away = FEATURES[:, None] - means[None]
    half = -np.einsum("nki,ij,nkj->nk", away, inverse, away) / 2
    np.testing.assert_allclose(scores - scores[:, :1], half - half[:, :1], rtol=1e-8, atol=1e-8)


def test_ridge_regression_is_that_of_the_samples() -> None:
    found = ridge_classifier(*pair(np.arange(N)), 0.3)
    longer = np.concatenate([FEATURES, np.sqrt(0.3) * np.eye(D)])  # the penalty as further samples
    expected = np.linalg.lstsq(longer, np.concatenate([ONE_HOT, np.zeros((D, K))]), rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), expected.T, rtol=1e-9, atol=1e-11)


def test_errors_on_held_out_samples_need_no_samples() -> None:
    ridges = [10.0**power for power in range(-8, 9)]
    fitted, held = np.arange(45), np.arange(45, N)
    errors = ridge_errors(pair(fitted), pair(held), len(held), ridges)
    expected = []
    for ridge in ridges:
        gram = FEATURES[fitted].T @ FEATURES[fitted] + ridge * np.eye(D)
        weights = np.linalg.solve(gram, FEATURES[fitted].T @ ONE_HOT[fitted])
        expected.append(((FEATURES[held] @ weights - ONE_HOT[held]) ** 2).sum())
    np.testing.assert_allclose(errors.numpy(), expected, rtol=1e-9)
    assert best_ridge(pair(fitted), pair(held), len(held), ridges) == ridges[int(np.argmin(expected))]


def test_of_lambdas_without_a_difference_the_largest_is_taken() -> None:
    nothing = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, K, dtype=torch.float64)
    assert best_ridge(pair(np.arange(45)), nothing, 0.0, [0.1, 1.0, 10.0]) == 10.0
    assert best_ridge(nothing, pair(np.arange(45)), 45.0, [0.1, 1.0]) == 1.0


def test_a_hash_holds_out_the_share_of_any_range_of_ids() -> None:
    for first in (0, 10_000, 1_281_167):
        held = held_out(torch.arange(first, first + 5000), 0.2)
        assert abs(float(held.double().mean()) - 0.2) < 0.01
    assert not held_out(torch.arange(9), 0.0).any()
    assert held_out(torch.arange(9), 1.0).all()
