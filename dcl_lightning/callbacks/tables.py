"""The accuracy matrix as text: for the screen, as CSV and as Markdown. Pure functions."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["csv_text", "summary_text", "table_text"]

_SHOWN = 15
_SCALARS = {
    "average_accuracy": "average accuracy (mean over tasks after the last one)",
    "average_incremental_accuracy": "average incremental accuracy (mean of the pooled accuracies)",
    "pooled_accuracy": "accuracy over all test samples after the last task",
    "learning_accuracy": "learning accuracy (each task just after it)",
    "forgetting": "forgetting (best earlier accuracy - last)",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
}
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


def csv_text(matrix: Tensor) -> str:
    """Return the matrix as CSV: fractions, one row per task learnt, empty where not evaluated.

    Args:
        matrix: ``(T, T)`` float64 fractions.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["after_task", *(f"task_{j}" for j in range(len(matrix)))])
    for i, row in enumerate(matrix.tolist()):
        writer.writerow([i, *("" if math.isnan(value) else repr(value) for value in row)])
    return out.getvalue()


def summary_text(facts: Mapping[str, Any], picture: bool) -> str:
    """Return the report for readers, in Markdown.

    Args:
        facts: the content of ``accuracy_matrix.json``.
        picture: whether ``accuracy_matrix.png`` lies beside it.
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
    if picture:
        lines += ["", "![accuracy matrix](accuracy_matrix.png)"]
    lines += ["", "| figure | % |", "|---|---|"]
    for key, name in _SCALARS.items():
        value = facts.get(key)
        lines.append(f"| {name} | {'not available' if value is None else f'{100 * value:.1f}'} |")
    lines += ["", "| task | classes | training samples |", "|---|---|---|"]
    for t, classes in enumerate(facts["task_classes"]):
        names = ", ".join(map(str, classes[:20])) + (", ..." if len(classes) > 20 else "")
        lines.append(f"| {t} | {_escape(names)} | {facts['task_samples'][t]} |")
    lines += ["", "| | |", "|---|---|"]
    for key, name in _FACTS.items():
        if facts.get(key) is not None:
            lines.append(f"| {name} | {_escape(_words(facts[key]))} |")
    return "\n".join(lines) + "\n"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items())
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
