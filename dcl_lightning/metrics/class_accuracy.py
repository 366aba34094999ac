"""Accuracy of each class after each task, as a torchmetrics class over counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

import dcl_lightning.metrics.drawing as drawing
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional.scores import top_k_hits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ClassAccuracy"]


class ClassAccuracy(Metric):
    r"""Accuracy on the test samples of class y (column) after task i (row), of whichever task they are.

    .. math:: C_{i, y} = \mathrm{correct}_{i, y} / \mathrm{total}_{i, y}

    One row is ``torchmetrics.classification.MulticlassAccuracy(average=None)``, also called recall (Sokolova and
    Lapalme 2009); this keeps one for each task of a stream. ``compute()`` returns ``(T, K)`` float64, NaN where a
    class was not evaluated.

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

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    correct: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**{"compute_with_cache": False, **kwargs})
        if num_tasks < 1 or num_classes < 1:
            raise ConfigurationError(f"num_tasks={num_tasks} and num_classes={num_classes} must be at least 1")
        self.num_tasks, self.num_classes = num_tasks, num_classes
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(num_tasks, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

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
        self._check(row)
        if target.ndim != 1 or preds.ndim not in (1, 2) or len(preds) != len(target):
            raise ValueError(
                f"preds is (B, K) or (B,) and target (B,), got {tuple(preds.shape)} and {tuple(target.shape)}"
            )
        hits = preds == target if preds.ndim == 1 else top_k_hits(preds, target, 1)
        self.correct[row].index_add_(0, target, hits.long())
        self.total[row].index_add_(0, target, torch.ones_like(target))

    def add_counts(self, correct: Tensor, total: Tensor, row: int) -> None:
        """Replace a row by counts that are already those of the whole job.

        Args:
            correct: ``(K,)`` int64, samples of each class that were classified right.
            total: ``(K,)`` int64, samples of each class.
            row: the task learnt last.

        Raises:
            IndexError: if ``row`` is not a task.
        """
        self._check(row)
        self._update_count += 1  # what ``update`` does, so that ``compute`` does not warn
        self.correct[row], self.total[row] = correct, total

    def compute(self) -> Tensor:
        """Return the accuracies ``(T, K)`` float64, NaN where a class was not evaluated."""
        return self.values

    @property
    def values(self) -> Tensor:
        """Accuracies ``(T, K)`` float64 on the host from the counts held here; no exchange."""
        return self.correct.cpu().double() / self.total.cpu().double()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the accuracy of every class over the tasks in greys, a row for each class.

        Args:
            val: a result of ``compute()``, or several, of which the last is drawn; computed now if None.
            ax: axes to draw on; a new figure if None.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed (``pip install 'dcl-lightning[plot]'``).
        """
        shown = self.compute() if val is None else val if isinstance(val, Tensor) else val[-1]
        labels = [str(y) for y in range(self.num_classes)]
        ax = ax if ax is not None else drawing.new_axes(*drawing.class_size(self.num_tasks, labels))
        drawing.draw_classes(ax, shown.cpu().numpy(), labels)
        return drawing.figure_of(ax), ax

    def _check(self, row: int) -> None:
        if not 0 <= row < self.num_tasks:
            raise IndexError(f"row {row}: the stream has tasks 0 to {self.num_tasks - 1}")
