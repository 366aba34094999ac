"""Means, deviations and intervals of figures over runs. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Estimate", "between", "estimate", "paired"]


class Estimate(NamedTuple):
    """A mean over n values.

    Args:
        mean: of the values.
        deviation: their standard deviation, with n - 1; NaN for one value.
        low: lower end of the 95 % interval of the mean by Student's t distribution; NaN for one value.
        high: upper end.
        n: number of values.
    """

    mean: float
    deviation: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, deviation and 95 % interval.

    >>> [round(x, 3) for x in estimate([1.0, 2.0, 3.0])]
    [2.0, 1.0, -0.484, 4.484, 3]

    Args:
        values: at least one.
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, n)
    from scipy.stats import t

    deviation = float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, deviation, mean - half, mean + half, n)


def paired(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Estimate | None:
    """Return the estimate of ``ours - theirs`` over what both have; None if that are fewer than two.

    Args:
        ours: a value for each pair of seed and order.
        theirs: those to compare with.
    """
    both = [key for key in ours if key in theirs]
    return estimate([ours[key] - theirs[key] for key in both]) if len(both) > 1 else None


def between(values: Mapping[Any, float]) -> tuple[float, float]:
    """Return the deviation over seeds and that over orders, each NaN if there is one alone.

    The first is the root of the mean variance within an order, the second the deviation of the orders' means.

    Args:
        values: by order and seed.
    """
    orders: dict[object, list[float]] = {}
    for (order, _), value in values.items():
        orders.setdefault(order, []).append(value)
    within = [float(np.var(group, ddof=1)) for group in orders.values() if len(group) > 1]
    means = [float(np.mean(group)) for group in orders.values()]
    over_orders = float(np.std(means, ddof=1)) if len(means) > 1 else math.nan
    return (math.sqrt(float(np.mean(within))) if within else math.nan), over_orders
