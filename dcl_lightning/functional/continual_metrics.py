"""Metrics of continual learning, as pure functions of an accuracy matrix.

``matrix`` is ``(T, T)`` float64: entry ``R[i, j]`` is the accuracy on the test samples of task j after task i, a
fraction in [0, 1], NaN where it was not evaluated. All functions return a 0-dim float64. Terms with an entry that was
not evaluated are left out of the mean. A metric without any term is NaN, and for T = 1 all except the average accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "FORMULAS",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "over_tasks",
]

# The formula of each metric, for reports: the literature uses one name for several formulas.
FORMULAS = {
    "average_accuracy": "mean over j of R[T-1, j]",
    "average_incremental_accuracy": "mean over i of a[i], the accuracy after task i over all samples of tasks 0..i",
    "pooled_accuracy": "a[T-1]: correct samples of all tasks / samples of all tasks, after the last task",
    "learning_accuracy": "mean over j of R[j, j]",
    "forgetting": "max-last: mean over j < T-1 of (max over j <= l < T-1 of R[l, j]) - R[T-1, j]",
    "backward_transfer": "mean over j < T-1 of R[T-1, j] - R[j, j]",
    "forward_transfer": "mean over j > 0 of R[j-1, j] - b[j], b[j] the untrained network's accuracy",
}


def average_accuracy(matrix: Tensor) -> Tensor:
    r"""Return the mean accuracy over the tasks after the last one (Lopez-Paz and Ranzato 2017, ACC).

    .. math:: A = \frac{1}{T} \sum_{j=0}^{T-1} R_{T-1, j}

    Args:
        matrix: ``(T, T)`` accuracies.

    Raises:
        ValueError: if ``matrix`` is not square.

    Example:
        >>> import torch
        >>> average_accuracy(torch.tensor([[1.0, float("nan")], [0.5, 1.0]]))
        tensor(0.7500, dtype=torch.float64)
    """
    return _checked(matrix)[-1].nanmean()


def average_incremental_accuracy(pooled: Tensor, skip_first: bool = False) -> Tensor:
    r"""Return the mean over tasks of the accuracy on all classes seen so far (Rebuffi et al. 2017).

    .. math:: \frac{1}{T} \sum_{i=0}^{T-1} a_i

    Args:
        pooled: ``(T,)`` a_i, accuracy after task i over the test samples of all classes seen by then.
        skip_first: whether to leave out a_0, before which no task was learnt.

    Example:
        >>> import torch
        >>> average_incremental_accuracy(torch.tensor([1.0, 0.5]))
        tensor(0.7500, dtype=torch.float64)
    """
    pooled = pooled.double()
    if len(pooled) < 2:
        return pooled.new_tensor(float("nan"))
    return pooled[int(skip_first) :].nanmean()


def forgetting(matrix: Tensor, mode: Literal["max_last", "max_with_last", "first_last"] = "max_last") -> Tensor:
    r"""Return the mean decrease from the best accuracy on each task (Chaudhry et al. 2018); can be negative.

    .. math:: F = \frac{1}{T-1} \sum_{j<T-1} \Bigl(\max_{j \le l < T-1} R_{l, j} - R_{T-1, j}\Bigr)

    Args:
        matrix: ``(T, T)`` accuracies.
        mode: ``max_last`` is the formula; in ``max_with_last`` the maximum includes the last row, so
            that F is at least 0; in ``first_last`` R[j, j] stands for it, so that F = -BWT.

    Raises:
        ValueError: if ``matrix`` is not square or ``mode`` is unknown.

    Example:
        >>> import torch
        >>> forgetting(torch.tensor([[1.0, 0.0], [0.25, 1.0]]))
        tensor(0.7500, dtype=torch.float64)
    """
    matrix = _checked(matrix)
    last = len(matrix) - 1
    if mode == "first_last":
        return -backward_transfer(matrix)
    if mode not in ("max_last", "max_with_last"):
        raise ValueError(f"mode={mode!r}: give 'max_last', 'max_with_last' or 'first_last'")
    rows = matrix if mode == "max_with_last" else matrix[:last]
    if not last:
        return matrix.new_tensor(float("nan"))
    # Entries above the diagonal are from before the task was learnt.
    hidden = rows.isnan() | torch.ones_like(rows, dtype=torch.bool).triu(1)
    learnt = rows.masked_fill(hidden, -float("inf"))
    best = learnt.amax(0)[:last]
    best = best.masked_fill(best.isinf(), float("nan"))
    return (best - matrix[last, :last]).nanmean()


def backward_transfer(matrix: Tensor) -> Tensor:
    r"""Return the mean change of the accuracy on earlier tasks (Lopez-Paz and Ranzato 2017).

    .. math:: \mathrm{BWT} = \frac{1}{T-1} \sum_{j<T-1} (R_{T-1, j} - R_{j, j})

    Args:
        matrix: ``(T, T)`` accuracies.

    Raises:
        ValueError: if ``matrix`` is not square.

    Example:
        >>> import torch
        >>> backward_transfer(torch.tensor([[1.0, 0.0], [0.25, 1.0]]))
        tensor(-0.7500, dtype=torch.float64)
    """
    matrix = _checked(matrix)
    return (matrix[-1] - matrix.diagonal())[:-1].nanmean()


def forward_transfer(matrix: Tensor, baseline: Tensor) -> Tensor:
    r"""Return the mean gain on a task before it is learnt (Lopez-Paz and Ranzato 2017).

    It is meaningless in a class scenario, where a class cannot be predicted before it was seen.

    .. math:: \mathrm{FWT} = \frac{1}{T-1} \sum_{j>0} (R_{j-1, j} - b_j)

    Args:
        matrix: ``(T, T)`` accuracies, evaluated at least one task ahead.
        baseline: ``(T,)`` b_j, the untrained network's accuracy on task j.

    Raises:
        ValueError: if ``matrix`` is not square.

    Example:
        >>> import torch
        >>> forward_transfer(torch.tensor([[1.0, 0.75], [0.5, 1.0]]), baseline=torch.tensor([0.5, 0.5]))
        tensor(0.2500, dtype=torch.float64)
    """
    matrix = _checked(matrix)
    return (matrix.diagonal(1) - baseline.to(matrix)[1:]).nanmean()


def learning_accuracy(matrix: Tensor) -> Tensor:
    r"""Return the mean accuracy on each task just after it was learnt (Riemer et al. 2019).

    .. math:: \frac{1}{T} \sum_{j=0}^{T-1} R_{j, j}

    Args:
        matrix: ``(T, T)`` accuracies.

    Raises:
        ValueError: if ``matrix`` is not square.

    Example:
        >>> import torch
        >>> learning_accuracy(torch.tensor([[1.0, 0.0], [0.25, 0.5]]))
        tensor(0.7500, dtype=torch.float64)
    """
    matrix = _checked(matrix)
    return matrix.diagonal().nanmean() if len(matrix) > 1 else matrix.new_tensor(float("nan"))


def over_tasks(metric: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """Return a metric after each task.

    Args:
        metric: a function of this module that takes a matrix alone.
        matrix: ``(T, T)`` accuracies.

    Returns:
        ``(T,)`` float64; entry t - 1 is the metric of the first t tasks.

    Raises:
        ValueError: if ``matrix`` is not square.

    Example:
        >>> import torch
        >>> over_tasks(forgetting, torch.tensor([[1.0, 0.0], [0.25, 1.0]]))
        tensor([   nan, 0.7500], dtype=torch.float64)
    """
    matrix = _checked(matrix)
    return torch.stack([metric(matrix[:t, :t]) for t in range(1, len(matrix) + 1)])


def _checked(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"an accuracy matrix is square, got shape {tuple(matrix.shape)}")
    return matrix.double()
