"""The accuracy matrix as text: for the screen, as CSV and as Markdown. Pure functions."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dcl_lightning.functional import continual_metrics
from dcl_lightning.functional.continual_metrics import FORMULAS
from dcl_lightning.metrics import AccuracyMatrix

__all__ = ["csv_text", "over_tasks_text", "progress_text", "summary_text", "table_text"]

_SHOWN = 15
_SCALARS = {name: name.replace("_", " ") for name in FORMULAS}
_FACTS = {
    "agent": "agent",
    "dataset": "data set",
    "seed": "seed",
    "world_size": "workers",
    "num_parameters": "trainable parameters",
    "buffer_bytes": "bytes in memory buffers",
    "buffer_rows": "rows in memory buffers",
    "selection": "selection on",
    "optimizer_steps": "optimizer steps",
    "samples_seen": "training samples seen",
    "wall_time_s": "seconds",
    "config_hash": "SHA-256 of config.yaml",
    "versions": "versions",
}


def table_text(matrix: Tensor, num_tasks: int) -> str:
    """Return the rows so far as a plain table in per cent, with each row's average.

    Args:
        matrix: ``(t, t)`` float64 fractions, t at least 1; NaN becomes a dash.
        num_tasks: length of the whole stream.
    """
    size = len(matrix)
    first = max(0, size - _SHOWN)
    title = f"Accuracy in % after task {size} of {num_tasks} (tasks are counted from 0)"
    if first:
        title += f"; the last {_SHOWN} tasks are shown"
    head = "after task |" + "".join(f"{'task ' + str(j):>8}" for j in range(first, size)) + " |  average"
    lines = [title, head, "-" * 11 + "+" + "-" * (8 * (size - first) + 1) + "+" + "-" * 9]
    for i in range(first, size):
        cells = "".join(f"{_percent(float(matrix[i, j])):>8}" for j in range(first, size))
        average = float(matrix[i, : i + 1].nanmean())
        lines.append(f"{i:>10} |{cells} |{_percent(average):>9}")
    return "\n".join(lines)


def progress_text(matrix: AccuracyMatrix) -> str:
    """Return one line with the figures after the last row, in per cent.

    Args:
        matrix: the accuracy matrix; what is not defined yet is left out.
    """
    figures = {
        "average accuracy": matrix.average_accuracy,
        "over all samples": matrix.pooled[len(matrix.evaluated) - 1],
        "forgetting (max-last)": matrix.forgetting,
        "backward transfer": matrix.backward_transfer,
    }
    return ", ".join(f"{name} {100 * float(v):.1f}" for name, v in figures.items() if not bool(v.isnan()))


def csv_text(matrix: Tensor, corner: str, columns: Sequence[Any], rows: Sequence[Any] | None = None) -> str:
    """Return a matrix as CSV: fractions or counts, empty where there is none.

    Args:
        matrix: ``(n, m)`` float64 or int64.
        corner: head of the first column.
        columns: heads of the m others.
        rows: what stands in the first column; 0 to n - 1 if None.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([corner, *columns])
    for name, row in zip(range(len(matrix)) if rows is None else rows, matrix.tolist(), strict=True):
        writer.writerow([name, *("" if math.isnan(value) else repr(value) for value in row)])
    return out.getvalue()


def over_tasks_text(matrix: AccuracyMatrix) -> str:
    """Return the figures after each task as CSV, fractions, empty where one is not defined.

    Args:
        matrix: the accuracy matrix.
    """
    values = matrix.evaluated
    names = ("average_accuracy", "learning_accuracy", "forgetting", "backward_transfer")
    figures = {name: continual_metrics.over_tasks(getattr(continual_metrics, name), values) for name in names}
    pooled = matrix.pooled[: len(values)]
    so_far = [continual_metrics.average_incremental_accuracy(pooled[: t + 1]) for t in range(len(values))]
    figures |= {"pooled_accuracy": pooled, "average_incremental_accuracy": torch.stack(so_far)}
    return csv_text(torch.stack([*figures.values()], 1), "after_task", [*figures])


def summary_text(facts: Mapping[str, Any], files: Sequence[str], pictures: Sequence[str]) -> str:
    """Return the report for readers, in Markdown.

    Args:
        facts: the content of ``accuracy_matrix.json``.
        files: names of the files of numbers that lie beside it.
        pictures: names of the pictures that lie beside it.
    """
    rows: Sequence[Sequence[float | None]] = facts["matrix"]
    columns = range(len(rows))
    lines = [f"# {facts['agent']} on {facts['dataset'] or 'unnamed data'}", ""]
    lines += ["Accuracy in % on the test samples of each task (column) after each task (row).", ""]
    lines += ["| after | " + " | ".join(f"task {j}" for j in columns) + " |"]
    lines += ["|---" * (len(rows) + 1) + "|"]
    for i, row in enumerate(rows):
        cells = ["" if value is None else f"{100 * value:.1f}" for value in row]
        lines.append(f"| task {i} | " + " | ".join(cells) + " |")
    lines += ["", *_figures(facts), ""]
    lines += ["R[i, j] is the accuracy on the test samples of task j after task i, T the number of tasks."]
    if "matrix_task_aware" in facts:
        lines += ["", "Task-aware: the agent is told the task, and only its classes are looked at (task-IL)."]
    for name in pictures:
        lines += ["", f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"]
    lines += ["", "| task | classes | training samples | test samples |", "|---|---|---|---|"]
    for t, classes in enumerate(facts["task_classes"]):
        names = ", ".join(map(str, classes[:20])) + (", ..." if len(classes) > 20 else "")
        lines.append(f"| {t} | {_escape(names)} | {facts['task_samples'][t]} | {facts['task_test_samples'][t]} |")
    lines += ["", "| | |", "|---|---|"]
    for key, name in _FACTS.items():
        if facts.get(key) is not None:
            lines.append(f"| {name} | {_escape(_words(facts[key]))} |")
    if facts["references"]:
        lines += ["", f"To cite (`{facts['cite']}` prints BibTeX):", ""]
        lines += [f"- {reference}" for reference in facts["references"]]
    lines += ["", "Numbers: " + ", ".join(f"[{name}]({name})" for name in files) + "."]
    return "\n".join(lines) + "\n"


def _figures(facts: Mapping[str, Any]) -> list[str]:
    """Return the table of figures, each with its formula, a column for each way of counting hits."""
    columns = {"%": facts}
    if facts.get("top5") is not None:
        columns["top-5, %"] = facts["top5"]
    if "matrix_task_aware" in facts:
        columns["task-aware, %"] = {key: facts[f"{key}_task_aware"] for key in _SCALARS}
    lines = ["| figure | formula | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for key, name in _SCALARS.items():
        values = [source.get(key) for source in columns.values()]
        cells = ["not defined" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append(f"| {name} | {FORMULAS[key]} | " + " | ".join(cells) + " |")
    return lines


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items())
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
