"""Projections of gradients against NumPy and against the conditions that the papers state."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from dcl_lightning.functional import agem_projection, gem_projection


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
def test_agem_is_the_papers_equation(seed: int) -> None:
    g, r = vectors(7, seed=seed), vectors(7, seed=seed + 100)
    a, b = g.numpy(), r.numpy()
    expected = a if a @ b >= 0 else a - (a @ b) / (b @ b) * b
    np.testing.assert_allclose(agem_projection(g, r).numpy(), expected, atol=1e-12)


def test_agem_projects_some_and_leaves_others() -> None:
    r = torch.tensor([1.0, 0.0])
    assert agem_projection(torch.tensor([-2.0, 3.0]), r).tolist() == [0.0, 3.0]
    assert agem_projection(torch.tensor([2.0, 3.0]), r).tolist() == [2.0, 3.0]
    assert agem_projection(torch.tensor([-2.0, 3.0]), torch.zeros(2)).tolist() == [-2.0, 3.0]


def best_of_all_active_sets(g: np.ndarray, refs: np.ndarray) -> np.ndarray:
    """The nearest vector with no negative product: one of those that are orthogonal to some of the references."""
    best = None
    for count in range(len(refs) + 1):
        for active in combinations(range(len(refs)), count):
            basis = refs[list(active)]
            z = g - basis.T @ np.linalg.solve(basis @ basis.T, basis @ g) if count else g
            if (refs @ z >= -1e-9).all() and (best is None or np.sum((z - g) ** 2) < np.sum((best - g) ** 2)):
                best = z
    assert best is not None
    return best


@pytest.mark.parametrize("seed", range(12))
def test_gem_is_the_nearest_gradient_that_harms_no_task(seed: int) -> None:
    g, refs = vectors(9, seed=seed), vectors(4, 9, seed=seed + 50)
    found = gem_projection(g, refs, margin=0.0, ridge=1e-12)
    np.testing.assert_allclose(found.numpy(), best_of_all_active_sets(g.numpy(), refs.numpy()), atol=1e-5)
    assert bool((refs @ found >= -1e-5).all())


@pytest.mark.parametrize("seed", range(4))
def test_gem_with_a_margin_solves_the_dual_problem(seed: int) -> None:
    g, refs = vectors(9, seed=seed), vectors(3, 9, seed=seed + 50)
    g = g - refs.sum(0)  # so that it harms
    found, ridge, margin = gem_projection(g, refs, margin=0.5, ridge=1e-3), 1e-3, 0.5
    v = np.linalg.lstsq(refs.numpy().T, (found - g).numpy(), rcond=None)[0]
    gram = (refs @ refs.T).numpy()
    gram = gram + ridge * gram.diagonal().max() * np.eye(3)
    slope = gram @ v + (refs @ g).numpy()
    # Karush, Kuhn and Tucker: at the bound the slope is not negative, above it it is 0.
    assert (v >= margin - 1e-8).all()
    assert (slope >= -1e-8).all()
    np.testing.assert_allclose(slope * (v - margin), 0, atol=1e-6)


def test_gem_leaves_what_harms_nobody_and_knows_no_tasks() -> None:
    g = vectors(5)
    assert torch.equal(gem_projection(g, g[None], margin=0.5), g)
    assert torch.equal(gem_projection(g, g.new_zeros(0, 5)), g)


def test_gem_with_one_task_without_margin_is_agem() -> None:
    g, r = torch.tensor([-2.0, 3.0, 1.0]), torch.tensor([1.0, 0.5, 0.0])
    torch.testing.assert_close(gem_projection(g, r[None], ridge=1e-9), agem_projection(g, r))
    assert gem_projection(g, r[None]).dtype == torch.float32


def test_gem_bears_tasks_with_the_same_gradient() -> None:
    g, r = torch.tensor([-2.0, 3.0, 1.0]), torch.tensor([1.0, 0.5, 0.0])
    found = gem_projection(g, torch.stack([r, r, r]))
    assert float(found @ r) > -1e-2
