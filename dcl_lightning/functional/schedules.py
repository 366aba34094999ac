"""Learning-rate factors as pure functions of the place within a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

__all__ = ["ScaleLR", "lr_factor", "lr_scale"]

ScaleLR = Literal["none", "linear", "sqrt", "capped"]


def lr_factor(
    progress: float, milestones: Sequence[int], gamma: float, warmup_epochs: float, num_workers: int
) -> float:
    """Return what the base learning rate is multiplied with.

    Args:
        progress: epochs since the start of the task, with the fraction within the epoch; at least 0.
        milestones: epochs of the task after which the rate is multiplied with ``gamma``.
        gamma: factor of each milestone.
        warmup_epochs: W; during the first W epochs the rate rises from 1/N to 1 (Goyal et al. 2017, 2.2).
        num_workers: N.
    """
    factor = gamma ** sum(progress >= m for m in milestones)
    if progress < warmup_epochs:
        factor *= (progress * (num_workers - 1) / warmup_epochs + 1) / num_workers
    return float(factor)


def lr_scale(rule: ScaleLR, num_workers: int) -> float:
    """Return the factor of the learning rate for N workers: 1, N, sqrt(N) or min(N, 64)."""
    return {
        "none": 1.0,
        "linear": float(num_workers),
        "sqrt": num_workers**0.5,
        "capped": float(min(num_workers, 64)),
    }[rule]
