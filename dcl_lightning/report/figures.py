"""The report's figures as files, and the one that goes to loggers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from dcl_lightning.functional import continual_metrics
from dcl_lightning.metrics import AccuracyMatrix, drawing
from dcl_lightning.metrics.evaluation import StreamResults
from dcl_lightning.report.counts import MemoryLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["can_draw", "figures_of", "file_of", "log_figure", "log_stream", "matrix_figure", "takes_figures"]

P = ParamSpec("P")

_DPI = 150
_MAX_CLASSES = 200  # of the figures with a row for each class: beyond, a row is thinner than a printed line


def figures_of(
    results: StreamResults, memory: MemoryLog, labels: Sequence[object], samples: str = "test samples", title: str = ""
) -> Mapping[str, Callable[[], Figure]]:
    """Return a function that draws each figure, by the name of its file without the ending.

    Args:
        results: of the stream so far.
        memory: what the memories held; an empty log has no figures.
        labels: original labels in the order of the model ids.
        samples: what was evaluated, in words.
        title: above each figure.
    """
    matrix, names = results.matrix, [str(label) for label in labels]
    size = len(matrix.evaluated)
    few = len(names) <= _MAX_CLASSES
    by_class = drawing.class_size(size, names)
    figures = {
        "accuracy_matrix": partial(matrix_figure, matrix, samples),
        "accuracy_of_tasks": partial(
            new_figure, drawing.CURVE_SIZE, drawing.draw_task_curves, matrix.evaluated.numpy()
        ),
        "accuracy_and_forgetting": partial(
            new_figure, drawing.CURVE_SIZE, drawing.draw_curves, _progress(matrix), "accuracy and forgetting (%)"
        ),
    }
    if results.task_aware is not None:
        figures["accuracy_matrix_task_aware"] = partial(matrix_figure, results.task_aware, samples)
    if few:
        values = results.classes.values[:size].numpy()
        figures["accuracy_of_classes"] = partial(new_figure, by_class, drawing.draw_classes, values, names)
    if results.confusion is not None and few:
        figures["confusion_matrix"] = partial(
            new_figure, drawing.confusion_size(names), drawing.draw_confusion, results.confusion.numpy(), names
        )
    if memory.lines:
        rows = memory.rows_by_class(size, len(names)).numpy()
        figures["buffer_fill"] = partial(new_figure, drawing.CURVE_SIZE, drawing.draw_fill, rows.sum(1), memory.nominal)
        if few:
            figures["buffer_classes"] = partial(new_figure, by_class, drawing.draw_rows, rows, names)
    return {name: partial(_titled, draw, title) for name, draw in figures.items()}


def _titled(draw: Callable[[], Figure], title: str) -> Figure:
    figure = draw()
    if title:
        figure.suptitle(title, fontsize=9, wrap=True)
    return figure


def matrix_figure(matrix: AccuracyMatrix, samples: str = "test samples") -> Figure:
    """Return an accuracy matrix as a figure that pyplot does not keep; ``samples`` says what was evaluated."""
    return new_figure(drawing.matrix_size(matrix.num_tasks), drawing.draw_matrix, matrix.values.numpy(), samples)


def new_figure(
    size: tuple[float, float], draw: Callable[Concatenate[Axes, P], None], *args: P.args, **kwargs: P.kwargs
) -> Figure:
    """Return a figure that pyplot does not keep, of one pair of axes.

    Args:
        size: width and height in inches.
        draw: draws on the axes.
        args: its further arguments.
        kwargs: by name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(), *args, **kwargs)
    return figure


def file_of(figure: Figure, kind: str = "png") -> bytes:
    """Return a figure as the content of a file.

    Args:
        figure: the figure.
        kind: ``png``, ``pdf`` or ``svg``.
    """
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=_DPI)
    return out.getvalue()


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401 (whether it can be imported)
    except ImportError:
        return False
    return True


def log_stream(logger: Logger, values: Mapping[str, float], task: int, step: int) -> None:
    """Log metrics of the stream after a task, where a logger can show them over tasks also so.

    Args:
        logger: any; TensorBoard gets curves over tasks of their own, and the average accuracy beside the
            hyperparameters; Weights & Biases draws over tasks.
        values: by name.
        task: 0-based, after which they hold.
        step: optimizer steps so far.
    """
    if isinstance(logger, WandbLogger) and task == 0:
        logger.experiment.define_metric("cl/*", step_metric="task")
    logger.log_metrics({**values, "task": float(task)}, step=step)
    if isinstance(logger, TensorBoardLogger):
        for name, value in values.items():
            logger.experiment.add_scalar(f"{name}_over_tasks", value, task)
        if "cl/average_accuracy" in values:
            logger.log_metrics({"hp_metric": values["cl/average_accuracy"]}, step=step)


def takes_figures(logger: Logger) -> bool:
    """Return whether a logger takes figures: those of TensorBoard, Weights & Biases and MLflow do."""
    writer = getattr(logger, "experiment", None)
    return hasattr(logger, "log_image") or hasattr(writer, "add_figure") or hasattr(writer, "log_figure")


def log_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    """Log a figure.

    Args:
        logger: one of Lightning's that takes figures.
        name: under which it is shown.
        figure: the figure.
        step: optimizer steps so far.
    """
    if hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[figure], step=step)
    elif hasattr(logger.experiment, "add_figure"):
        logger.experiment.add_figure(name, figure, global_step=step)
    else:
        logger.experiment.log_figure(logger.run_id, figure, f"{name}_step_{step}.png")


def _progress(matrix: AccuracyMatrix) -> dict[str, npt.NDArray[np.float64]]:
    """Return the curves over the tasks, by name."""
    values = matrix.evaluated
    curves = {
        "average accuracy": continual_metrics.over_tasks(continual_metrics.average_accuracy, values),
        "accuracy over all samples": matrix.pooled[: len(values)],
        "forgetting (max-last)": continual_metrics.over_tasks(continual_metrics.forgetting, values),
    }
    return {name: curve.numpy() for name, curve in curves.items() if not bool(curve.isnan().all())}
