"""Metrics of a stream as torchmetrics classes: accuracy matrices whose ``compute`` returns one metric.

They have the counts and updates of ``AccuracyMatrix``, so that a ``MetricCollection`` of them keeps one set of counts.
The formulas are those of ``functional/continual_metrics.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

import dcl_lightning.metrics.drawing as drawing
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional import continual_metrics
from dcl_lightning.metrics.accuracy import AccuracyMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AverageAccuracy",
    "AverageIncrementalAccuracy",
    "BackwardTransfer",
    "Forgetting",
    "ForwardTransfer",
    "LearningAccuracy",
]


class _MatrixMetric(AccuracyMatrix):
    """An accuracy matrix whose ``compute`` returns one metric."""

    @abstractmethod
    def _metric(self, size: int) -> Tensor:
        """Return the metric of the first ``size`` tasks, 0-dim float64, from the counts held here."""

    def compute(self) -> Tensor:
        """Return the metric of the rows so far, 0-dim float64; NaN where it is not defined."""
        return self._metric(len(self.evaluated))

    @property
    def over_tasks(self) -> Tensor:
        """The metric after each task so far, ``(t,)`` float64, from the counts held here; no exchange."""
        return torch.stack([self._metric(size) for size in range(1, len(self.evaluated) + 1)])

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the metric over the tasks.

        Args:
            val: results of ``compute()`` after each task; those of the counts of all workers if None.
            ax: axes to draw on; a new figure if None.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed (``pip install 'dcl-lightning[plot]'``).
        """
        if val is None:
            with self.sync_context(dist_sync_fn=self.dist_sync_fn):
                val = self.over_tasks
        shown = torch.stack(list(val)) if not isinstance(val, Tensor) else val.reshape(-1)
        ax = ax if ax is not None else drawing.new_axes(*drawing.CURVE_SIZE)
        name = type(self).__name__
        drawing.draw_curves(ax, {name: shown.cpu().numpy()}, f"{drawing.in_words(name)} (%)")
        return drawing.figure_of(ax), ax


class AverageAccuracy(_MatrixMetric):
    r"""Mean accuracy over the tasks after the last one; Lopez-Paz and Ranzato 2017 (ACC).

    .. math:: A = \frac{1}{T} \sum_{j=0}^{T-1} R_{T-1, j}

    Updates, arguments and errors are those of ``AccuracyMatrix``.

    Example:
        >>> import torch
        >>> from dcl_lightning.metrics import AverageAccuracy
        >>> metric = AverageAccuracy(num_tasks=2)
        >>> metric.update(torch.tensor([2, 1]), torch.tensor([0, 1]), row=1, column=0)
        >>> metric.update(torch.tensor([2, 3]), torch.tensor([2, 3]), row=1, column=1)
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    def _metric(self, size: int) -> Tensor:
        return continual_metrics.average_accuracy(self.values[:size, :size])


class AverageIncrementalAccuracy(_MatrixMetric):
    r"""Mean over tasks of the accuracy on the samples of all tasks seen so far; Rebuffi et al. 2017.

    .. math:: \frac{1}{T} \sum_{i=0}^{T-1} a_i, \quad
        a_i = \sum_{j \le i} \mathrm{correct}_{i, j} / \sum_{j \le i} \mathrm{total}_{i, j}

    Updates and other arguments are those of ``AccuracyMatrix``.

    Args:
        num_tasks: T, at least 1.
        top_k: a sample counts as correct if its class is among the k highest scores.
        skip_first: whether to leave out a_0, before which no task was learnt.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from dcl_lightning.metrics import AverageIncrementalAccuracy
        >>> metric = AverageIncrementalAccuracy(num_tasks=2)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), row=0, column=0)
        >>> metric.update(torch.tensor([2, 1]), torch.tensor([0, 1]), row=1, column=0)
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    def __init__(self, num_tasks: int, top_k: int = 1, skip_first: bool = False, **kwargs: Any) -> None:
        super().__init__(num_tasks, top_k, **kwargs)
        self.skip_first = skip_first

    def _metric(self, size: int) -> Tensor:
        return continual_metrics.average_incremental_accuracy(self.pooled[:size], self.skip_first)


class Forgetting(_MatrixMetric):
    r"""Mean decrease from the best accuracy on each task; Chaudhry et al. 2018. It can be negative.

    .. math:: F = \frac{1}{T-1} \sum_{j<T-1} \Bigl(\max_{j \le l < T-1} R_{l, j} - R_{T-1, j}\Bigr)

    Updates and other arguments are those of ``AccuracyMatrix``.

    Args:
        num_tasks: T, at least 1.
        top_k: a sample counts as correct if its class is among the k highest scores.
        mode: ``max_last`` is the formula; in ``max_with_last`` the maximum includes the last row; in
            ``first_last`` R[j, j] stands for it, so that F = -BWT.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: if ``mode`` is unknown.

    Example:
        >>> import torch
        >>> from dcl_lightning.metrics import Forgetting
        >>> metric = Forgetting(num_tasks=2)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), row=0, column=0)
        >>> metric.update(torch.tensor([2, 1]), torch.tensor([0, 1]), row=1, column=0)
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = -1.0

    def __init__(
        self,
        num_tasks: int,
        top_k: int = 1,
        mode: Literal["max_last", "max_with_last", "first_last"] = "max_last",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_tasks, top_k, **kwargs)
        if mode not in ("max_last", "max_with_last", "first_last"):
            raise ConfigurationError(f"mode={mode!r}: give 'max_last', 'max_with_last' or 'first_last'")
        self.mode: Literal["max_last", "max_with_last", "first_last"] = mode

    def _metric(self, size: int) -> Tensor:
        return continual_metrics.forgetting(self.values[:size, :size], self.mode)


class BackwardTransfer(_MatrixMetric):
    r"""Mean change of the accuracy on earlier tasks; Lopez-Paz and Ranzato 2017.

    .. math:: \mathrm{BWT} = \frac{1}{T-1} \sum_{j<T-1} (R_{T-1, j} - R_{j, j})

    Updates, arguments and errors are those of ``AccuracyMatrix``.

    Example:
        >>> import torch
        >>> from dcl_lightning.metrics import BackwardTransfer
        >>> metric = BackwardTransfer(num_tasks=2)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), row=0, column=0)
        >>> metric.update(torch.tensor([2, 1]), torch.tensor([0, 1]), row=1, column=0)
        >>> metric.compute()
        tensor(-0.5000, dtype=torch.float64)
    """

    plot_lower_bound = -1.0

    def _metric(self, size: int) -> Tensor:
        return continual_metrics.backward_transfer(self.values[:size, :size])


class ForwardTransfer(_MatrixMetric):
    r"""Mean gain on a task before it is learnt; Lopez-Paz and Ranzato 2017.

    It needs entries above the diagonal, and is meaningless where a task has classes that no earlier task had.

    .. math:: \mathrm{FWT} = \frac{1}{T-1} \sum_{j>0} (R_{j-1, j} - b_j)

    Updates and other arguments are those of ``AccuracyMatrix``.

    Args:
        num_tasks: T, at least 1.
        baseline: ``(T,)`` b_j, the untrained network's accuracy on task j.
        top_k: a sample counts as correct if its class is among the k highest scores.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: if there is not one baseline for each task.

    Example:
        >>> import torch
        >>> from dcl_lightning.metrics import ForwardTransfer
        >>> metric = ForwardTransfer(num_tasks=2, baseline=[0.5, 0.25])
        >>> metric.update(torch.tensor([2, 3]), torch.tensor([2, 3]), row=0, column=1)
        >>> metric.update(torch.tensor([2, 3]), torch.tensor([2, 3]), row=1, column=1)
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    plot_lower_bound = -1.0
    baseline: Tensor

    def __init__(self, num_tasks: int, baseline: Tensor | Sequence[float], top_k: int = 1, **kwargs: Any) -> None:
        super().__init__(num_tasks, top_k, **kwargs)
        if len(baseline) != num_tasks:
            raise ConfigurationError(f"baseline has {len(baseline)} numbers for num_tasks={num_tasks}: give one each")
        self.register_buffer("baseline", torch.as_tensor(baseline, dtype=torch.float64), persistent=False)

    def _metric(self, size: int) -> Tensor:
        return continual_metrics.forward_transfer(self.values[:size, :size], self.baseline[:size].cpu())


class LearningAccuracy(_MatrixMetric):
    r"""Mean accuracy on each task just after it was learnt; Riemer et al. 2019.

    .. math:: \frac{1}{T} \sum_{j=0}^{T-1} R_{j, j}

    Updates, arguments and errors are those of ``AccuracyMatrix``.

    Example:
        >>> import torch
        >>> from dcl_lightning.metrics import LearningAccuracy
        >>> metric = LearningAccuracy(num_tasks=2)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), row=0, column=0)
        >>> metric.update(torch.tensor([2, 1]), torch.tensor([2, 3]), row=1, column=1)
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    def _metric(self, size: int) -> Tensor:
        return continual_metrics.learning_accuracy(self.values[:size, :size])
