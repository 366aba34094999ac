"""Losses against NumPy."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dcl_lightning.functional import icarl_loss, icarl_targets, weighted_cross_entropy


@pytest.fixture
def logits():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


TARGETS = torch.tensor([0, 1, 2, 3, 2, 0])
WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])


def test_cross_entropy_leaves_padding_out(logits):
    loss = weighted_cross_entropy(logits, TARGETS, WEIGHTS, WEIGHTS.sum())
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:5], TARGETS[:5]).item())


def test_workers_average_to_one_process(logits):
    weights = torch.rand(6, generator=torch.Generator().manual_seed(1))
    normalizer = weights.sum() / 2
    parts = [weighted_cross_entropy(logits[s], TARGETS[s], weights[s], normalizer) for s in (slice(2), slice(2, 6))]
    whole = weighted_cross_entropy(logits, TARGETS, weights, weights.sum())
    assert (sum(parts) / 2).item() == pytest.approx(whole.item())


def test_targets_by_kind_of_class():
    teacher = torch.tensor([[2.0, -1.0, 0.5, 3.0]])
    current, remembered = torch.tensor([0, 1, 0, 0]).bool(), torch.tensor([1, 1, 0, 0]).bool()
    got = icarl_targets(torch.tensor([1]), 4, current, remembered, teacher)
    assert got[0].tolist() == pytest.approx([torch.sigmoid(torch.tensor(2.0)).item(), 1.0, 0.0, 0.0])
    # An exemplar of a remembered class: its own label counts for nothing beside the teacher's opinion.
    got = icarl_targets(torch.tensor([0]), 4, current, remembered, teacher)
    assert got[0].tolist() == pytest.approx([torch.sigmoid(torch.tensor(2.0)).item(), 0.0, 0.0, 0.0])


def test_targets_without_teacher():
    current = torch.tensor([1, 1, 0, 0]).bool()
    got = icarl_targets(torch.tensor([1, 2]), 4, current, ~current, None)
    assert got.dtype == torch.float32
    assert got.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("columns", [None, [True, False, True, True]])
@pytest.mark.parametrize("divisor", [1.0, 4.0])
def test_icarl_loss_against_numpy(logits, columns, divisor):
    soft = torch.rand(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = None if columns is None else torch.tensor(columns)
    loss = icarl_loss(logits, soft, WEIGHTS, torch.tensor(2.5), divisor, mask)
    p, q = 1 / (1 + np.exp(-logits.numpy())), soft.numpy()
    bce = -(q * np.log(p) + (1 - q) * np.log(1 - p))
    kept = bce if columns is None else bce[:, np.array(columns)]
    expected = (WEIGHTS.numpy() * kept.sum(1)).sum() / (2.5 * divisor)
    assert loss.item() == pytest.approx(expected)


def test_masked_columns_get_no_gradient(logits):
    logits.requires_grad_()
    mask = torch.tensor([True, False, True, True])
    icarl_loss(logits, torch.zeros(6, 4), WEIGHTS, 5.0, 4.0, mask).backward()
    assert logits.grad[:, 1].abs().sum() == 0
    assert logits.grad[5].abs().sum() == 0
    assert logits.grad[0, 0] != 0
