"""The accuracy matrix as a torchmetrics class over counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

import dcl_lightning.metrics.drawing as drawing
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional import continual_metrics as figures
from dcl_lightning.functional.scores import top_k_hits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AccuracyMatrix"]


class AccuracyMatrix(Metric):
    r"""Accuracy on the test samples of task j (column) after task i (row); Lopez-Paz and Ranzato 2017, section 2.

    .. math:: R_{i, j} = \mathrm{correct}_{i, j} / \mathrm{total}_{i, j}

    ``compute()`` returns ``(T, T)`` float64, NaN where nothing was evaluated, and adds the counts of all
    workers up under ``torch.distributed`` and under ``HorovodStrategy``. The properties read the counts held
    here and exchange nothing, so that one worker alone may ask for them; they look at the rows evaluated so far.

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

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    correct: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, top_k: int = 1, **kwargs: Any) -> None:
        # A cached result would outlive counts that are replaced.
        super().__init__(**{"compute_with_cache": False, **kwargs})
        if num_tasks < 1 or top_k < 1:
            raise ConfigurationError(f"num_tasks={num_tasks} and top_k={top_k} must be at least 1")
        self.num_tasks = num_tasks
        self.top_k = top_k
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(num_tasks, num_tasks, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, row: int, column: int) -> None:
        """Add a batch to an entry.

        Args:
            preds: ``(B, K)`` scores, floating, or ``(B,)`` int64 predicted classes if ``top_k`` is 1.
            target: ``(B,)`` int64 classes.
            row: the task learnt last.
            column: the task that the samples are of.

        Raises:
            ValueError: if the shapes do not fit each other or ``top_k``.
            IndexError: if ``row`` or ``column`` is not a task.
        """
        self._check(row, column)
        if target.ndim != 1 or preds.ndim not in (1, 2) or len(preds) != len(target):
            raise ValueError(
                f"preds is (B, K) or (B,) and target (B,), got {tuple(preds.shape)} and {tuple(target.shape)}"
            )
        if preds.ndim == 1 and self.top_k > 1:
            raise ValueError(f"top_k={self.top_k} needs scores (B, K), got predicted classes")
        hits = preds == target if preds.ndim == 1 else top_k_hits(preds, target, self.top_k)
        self.correct[row, column] += hits.sum()
        self.total[row, column] += len(target)

    def add_counts(self, correct: int | Tensor, total: int | Tensor, row: int, column: int) -> None:
        """Replace an entry by counts that are already those of the whole job.

        Args:
            correct: number of samples classified right, an integer or 0-dim int64.
            total: number of samples, likewise.
            row: the task learnt last.
            column: the task that the samples are of.

        Raises:
            IndexError: if ``row`` or ``column`` is not a task.
        """
        self._check(row, column)
        self._update_count += 1  # what ``update`` does, so that ``compute`` does not warn
        self.correct[row, column] = int(correct)
        self.total[row, column] = int(total)

    def compute(self) -> Tensor:
        """Return the accuracies ``(T, T)`` float64, NaN where nothing was evaluated."""
        return self.values

    # -- figures of the rows so far ---------------------------------------------------------------

    @property
    def values(self) -> Tensor:
        """Accuracies ``(T, T)`` float64 on the host from the counts held here; no exchange."""
        return self.correct.cpu().double() / self.total.cpu().double()

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
        return figures.average_accuracy(self.evaluated)

    @property
    def average_incremental_accuracy(self) -> Tensor:
        """Mean of the pooled accuracies of the rows so far, 0-dim."""
        return figures.average_incremental_accuracy(self.pooled[: len(self.evaluated)])

    @property
    def forgetting(self) -> Tensor:
        """Mean loss from the best accuracy before the last row, 0-dim."""
        return figures.forgetting(self.evaluated)

    @property
    def backward_transfer(self) -> Tensor:
        """Mean change since each task was learnt, 0-dim."""
        return figures.backward_transfer(self.evaluated)

    @property
    def learning_accuracy(self) -> Tensor:
        """Mean accuracy on each task just after it, 0-dim."""
        return figures.learning_accuracy(self.evaluated)

    # -- picture -----------------------------------------------------------------------------------

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the matrix in greys, with the values in per cent in its cells.

        Args:
            val: a result of ``compute()``, or several, of which the last is drawn; computed now if None.
            ax: axes to draw on; a new figure if None.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed (``pip install 'dcl-lightning[plot]'``).
        """
        shown = self.compute() if val is None else val if isinstance(val, Tensor) else val[-1]
        ax = ax if ax is not None else drawing.new_axes(*drawing.matrix_size(self.num_tasks))
        drawing.draw_matrix(ax, shown.cpu().numpy())
        return drawing.figure_of(ax), ax

    def _check(self, row: int, column: int) -> None:
        if not (0 <= row < self.num_tasks and 0 <= column < self.num_tasks):
            raise IndexError(f"row {row}, column {column}: the matrix has tasks 0 to {self.num_tasks - 1}")
