"""Penalties and importances against NumPy."""

from __future__ import annotations

import numpy as np
import torch

from dcl_lightning.functional import (
    merged_fisher,
    quadratic_penalty,
    quadratic_penalty_gradient,
    si_importance,
    si_path,
)


def vectors(count: int, size: int = 6) -> list[torch.Tensor]:
    return list(torch.randn(count, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64))


def test_penalty_and_its_gradient() -> None:
    weights, anchor, importance = vectors(3)
    weights.requires_grad_()
    loss = quadratic_penalty(weights, anchor, importance.abs())
    w, a, o = weights.detach().numpy(), anchor.numpy(), importance.abs().numpy()
    assert np.isclose(loss.item(), sum(o[k] * (w[k] - a[k]) ** 2 for k in range(6)))
    loss.backward()
    torch.testing.assert_close(weights.grad, quadratic_penalty_gradient(weights.detach(), anchor, importance.abs()))


def test_fisher_fades() -> None:
    fisher, task, _ = vectors(3)
    torch.testing.assert_close(merged_fisher(fisher, task, 0.25), fisher / 4 + task)


def test_the_path_adds_up_to_the_fall_of_the_loss() -> None:
    # Equation 3: for small steps of gradient descent the paths of all weights sum to what the loss fell.
    scale, start, _ = vectors(3)
    weights, path = start.clone(), torch.zeros(6, dtype=torch.float64)
    loss = lambda w: (scale.abs() * w.square()).sum()  # noqa: E731
    for _ in range(2000):
        gradient = 2 * scale.abs() * weights
        after = weights - 1e-3 * gradient
        path = si_path(path, gradient, weights, after)
        weights = after
    assert bool((path >= 0).all())
    assert np.isclose(path.sum().item(), (loss(start) - loss(weights)).item(), rtol=1e-2)


def test_importance_is_the_papers_equation() -> None:
    importance, path, weights, anchor = vectors(4)
    path[::2] *= -1
    found = si_importance(importance, path, weights, anchor, 0.1).numpy()
    for k in range(6):
        expected = importance[k] + max(path[k], 0) / ((weights[k] - anchor[k]) ** 2 + 0.1)
        assert np.isclose(found[k], expected)
    assert bool((path < 0).any() and (path > 0).any())
