"""The report: a table on the screen after each task, and files in the run's folder at the end."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dcl_lightning._lightning import datamodule_of, dev_run_batches
from dcl_lightning.callbacks.progress import StreamBar
from dcl_lightning.callbacks.task_clock import TaskClock
from dcl_lightning.comm import comm_of
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.metrics.drawing import in_style, refuse_unknown_style
from dcl_lightning.metrics.evaluation import StreamResults
from dcl_lightning.paths import replacing
from dcl_lightning.report.content import content_of, tested_labels
from dcl_lightning.report.counts import MemoryLog, rows_of
from dcl_lightning.report.figures import (
    can_draw,
    figures_of,
    file_of,
    log_figure,
    log_stream,
    matrix_figure,
    takes_figures,
)
from dcl_lightning.report.page import PAGE, page_text, read_run
from dcl_lightning.report.paths import begin_run, run_folder
from dcl_lightning.report.text import (
    SAMPLES,
    SHOWN_TASKS,
    matrix_csv,
    metrics_csv,
    progress_text,
    progress_title,
    result_text,
    summary_text,
    table_text,
    title_text,
)
from dcl_lightning.screen import show
from dcl_lightning.types import StateDict, Task

__all__ = ["TaskReport"]

_LINES = 10  # of a terminal that are not for the rows of the table


class TaskReport(pl.Callback):
    """Shows and writes what the trainer's ``TaskClock`` found.

    After each task worker 0 prints the rows so far, or lets a ``StreamBar`` draw a table of the tasks; it logs
    ``cl/*``, and gives the accuracy matrix as a figure to the loggers that take figures. At the end of ``fit`` it
    writes the folder ``report`` into the run's folder: ``accuracy_matrix.json`` and ``.csv``, further CSV files,
    ``summary.md``, ``index.html`` and, with matplotlib, pictures; not with ``fast_dev_run``, which leaves nothing
    behind. Figures are fractions in the files and per cent on the screen, in the summary, the page and in pictures.

    Args:
        show_table: whether to show a table after each task.
        pictures: whether to draw pictures where matplotlib is installed, which takes about a second.
        style: of the pictures: ``colour``; ``print``, shades of grey; or a style of matplotlib's by its name or the
            path of its file.
        formats: of the pictures' files, one or several.

    Raises:
        ConfigurationError: there is no such style, or no format.
    """

    def __init__(
        self,
        show_table: bool = True,
        pictures: bool = True,
        style: str = "colour",
        formats: Sequence[Literal["png", "pdf", "svg"]] = ("png",),
    ) -> None:
        refuse_unknown_style(style, "TaskReport.style")
        if not formats or not set(formats) <= {"png", "pdf", "svg"}:
            raise ConfigurationError(f"TaskReport.formats={list(formats)}: give one or several of png, pdf, svg")
        self.show_table, self.pictures = show_table, pictures
        self.style, self.formats = style, tuple(formats)
        self.memory = MemoryLog()
        self.seconds: dict[int, float] = {}  # of the fit until the end of each task
        self._written = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a new report with each fit."""
        if stage == "fit":
            self._written = False
            self.memory, self.seconds = MemoryLog(), {}
            begin_run(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show on a terminal what a resumed run has found before."""
        clock = TaskClock.of(trainer)
        if clock is not None and clock.schedule.evaluated and clock.evaluates and self.show_table:
            self._draw_table(trainer, clock)

    def on_task_evaluated(self, trainer: pl.Trainer, agent: pl.LightningModule, task: Task) -> None:
        """Print and log the rows so far; the clock calls this on every worker after it has written the task's row."""
        clock = TaskClock.of(trainer)
        if clock is None:
            return
        held, data = rows_of(trainer, agent), datamodule_of(trainer)
        if held is not None:
            self.memory.note(task.index, held, data.train_targets, data.stream.train_parts, comm_of(trainer.strategy))
        matrix = clock.results.matrix
        self.seconds[task.index] = sum(clock.wall_time.values())
        figures = {
            "cl/average_accuracy": float(matrix.average_accuracy),
            "cl/forgetting": float(matrix.forgetting),
            "cl/backward_transfer": float(matrix.backward_transfer),
        }
        figures = {name: value for name, value in figures.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            log_stream(logger, figures, task.index, trainer.global_step)
        if not trainer.is_global_zero:
            return
        if self.pictures and can_draw():
            for logger in filter(takes_figures, trainer.loggers):
                with _decorating("the picture of the matrix"), in_style(self.style):
                    figure = matrix_figure(matrix, SAMPLES[data.evaluate_on])
                    log_figure(logger, "cl/accuracy_matrix", figure, trainer.global_step)
        if self.show_table and not self._draw_table(trainer, clock):
            text = table_text(matrix.evaluated, task.num_tasks, data.evaluate_on)
            show(f"\n{text}\n{progress_text(matrix)}")

    def _draw_table(self, trainer: pl.Trainer, clock: TaskClock) -> bool:
        """Give the table of the tasks so far to a bar that draws it; return whether there is one."""
        bar = trainer.progress_bar_callback
        if not isinstance(bar, StreamBar) or not bar.is_enabled:
            return False
        from dcl_lightning.report.live import TaskTable  # needs Rich

        matrix, on = clock.results.matrix.evaluated, datamodule_of(trainer).evaluate_on
        rows = min(SHOWN_TASKS, max(shutil.get_terminal_size().lines - _LINES, 1))
        title = progress_title(len(matrix), len(clock.tasks), on, rows)
        labels = [tested_labels(task) for task in clock.tasks]
        bar.table = TaskTable(title, matrix, labels, clock.task_epochs, self.seconds, rows)
        return True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report."""
        self._write_once(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report if there was nothing left to train (a finished run was resumed)."""
        self._write_once(trainer, pl_module)

    def _write_once(self, trainer: pl.Trainer, agent: pl.LightningModule) -> None:
        if self._written or dev_run_batches(trainer):
            return
        self._written = True
        if not trainer.is_global_zero:
            return
        folder, clock = run_folder(trainer), TaskClock.of(trainer)
        if clock is None or not clock.schedule.evaluated or not clock.evaluates:
            rank_zero_warn("TaskReport: no task was evaluated, so there is no report")
            return
        report = folder / "report"
        content = content_of(folder, trainer, agent, clock, self.memory)
        show(f"Result: {result_text(content)}")
        try:
            self._write(report, content, trainer, clock.results)
        except OSError as error:
            rank_zero_warn(f"TaskReport: no report, because {report} cannot be written: {error}")
        else:
            show(f"Report: {report}")
            if clock.schedule.evaluated == len(clock.tasks):
                show(f"Show:   dcl-lightning report {shlex.quote(str(folder))}")

    def _write(self, report: Path, content: StateDict, trainer: pl.Trainer, results: StreamResults) -> None:
        labels = getattr(datamodule_of(trainer), "original_labels", None) or range(results.num_classes)
        tasks = [f"task_{j}" for j in range(len(results.tested))]
        report.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, allow_nan=False, default=_plain)
        files = {
            "accuracy_matrix.json": text + "\n",
            "accuracy_matrix.csv": matrix_csv(results.matrix.values, "after_task", tasks),
            "figures_over_tasks.csv": metrics_csv(results.matrix),
            "accuracy_of_classes.csv": matrix_csv(results.classes.values, "after_task", labels),
        }
        for name, matrix in (("top5", results.top5), ("task_aware", results.task_aware)):
            if matrix is not None:
                files[f"accuracy_matrix_{name}.csv"] = matrix_csv(matrix.values, "after_task", tasks)
        if results.confusion is not None:
            files["confusion_matrix.csv"] = matrix_csv(results.confusion, "class", labels, labels)
        if self.memory.lines:
            files["buffer.csv"] = self.memory.csv_text(labels)
        for name, text in files.items():
            _replace(report / name, text.encode())
        pictures: list[str] = []
        if self.pictures and not can_draw():
            rank_zero_info("TaskReport: no pictures without matplotlib: pip install 'dcl-lightning[plot]'")
        elif self.pictures:
            samples, title = SAMPLES[content["evaluated_on"]], title_text(content)
            for name, draw in figures_of(results, self.memory, labels, samples, title).items():
                with _decorating(f"the picture {name}"), in_style(self.style):
                    figure = draw()
                    for kind in self.formats:
                        _replace(report / f"{name}.{kind}", file_of(figure, kind))
                    pictures.append(f"{name}.{self.formats[0]}")
        _replace(report / "summary.md", summary_text(content, [*files], pictures).encode())
        with _decorating("the page"):
            page = report / PAGE
            _replace(page, page_text([read_run(report, content, page)]).encode(errors="replace"))

    # -- checkpoint ------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Return what the memories held after the tasks so far; the rest of the report is the clock's."""
        return {"memory": self.memory.state_dict(), "seconds": dict(self.seconds)}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore it."""
        self.memory.load_state_dict(state_dict["memory"])
        self.seconds = dict(state_dict.get("seconds", {}))  # of earlier versions there is none


@contextmanager
def _decorating(what: str) -> Iterator[None]:
    """Leave out a picture or page that cannot be made, by whatever a label or matplotlib's own files do to it."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"TaskReport: {what} is left out ({type(error).__name__}: {str(error).partition(chr(10))[0]})")


def _plain(value: object) -> object:
    return value.item() if hasattr(value, "item") else str(value)


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old or the new one, whole."""
    with replacing(path) as draft:
        draft.write_bytes(content)
