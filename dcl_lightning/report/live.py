"""The table of tasks that grows on a terminal while a fit runs, drawn by Rich."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dcl_lightning.functional import continual_metrics
from dcl_lightning.report.page.colours import ink_on, shade
from dcl_lightning.report.text import in_percent

__all__ = ["TaskTable"]


class TaskTable:
    """A line for each task: its classes, accuracy now and at best, forgetting, epochs and time; drawn once a width.

    Args:
        title: above the table.
        matrix: ``(t, t)`` float64 fractions, t at least 1; accuracies in it have the colours of the report's page.
        classes: labels of each task.
        epochs: of each task, and those that it was to have.
        seconds: of the fit until the end of each task, as far as known.
        rows: how many lines there may be; earlier tasks are left out.
    """

    def __init__(
        self,
        title: str,
        matrix: Tensor,
        classes: Sequence[Sequence[object]],
        epochs: Sequence[tuple[int, int]],
        seconds: Mapping[int, float],
        rows: int,
    ) -> None:
        self._title, self._matrix, self._classes = title, matrix, classes
        self._epochs, self._seconds, self._rows = epochs, dict(seconds), rows
        self._drawn: dict[int, list[Segment]] = {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the table; a progress bar asks for it many times a second."""
        width = options.max_width
        if width not in self._drawn:
            self._drawn = {width: list(console.render(self._table(), options))}
        return self._drawn[width]

    def _table(self) -> Table:
        matrix, size = self._matrix, len(self._matrix)
        table = Table(title=Text(self._title, "bold"), title_justify="left", box=box.SIMPLE, show_footer=size > 1)
        table.add_column("task", "mean", justify="right", no_wrap=True)
        table.add_column("classes")  # the only one to be shortened
        means = continual_metrics.average_accuracy(matrix), continual_metrics.forgetting(matrix)
        table.add_column("accuracy", _accuracy(float(means[0])), justify="right", no_wrap=True)
        table.add_column("best", justify="right", no_wrap=True)
        table.add_column("forgetting", in_percent(float(means[1])), justify="right", no_wrap=True)
        table.add_column("epochs", justify="right", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        for task in range(max(0, size - self._rows), size):
            column = matrix[task:, task]
            now, best = float(column[-1]), float(column.max())
            lost = float(column[:-1].max()) - now if len(column) > 1 else math.nan
            learnt, planned = self._epochs[task]
            table.add_row(
                str(task),
                Text(", ".join(map(str, self._classes[task])), no_wrap=True, overflow="ellipsis"),
                _accuracy(now),
                _accuracy(best),
                in_percent(lost),
                str(learnt) if learnt == planned else f"{learnt} of {planned}",
                _time(self._until(task) - self._until(task - 1)),
            )
        return table

    def _until(self, task: int) -> float:
        return self._seconds.get(task, math.nan) if task >= 0 else 0.0


def _accuracy(value: float) -> Text:
    if math.isnan(value):
        return Text(in_percent(value))
    colour = shade(value)
    return Text(in_percent(value), f"{_hex(ink_on(colour))} on {colour}")


def _hex(short: str) -> str:
    """Return ``#rgb`` as ``#rrggbb``, which Rich needs."""
    return "#" + "".join(2 * digit for digit in short[1:])


def _time(seconds: float) -> str:
    return "-" if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))
