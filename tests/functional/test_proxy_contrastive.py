"""PCR's loss against its program's form in NumPy, which goes over all pairs of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcl_lightning.backbones import CosineHead
from dcl_lightning.functional import proxy_contrastive

CLASSES, WIDTH = 5, 3


def over_pairs(features: np.ndarray, proxies: np.ndarray, labels: list[int], temperature: float) -> float:
    """Each sample is an anchor, and the proxy of each sample's class stands beside it, its own included."""
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    beside = proxies[labels] / np.linalg.norm(proxies[labels], axis=1, keepdims=True)
    losses = []
    for anchor, label in zip(directions, labels, strict=True):
        similarities = [float(anchor @ proxy) / temperature for proxy in beside]
        every = sum(np.exp(similarity) for similarity in similarities)
        positives = [np.log(np.exp(s) / every) for s, other in zip(similarities, labels, strict=True) if other == label]
        losses.append(-sum(positives) / len(positives))
    return sum(losses) / len(losses)


def ours(
    features: torch.Tensor, proxies: torch.Tensor, labels: list[int], temperature: float, parts: int = 1
) -> torch.Tensor:
    """The mean over workers that have a part of the samples each, and the counts of all."""
    head = CosineHead(WIDTH, CLASSES, 1 / temperature)
    logits = torch.func.functional_call(head, {"weight": proxies}, features)
    targets, counts = torch.tensor(labels), torch.bincount(torch.tensor(labels), minlength=CLASSES)
    losses = [
        proxy_contrastive(logits[k::parts], targets[k::parts], counts, torch.ones(len(targets[k::parts])), share)
        for k in range(parts)
        for share in [len(labels) / parts]
    ]
    return torch.stack(losses).mean()


LABELS = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=12)


@given(labels=LABELS, temperature=st.sampled_from([0.09, 0.5, 1.0]), seed=st.integers(0, 1000), parts=st.integers(1, 3))
def test_it_is_the_loss_over_pairs_on_any_number_of_workers(
    labels: list[int], temperature: float, seed: int, parts: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    features, proxies = (torch.randn(n, WIDTH, generator=g, dtype=torch.float64) for n in (len(labels), CLASSES))
    found = ours(features, proxies, labels, temperature, parts)
    assert found.item() == pytest.approx(over_pairs(features.numpy(), proxies.numpy(), labels, temperature), abs=1e-9)


def test_its_gradient_is_that_of_the_loss_over_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    labels, step = [0, 0, 3, 1, 3, 3], 1e-6
    features, proxies = (torch.randn(n, WIDTH, generator=g, dtype=torch.float64) for n in (len(labels), CLASSES))
    given_ones = [features.requires_grad_(), proxies.requires_grad_()]
    ours(features, proxies, labels, 0.2, parts=2).backward()
    for place, tensor in enumerate(given_ones):
        for row, column in np.ndindex(*tensor.shape):
            ends = []
            for sign in (1, -1):
                arrays = [one.detach().numpy().copy() for one in given_ones]
                arrays[place][row, column] += sign * step
                ends.append(over_pairs(arrays[0], arrays[1], labels, 0.2))
            assert tensor.grad is not None
            assert float(tensor.grad[row, column]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)
    assert proxies.grad is not None
    assert not proxies.grad[[2, 4]].any(), "classes without samples are left alone"


@given(labels=LABELS, other=st.integers(0, CLASSES - 1))
def test_rows_of_weight_0_change_nothing(labels: list[int], other: int) -> None:
    g = torch.Generator().manual_seed(len(labels))
    logits = torch.randn(len(labels) + 1, CLASSES, generator=g).requires_grad_()
    targets, counts = torch.tensor([*labels, other]), torch.bincount(torch.tensor(labels), minlength=CLASSES)
    weights = torch.tensor([1.0] * len(labels) + [0.0])
    with_it = proxy_contrastive(logits, targets, counts, weights, len(labels))
    (gradient,) = torch.autograd.grad(with_it, logits)
    without = proxy_contrastive(logits[:-1], targets[:-1], counts, weights[:-1], len(labels))
    torch.testing.assert_close(with_it, without)
    assert torch.isfinite(gradient).all()
    assert not gradient[-1].any()
    alone = proxy_contrastive(logits[-1:], targets[-1:], torch.zeros(CLASSES), torch.zeros(1), 1.0)
    assert float(alone) == 0


def test_samples_of_one_class_have_nothing_to_learn() -> None:
    logits = torch.randn(4, CLASSES).requires_grad_()
    loss = proxy_contrastive(logits, torch.full((4,), 2), torch.tensor([0, 0, 4, 0, 0]), torch.ones(4), 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(4))
    torch.testing.assert_close(logits.grad, torch.zeros(4, CLASSES))
