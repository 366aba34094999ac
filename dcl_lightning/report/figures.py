"""The report's pictures as PNG files, and the one that goes to loggers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dcl_lightning.functional import continual_metrics
from dcl_lightning.metrics import AccuracyMatrix, drawing
from dcl_lightning.metrics.evaluation import StreamResults
from dcl_lightning.report.buffer_log import MemoryLog

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["can_draw", "log_picture", "matrix_figure", "pictures_of", "png", "takes_pictures"]

_DPI = 150
_MAX_CLASSES = 200  # of the pictures with a row for each class: beyond, a row is thinner than a printed line


def pictures_of(results: StreamResults, memory: MemoryLog, labels: Sequence[Any]) -> dict[str, Callable[[], Figure]]:
    """Return what draws each picture, by the name of its file without ``.png``.

    Args:
        results: of the stream so far.
        memory: what the memories held; nothing is drawn of an empty one.
        labels: original labels in the order of the model ids.
    """
    matrix, names = results.matrix, [str(label) for label in labels]
    size = len(matrix.evaluated)
    pictures: dict[str, Callable[[], Figure]] = {
        "accuracy_matrix": lambda: matrix_figure(matrix),
        "accuracy_of_tasks": lambda: _figure(
            drawing.CURVE_SIZE, lambda ax: drawing.draw_task_curves(ax, matrix.evaluated.numpy())
        ),
        "accuracy_and_forgetting": lambda: _figure(
            drawing.CURVE_SIZE, lambda ax: drawing.draw_curves(ax, _progress(matrix), "accuracy and forgetting (%)")
        ),
    }
    if results.task_aware is not None:
        aware = results.task_aware
        pictures["accuracy_matrix_task_aware"] = lambda: matrix_figure(aware)
    if len(names) <= _MAX_CLASSES:
        values = results.classes.values[:size].numpy()
        pictures["accuracy_of_classes"] = lambda: _figure(
            drawing.class_size(size, names), lambda ax: drawing.draw_classes(ax, values, names)
        )
    if results.confusion is not None and len(names) <= _MAX_CLASSES:
        counts = results.confusion.numpy()
        pictures["confusion_matrix"] = lambda: _figure(
            drawing.confusion_size(names), lambda ax: drawing.draw_confusion(ax, counts, names)
        )
    if memory.lines:
        rows = memory.rows_by_class(size, len(names)).numpy()
        pictures["buffer_fill"] = lambda: _figure(
            drawing.CURVE_SIZE, lambda ax: drawing.draw_fill(ax, rows.sum(1), memory.nominal)
        )
        if len(names) <= _MAX_CLASSES:
            pictures["buffer_classes"] = lambda: _figure(
                drawing.class_size(size, names), lambda ax: drawing.draw_rows(ax, rows, names)
            )
    return pictures


def matrix_figure(matrix: AccuracyMatrix) -> Figure:
    """Return an accuracy matrix as a figure of its own, not one of pyplot's."""
    return _figure(drawing.matrix_size(matrix.num_tasks), lambda ax: drawing.draw_matrix(ax, matrix.values.numpy()))


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file's content."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI)
    return out.getvalue()


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def takes_pictures(logger: Any) -> bool:
    """Return whether a logger takes figures: those of TensorBoard, Weights & Biases and MLflow do."""
    writer = getattr(logger, "experiment", None)
    return hasattr(logger, "log_image") or hasattr(writer, "add_figure") or hasattr(writer, "log_figure")


def log_picture(logger: Any, name: str, figure: Figure, step: int) -> None:
    """Give a figure to a logger that takes some.

    Args:
        logger: one of Lightning's.
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


def _figure(size: tuple[float, float], draw: Callable[[Any], None]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots())
    return figure


def _progress(matrix: AccuracyMatrix) -> dict[str, np.ndarray[Any, Any]]:
    """Return the curves over the tasks, by name."""
    values = matrix.evaluated
    curves = {
        "average accuracy": continual_metrics.over_tasks(continual_metrics.average_accuracy, values),
        "accuracy over all samples": matrix.pooled[: len(values)],
        "forgetting (max-last)": continual_metrics.over_tasks(continual_metrics.forgetting, values),
    }
    return {name: curve.numpy() for name, curve in curves.items() if not bool(curve.isnan().all())}
