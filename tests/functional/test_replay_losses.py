"""Losses of the replay family and of distillation against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dcl_lightning.functional import (
    asymmetric_cross_entropy,
    distillation_share,
    fitted_bias,
    logit_matching,
    tempered_distillation,
)

G = torch.Generator().manual_seed(0)
LOGITS, OTHERS = torch.randn(2, 6, 4, generator=G, dtype=torch.float64)
TARGETS = torch.tensor([0, 2, 2, 0, 2, 0])
WEIGHTS = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.5, 0.0])
N = 5.5


def softmax(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z - z.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_asymmetric_cross_entropy() -> None:
    classes = torch.tensor([True, False, True, False])
    found = asymmetric_cross_entropy(LOGITS, TARGETS, classes, WEIGHTS, N)
    z = LOGITS.numpy()
    expected = sum(
        w * -np.log(np.exp(z[i, y]) / (np.exp(z[i, 0]) + np.exp(z[i, 2])))
        for i, (y, w) in enumerate(zip(TARGETS.tolist(), WEIGHTS.tolist(), strict=True))
    )
    assert found.item() == pytest.approx(expected / N)
    logits = LOGITS.clone().requires_grad_()
    asymmetric_cross_entropy(logits, TARGETS, classes, WEIGHTS, N).backward()
    assert float(logits.grad[:, [1, 3]].abs().max()) == 0, "other classes are not pushed down"


def test_logit_matching() -> None:
    expected = (WEIGHTS.numpy() * ((LOGITS - OTHERS).numpy() ** 2).mean(1)).sum() / N
    assert logit_matching(LOGITS, OTHERS, WEIGHTS, N).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tempered_distillation(temperature: float) -> None:
    found = tempered_distillation(LOGITS, OTHERS, WEIGHTS, N, temperature)
    # As equation 3 has it: probabilities to the power 1 / T, made to sum to 1.
    p, q = softmax(OTHERS.numpy()) ** (1 / temperature), softmax(LOGITS.numpy()) ** (1 / temperature)
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert found.item() == pytest.approx((WEIGHTS.numpy() * -(p * np.log(q)).sum(1)).sum() / N)


@pytest.mark.parametrize("loss", ["asymmetric", "matching", "distillation"])
def test_workers_average_to_one_process(loss: str) -> None:
    def of(part: slice, normalizer: float) -> torch.Tensor:
        if loss == "asymmetric":
            classes = torch.tensor([True, False, True, True])
            return asymmetric_cross_entropy(LOGITS[part], TARGETS[part], classes, WEIGHTS[part], normalizer)
        if loss == "matching":
            return logit_matching(LOGITS[part], OTHERS[part], WEIGHTS[part], normalizer)
        return tempered_distillation(LOGITS[part], OTHERS[part], WEIGHTS[part], normalizer, 2.0)

    parts = (of(slice(2), N / 2) + of(slice(2, 6), N / 2)) / 2
    assert parts.item() == pytest.approx(of(slice(6), N).item())


def test_bias_of_new_classes_is_found_again() -> None:
    g = torch.Generator().manual_seed(1)
    new = torch.tensor([False, False, True, True])
    targets = torch.arange(4).repeat(500)
    true = 2 * F.one_hot(targets, 4) + torch.randn(2000, 4, generator=g)  # the best logits are 2 x these
    shown = torch.where(new, (2 * true - 3) / 1.5, 2 * true)
    alpha, beta = fitted_bias(shown, targets, new)
    assert alpha == pytest.approx(1.5, abs=0.15)
    assert beta == pytest.approx(3, abs=0.3)

    # At the minimum both derivatives vanish, by finite differences in NumPy.
    def loss(a: float, b: float) -> float:
        z = np.where(new.numpy(), a * shown.double().numpy() + b, shown.double().numpy())
        picked = softmax(z)[np.arange(2000), targets.numpy()]
        return float(-np.log(picked).mean() + 1e-3 * ((a - 1) ** 2 + b**2))

    for da, db in ((1e-4, 0), (0, 1e-4)):
        assert abs(loss(alpha + da, beta + db) - loss(alpha - da, beta - db)) / 2e-4 < 1e-4


def test_bias_counts_each_class_the_same_and_needs_both_kinds() -> None:
    new = torch.tensor([False, True])
    logits = torch.tensor([[0.0, 1.0], [0.0, -0.5], [0.0, 0.3], [1.0, 0.2]])
    targets = torch.tensor([0, 1, 1, 0])
    once = fitted_bias(logits, targets, new)
    more = fitted_bias(
        torch.cat([logits, logits[[1, 2]].repeat(5, 1)]), torch.cat([targets, targets[[1, 2]].repeat(5)]), new
    )
    assert once == pytest.approx(more, abs=1e-3)
    assert fitted_bias(logits[:1], targets[:1], new) == (1.0, 0.0)
    assert fitted_bias(logits[1:3], targets[1:3], new) == (1.0, 0.0)


def test_bias_never_reverses_the_new_classes() -> None:
    # New classes 2 and 3, each taken for the other: the best scale is below 0 without a bound.
    targets = torch.tensor([0, 1, 2, 3]).repeat(5)
    shown = 3.0 * F.one_hot(torch.tensor([0, 1, 3, 2]).repeat(5), 4)
    new = torch.tensor([False, False, True, True])
    alpha, beta = fitted_bias(shown, targets, new)
    assert 0 < alpha < 0.02
    corrected = torch.where(new, alpha * shown + beta, shown)
    assert torch.equal(corrected[:, 2:].argmax(1), shown[:, 2:].argmax(1)), "their order stays"


def test_asymmetric_cross_entropy_leaves_padding_out() -> None:
    classes = torch.tensor([True, False, True, False])
    targets = torch.cat([TARGETS, torch.tensor([1, 3])])  # of classes that no sample has
    logits = torch.cat([LOGITS, LOGITS[:2]]).requires_grad_()
    loss = asymmetric_cross_entropy(logits, targets, classes, torch.cat([WEIGHTS, torch.zeros(2)]), N)
    assert loss.item() == pytest.approx(asymmetric_cross_entropy(LOGITS, TARGETS, classes, WEIGHTS, N).item())
    loss.backward()
    assert not logits.grad[6:].any()
    padding = asymmetric_cross_entropy(LOGITS, TARGETS, torch.zeros(4, dtype=torch.bool), torch.zeros(6), N)
    assert padding.item() == 0


def test_distillation_share() -> None:
    assert distillation_share(6, 2) == 0.75
    assert distillation_share(0, 2) == 0
