"""Accuracy after each task, by task and by class, as torchmetrics classes over counts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

import dcl_lightning.metrics.drawing as drawing
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional import continual_metrics
from dcl_lightning.functional.scores import top_k_hits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AccuracyMatrix", "ClassAccuracy"]


class _CountedAccuracy(Metric):
    """Counts of samples, and of those classified correctly; the first index of both is the task learnt last."""

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound = 1.0

    correct: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, num_columns: int, **kwargs: Any) -> None:
        # A cached result would outlive counts that are replaced.
        super().__init__(**{"compute_with_cache": False, **kwargs})
        self.num_tasks = num_tasks
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(num_tasks, num_columns, dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """Whether there are counts: ``compute`` warns if not."""
        return bool(self.total.any())

    @property
    def values(self) -> Tensor:
        """Accuracies, float64 on the host, from the counts held here; no exchange between workers."""
        return self.correct.cpu().double() / self.total.cpu().double()

    def compute(self) -> Tensor:
        """Return the accuracies, float64, NaN where nothing was evaluated."""
        return self.values

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the accuracies in greys.

        Args:
            val: a result of ``compute()``, or several, of which the last is drawn; computed now if None.
            ax: axes to draw on; a new figure if None.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed (``pip install 'dcl-lightning[plot]'``).
        """
        shown = self.compute() if val is None else val if isinstance(val, Tensor) else val[-1]
        ax = ax if ax is not None else drawing.new_axes(*self._figure_size())
        self._draw(ax, shown.cpu().numpy())
        return drawing.figure_of(ax), ax

    @abstractmethod
    def _figure_size(self) -> tuple[float, float]:
        """Return width and height of a figure."""

    @abstractmethod
    def _draw(self, ax: Axes, values: drawing.Floats) -> None:
        """Draw what ``compute`` has returned."""

    def _check_task(self, row: int, column: int = 0) -> None:
        if not (0 <= row < self.num_tasks and 0 <= column < self.num_tasks):
            raise IndexError(f"row {row}, column {column}: the stream has tasks 0 to {self.num_tasks - 1}")


class AccuracyMatrix(_CountedAccuracy):
    r"""Accuracy on the test samples of task j (column) after task i (row); Lopez-Paz and Ranzato 2017, section 2.

    .. math:: R_{i, j} = \mathrm{correct}_{i, j} / \mathrm{total}_{i, j}

    ``compute()`` returns ``(T, T)`` float64, NaN where nothing was evaluated, and adds up the counts of all workers
    under ``torch.distributed`` and under ``HorovodStrategy``. The properties read the counts held here without any
    exchange, so that one worker alone may use them; they consider the rows evaluated so far.

    Args:
        num_tasks: T, at least 1.
        top_k: a sample counts as correct if its class is among the k highest scores, at least 1.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: if ``num_tasks`` or ``top_k`` is below 1.

    Example:
        >>> import torch
        >>> from dcl_lightning.metrics import AccuracyMatrix
        >>> matrix = AccuracyMatrix(num_tasks=2)
        >>> matrix.update(torch.tensor([0, 1]), torch.tensor([0, 1]), row=0, column=0)
        >>> matrix.update(torch.tensor([2, 1]), torch.tensor([0, 1]), row=1, column=0)
        >>> matrix.update(torch.tensor([2, 3]), torch.tensor([2, 3]), row=1, column=1)
        >>> matrix.compute()
        tensor([[1.0000,    nan],
                [0.5000, 1.0000]], dtype=torch.float64)
        >>> matrix.forgetting
        tensor(0.5000, dtype=torch.float64)
        >>> matrix.pooled
        tensor([1.0000, 0.7500], dtype=torch.float64)
    """

    def __init__(self, num_tasks: int, top_k: int = 1, **kwargs: Any) -> None:
        if num_tasks < 1 or top_k < 1:
            raise ConfigurationError(f"num_tasks={num_tasks} and top_k={top_k} must be at least 1")
        super().__init__(num_tasks, num_tasks, **kwargs)
        self.top_k = top_k

    def update(self, preds: Tensor, target: Tensor, row: int, column: int) -> None:
        """Add a batch to an entry.

        Args:
            preds: ``(B, K)`` scores, floating, or ``(B,)`` int64 predicted classes if ``top_k`` is 1.
            target: ``(B,)`` int64 classes.
            row: the task learnt last.
            column: the task that the samples are from.

        Raises:
            ValueError: if the shapes do not fit each other or ``top_k``.
            IndexError: if ``row`` or ``column`` is not a task.
        """
        self._check_task(row, column)
        self.correct[row, column] += _hits(preds, target, self.top_k).sum()
        self.total[row, column] += len(target)

    def add_counts(self, correct: int | Tensor, total: int | Tensor, row: int, column: int) -> None:
        """Replace an entry by counts that are already those of all workers.

        Args:
            correct: number of samples classified correctly, an integer or 0-dim int64.
            total: number of samples, likewise.
            row: the task learnt last.
            column: the task that the samples are from.

        Raises:
            IndexError: if ``row`` or ``column`` is not a task.
        """
        self._check_task(row, column)
        self.correct[row, column] = int(correct)
        self.total[row, column] = int(total)

    @property
    def evaluated(self) -> Tensor:
        """The matrix of the rows so far, ``(t, t)`` float64: up to the last row with an entry."""
        rows = torch.nonzero(self.total.cpu().sum(1)).flatten()
        size = int(rows[-1]) + 1 if len(rows) else 1
        return self.values[:size, :size]

    @property
    def pooled(self) -> Tensor:
        """Accuracy over the test samples of all tasks seen by then, ``(T,)`` float64."""
        correct, total = self.correct.cpu().tril().sum(1), self.total.cpu().tril().sum(1)
        return correct.double() / total.double()

    @property
    def average_accuracy(self) -> Tensor:
        """Mean over the tasks after the last row, 0-dim."""
        return continual_metrics.average_accuracy(self.evaluated)

    @property
    def average_incremental_accuracy(self) -> Tensor:
        """Mean of the pooled accuracies of the rows so far, 0-dim."""
        return continual_metrics.average_incremental_accuracy(self.pooled[: len(self.evaluated)])

    @property
    def forgetting(self) -> Tensor:
        """Mean loss from the best accuracy before the last row, 0-dim."""
        return continual_metrics.forgetting(self.evaluated)

    @property
    def backward_transfer(self) -> Tensor:
        """Mean change since each task was learnt, 0-dim."""
        return continual_metrics.backward_transfer(self.evaluated)

    @property
    def learning_accuracy(self) -> Tensor:
        """Mean accuracy on each task just after it, 0-dim."""
        return continual_metrics.learning_accuracy(self.evaluated)

    def _figure_size(self) -> tuple[float, float]:
        return drawing.matrix_size(self.num_tasks)

    def _draw(self, ax: Axes, values: drawing.Floats) -> None:
        drawing.draw_matrix(ax, values)


class ClassAccuracy(_CountedAccuracy):
    r"""Accuracy on the test samples of class y (column) after task i (row), whichever task they are from.

    .. math:: C_{i, y} = \mathrm{correct}_{i, y} / \mathrm{total}_{i, y}

    One row is ``torchmetrics.classification.MulticlassAccuracy(average=None)``, also called recall (Sokolova and
    Lapalme 2009); this metric has a row for each task of a stream. ``compute()`` returns ``(T, K)`` float64, NaN where
    a class was not evaluated.

    Args:
        num_tasks: T, at least 1.
        num_classes: K, classes of the whole stream, at least 1.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: if ``num_tasks`` or ``num_classes`` is below 1.

    Example:
        >>> import torch
        >>> from dcl_lightning.metrics import ClassAccuracy
        >>> metric = ClassAccuracy(num_tasks=2, num_classes=3)
        >>> metric.update(torch.tensor([0, 1, 0, 0]), torch.tensor([0, 1, 1, 2]), row=0)
        >>> metric.compute()
        tensor([[1.0000, 0.5000, 0.0000],
                [   nan,    nan,    nan]], dtype=torch.float64)
    """

    def __init__(self, num_tasks: int, num_classes: int, **kwargs: Any) -> None:
        if num_tasks < 1 or num_classes < 1:
            raise ConfigurationError(f"num_tasks={num_tasks} and num_classes={num_classes} must be at least 1")
        super().__init__(num_tasks, num_classes, **kwargs)
        self.num_classes = num_classes

    def update(self, preds: Tensor, target: Tensor, row: int) -> None:
        """Add a batch.

        Args:
            preds: ``(B, K)`` scores, floating, or ``(B,)`` int64 predicted classes.
            target: ``(B,)`` int64 classes.
            row: the task learnt last.

        Raises:
            ValueError: if the shapes do not fit each other.
            IndexError: if ``row`` is not a task.
        """
        self._check_task(row)
        self.correct[row].index_add_(0, target, _hits(preds, target, 1).long())
        self.total[row].index_add_(0, target, torch.ones_like(target))

    def add_counts(self, correct: Tensor, total: Tensor, row: int) -> None:
        """Replace a row by counts that are already those of all workers.

        Args:
            correct: ``(K,)`` int64, samples of each class that were classified correctly.
            total: ``(K,)`` int64, samples of each class.
            row: the task learnt last.

        Raises:
            IndexError: if ``row`` is not a task.
        """
        self._check_task(row)
        self.correct[row], self.total[row] = correct, total

    def _figure_size(self) -> tuple[float, float]:
        return drawing.class_size(self.num_tasks, self._labels())

    def _draw(self, ax: Axes, values: drawing.Floats) -> None:
        drawing.draw_classes(ax, values, self._labels())

    def _labels(self) -> list[str]:
        return [str(y) for y in range(self.num_classes)]


def _hits(preds: Tensor, target: Tensor, k: int) -> Tensor:
    """Return whether each prediction is correct, ``(B,)`` bool; refuse shapes that do not fit."""
    if target.ndim != 1 or preds.ndim not in (1, 2) or len(preds) != len(target):
        raise ValueError(f"preds is (B, K) or (B,) and target (B,), got {tuple(preds.shape)} and {tuple(target.shape)}")
    if preds.ndim == 1 and k > 1:
        raise ValueError(f"top_k={k} needs scores (B, K), got predicted classes")
    return preds == target if preds.ndim == 1 else top_k_hits(preds, target, k)
