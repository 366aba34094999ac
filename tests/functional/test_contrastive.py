"""The supervised contrastive loss against loops over NumPy rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcl_lightning.functional import normalise, supervised_contrastive_losses


def by_hand(features: Any, labels: list[int], temperature: float) -> list[float]:
    """Equation 2 of Khosla et al., row by row."""
    rows = [i for i, y in enumerate(labels) if y >= 0]
    losses = [0.0] * len(labels)
    for i in rows:
        others = [a for a in rows if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        exponentials = {a: math.exp(float(features[i] @ features[a]) / temperature) for a in others}
        for p in positives:
            losses[i] -= math.log(exponentials[p] / sum(exponentials.values())) / len(positives)
    return losses


def unit(seed: int, count: int, width: int) -> torch.Tensor:
    return normalise(torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width))))


@given(st.integers(0, 10_000), st.lists(st.integers(-1, 3), min_size=1, max_size=12), st.integers(1, 5),
       st.sampled_from([0.07, 0.5, 2.0]), st.integers(0, 12), st.integers(0, 12))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_against_loops(seed: int, labels: list[int], width: int, tau: float, first: int, last: int) -> None:
    features = unit(seed, len(labels), width)
    expected = by_hand(features.numpy(), labels, tau)
    found = supervised_contrastive_losses(features, torch.tensor(labels), tau)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    part = supervised_contrastive_losses(features, torch.tensor(labels), tau, slice(first, last))
    np.testing.assert_allclose(part, expected[first:last], rtol=1e-9, atol=1e-9)


def test_gradients_are_right_and_finite_where_rows_are_alone() -> None:
    labels = torch.tensor([0, 0, 1, -1, 2, 1])
    features = unit(0, 6, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: supervised_contrastive_losses(z, labels, 0.5), features)
    for few in ([3], [-1], [-1, 3], [-1, -1]):
        z = unit(1, len(few), 3).requires_grad_()
        loss = supervised_contrastive_losses(z, torch.tensor(few), 0.1).sum()
        loss.backward()
        assert float(loss) == 0
        assert z.grad is not None
        assert not z.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_computed_in_single_precision_at_least(dtype: torch.dtype) -> None:
    features, labels = unit(2, 8, 16).to(dtype), torch.arange(8) % 3
    expected = by_hand(features.double().numpy(), labels.tolist(), 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = supervised_contrastive_losses(features, labels, 0.07)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
