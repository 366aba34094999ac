"""The choice of the samples that a step rehearses, against NumPy and plain sorting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcl_lightning.functional import highest_of_parts, interference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_interference_is_the_growth_of_each_samples_cross_entropy(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 7, 4, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(4, (7,), generator=g)
    growth = []
    for one, other, y in zip(before.double().numpy(), after.double().numpy(), targets.tolist(), strict=True):
        losses = [-math.log(np.exp(z[y]) / np.exp(z).sum()) for z in (one, other)]
        growth.append(losses[1] - losses[0])
    found = interference(before, after, targets)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(found.double(), growth, atol=1e-6)


# Few different values, so that many are equal.
PARTS = st.lists(st.lists(st.integers(-2, 2), max_size=6), min_size=1, max_size=4)


@given(PARTS, st.integers(0, 20))
def test_the_highest_of_all_parts_are_those_of_one_sorted_list(parts: list[list[int]], count: int) -> None:
    scores = [(-value, part, place) for part, values in enumerate(parts) for place, value in enumerate(values)]
    wanted = {(part, place) for _, part, place in sorted(scores)[:count]}
    found = highest_of_parts([torch.tensor(values, dtype=torch.float32) for values in parts], count)
    assert [len(mask) for mask in found] == [len(values) for values in parts]
    assert {(part, place) for part, mask in enumerate(found) for place in mask.nonzero().flatten().tolist()} == wanted
