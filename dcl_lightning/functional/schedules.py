"""Factors of the learning rate, and parameter groups of optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from dcl_lightning.types import StateDict

__all__ = ["ScaleLR", "lr_factor", "lr_scale", "parameter_groups", "warmup_divisor"]

ScaleLR = Literal["none", "linear", "sqrt", "capped"]


def lr_factor(
    progress: float,
    milestones: Sequence[float],
    gamma: float | Sequence[float],
    warmup_epochs: float,
    warmup_divisor: float,
) -> float:
    """Return the factor of the base learning rate.

    Args:
        progress: epochs since the start of the task, with the fraction within the epoch; at least 0.
        milestones: epochs of the task after which the rate is multiplied by ``gamma``.
        gamma: factor of each milestone: one for all, or one each, in the same order.
        warmup_epochs: W; during the first W epochs the factor rises linearly from 1/D to 1 (Goyal et al. 2017,
            arXiv 1706.02677, 2.2).
        warmup_divisor: D, at least 1; see ``warmup_divisor``.
    """
    factors = [gamma] * len(milestones) if isinstance(gamma, (int, float)) else gamma
    factor = math.prod(g for m, g in zip(milestones, factors, strict=True) if progress >= m)
    if progress < warmup_epochs:
        factor *= (progress * (warmup_divisor - 1) / warmup_epochs + 1) / warmup_divisor
    return float(factor)


def warmup_divisor(rule: ScaleLR, num_workers: int) -> float:
    """Return the divisor of the rate at the start of warm-up, which gives one worker's rate.

    That is the rate before scaling; with rule ``none`` the given rate is already that of N workers.

    Args:
        rule: how the rate grows with the number of workers.
        num_workers: N.
    """
    return float(num_workers) if rule == "none" else lr_scale(rule, num_workers)


def lr_scale(rule: ScaleLR, num_workers: int) -> float:
    """Return the factor of the learning rate for N workers: 1, N, sqrt(N) or min(N, 64)."""
    return {
        "none": 1.0,
        "linear": float(num_workers),
        "sqrt": num_workers**0.5,
        "capped": float(min(num_workers, 64)),
    }[rule]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], decay_biases_and_norms: bool) -> list[StateDict]:
    """Return an optimizer's groups of the parameters that are trained.

    Biases and parameters with one value for each channel (scales and shifts of normalization layers, layer scales) are
    recognized by name and shape, as in timm, so that any kind of normalization counts.

    Args:
        named: parameters by name, as from ``module.named_parameters()``.
        decay_biases_and_norms: whether weight decay acts on them too; if not, they form a second group with
            ``weight_decay`` 0.

    Returns:
        One or two groups; a group without parameters is left out.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            one_a_channel = parameter.ndim <= 1 or name.endswith(".bias")
            (spared if one_a_channel and not decay_biases_and_norms else decayed).append(parameter)
    groups: list[StateDict] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
