"""The report as text: for the screen, as CSV and as Markdown. Pure functions."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from dcl_lightning.functional import continual_metrics
from dcl_lightning.functional.continual_metrics import FORMULAS
from dcl_lightning.metrics import AccuracyMatrix
from dcl_lightning.types import StateDict

__all__ = [
    "COMPARED", "SAMPLES", "SHOWN_TASKS", "csv_text", "details_of", "evaluation_text", "in_percent", "matrix_csv",
    "metrics_csv", "metrics_of", "progress_text", "progress_title", "result_text", "run_name", "summary_text",
    "table_text", "tasks_of", "title_text",
]  # fmt: skip

# What figures are of, by ``data.evaluate_on``.
SAMPLES = {"test": "test samples", "held_out": "held-out training samples"}

# Metrics in which runs are compared, with their heads in tables.
COMPARED = {
    "average_accuracy": "average accuracy",
    "average_incremental_accuracy": "incremental",
    "pooled_accuracy": "over all samples",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
}
SHOWN_TASKS = 15  # of a table on the screen
_NAMED = 20  # classes of a task
_METRICS = {name: name.replace("_", " ") for name in FORMULAS}
_DETAILS = {
    "agent": "agent",
    "dataset": "data set",
    "data_options": "options of the data",
    "seed": "seed",
    "world_size": "workers",
    "num_parameters": "trainable parameters",
    "buffer_bytes": "bytes in memory buffers",
    "buffer_rows": "rows in memory buffers",
    "evaluated_on": "evaluation on",
    "selection": "selection on",
    "optimizer_steps": "optimizer steps",
    "samples_seen": "training samples seen",
    "wall_time_s": "seconds",
    "config_hash": "SHA-256 of config.yaml",
    "versions": "versions",
}


def run_name(content: StateDict) -> str:
    """Return what a report is of: agent and data set.

    Args:
        content: of ``accuracy_matrix.json``.
    """
    return f"{content.get('agent')} on {content.get('dataset') or 'unnamed data'}"


def title_text(content: StateDict) -> str:
    """Return the title of a report's pictures: agent, data set, and the average accuracy.

    Args:
        content: of ``accuracy_matrix.json``.
    """
    accuracy = content.get("average_accuracy")
    headline = "" if accuracy is None else f": {in_percent(accuracy)} % average accuracy"
    return f"{run_name(content)}{headline}"


def result_text(content: StateDict) -> str:
    """Return a run's result in one line: agent, data set, average accuracy, forgetting, and the time of the fit.

    Args:
        content: of ``accuracy_matrix.json``.
    """
    forgetting, seconds = content.get("forgetting"), content.get("wall_time_s")
    forgotten = "" if forgetting is None else f", forgetting {in_percent(forgetting)}"
    time = "" if seconds is None else f", {timedelta(seconds=round(sum(seconds.values())))}"
    return f"{title_text(content)}{forgotten}{time}"


def table_text(matrix: Tensor, num_tasks: int, evaluated_on: str = "test") -> str:
    """Return the rows so far as a plain table in per cent, with each row's average.

    Args:
        matrix: ``(t, t)`` float64 fractions, t at least 1; NaN becomes a dash.
        num_tasks: length of the whole stream.
        evaluated_on: a key of ``SAMPLES``; the title names others than test samples.
    """
    size = len(matrix)
    first = max(0, size - SHOWN_TASKS)
    title = progress_title(size, num_tasks, evaluated_on, SHOWN_TASKS)
    head = "after task |" + "".join(f"{'task ' + str(j):>8}" for j in range(first, size)) + " |  average"
    lines = [title, head, "-" * 11 + "+" + "-" * (8 * (size - first) + 1) + "+" + "-" * 9]
    for i in range(first, size):
        cells = "".join(f"{in_percent(float(matrix[i, j])):>8}" for j in range(first, size))
        average = float(matrix[i, : i + 1].nanmean())
        lines.append(f"{i:>10} |{cells} |{in_percent(average):>9}")
    return "\n".join(lines)


def in_percent(fraction: float) -> str:
    """Return a figure of the screen, the summary and the page; a dash for NaN."""
    return "-" if math.isnan(fraction) else f"{round(100 * fraction, 1) + 0.0:.1f}"  # + 0.0: what was -0.0 is 0.0


def progress_title(size: int, num_tasks: int, evaluated_on: str, shown: int) -> str:
    """Return the title of a table of the tasks so far.

    Args:
        size: how many they are.
        num_tasks: length of the whole stream.
        evaluated_on: a key of ``SAMPLES``; the title names others than test samples.
        shown: how many of them the table shows at most, the last ones.
    """
    of = "" if evaluated_on == "test" else f" on {SAMPLES[evaluated_on]}"
    left_out = f"; the last {shown} tasks are shown" if size > shown else ""
    return f"Accuracy in %{of} after {size} of {num_tasks} tasks{left_out}"


def progress_text(matrix: AccuracyMatrix) -> str:
    """Return one line with the metrics after the last row, in per cent; undefined ones are left out."""
    values = {
        "average accuracy": matrix.average_accuracy,
        "over all samples": matrix.pooled[len(matrix.evaluated) - 1],
        "forgetting (max-last)": matrix.forgetting,
        "backward transfer": matrix.backward_transfer,
    }
    return ", ".join(f"{name} {in_percent(float(v))}" for name, v in values.items() if not bool(v.isnan()))


def evaluation_text(logged: Mapping[str, Tensor], prefix: str, samples: str) -> str:
    """Return what ``test`` or ``validate`` has found: accuracies in per cent, then all else that was logged.

    Args:
        logged: metrics by name, as of ``trainer.callback_metrics``.
        prefix: of the names, ``test`` or ``val``.
        samples: in words what was evaluated.
    """
    values = {name.removeprefix(f"{prefix}/"): float(v) for name, v in logged.items() if name.startswith(f"{prefix}/")}
    accuracies = {name: value for name, value in values.items() if name == "acc" or name.startswith("acc_")}
    lines = [f"Accuracy in % on the {samples}"]
    for name, value in accuracies.items():
        words = name.removeprefix("acc").removeprefix("_").replace("_", " ") or "all samples"
        lines.append(f"  {words:<12} {in_percent(value):>6}")
    lines += [f"{name}: {value:.4g}" for name, value in values.items() if name not in accuracies]
    return "\n".join(lines)


def csv_text(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV; None and NaN become empty cells.

    Args:
        head: names of the columns.
        rows: as many cells each.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow("" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row)
    return out.getvalue()


def matrix_csv(matrix: Tensor, corner: str, columns: Sequence[object], rows: Sequence[object] | None = None) -> str:
    """Return a matrix of fractions or counts as CSV.

    Args:
        matrix: ``(n, m)`` float64 or int64.
        corner: name of the first column.
        columns: names of the m others.
        rows: cells of the first column; 0 to n - 1 if None.
    """
    names = range(len(matrix)) if rows is None else rows
    return csv_text([corner, *columns], ([name, *row] for name, row in zip(names, matrix.tolist(), strict=True)))


def metrics_csv(matrix: AccuracyMatrix) -> str:
    """Return the metrics after each task as CSV, as fractions."""
    values = matrix.evaluated
    metrics = {
        "average_accuracy": continual_metrics.average_accuracy,
        "learning_accuracy": continual_metrics.learning_accuracy,
        "forgetting": continual_metrics.forgetting,
        "backward_transfer": continual_metrics.backward_transfer,
    }
    columns = {name: continual_metrics.over_tasks(metric, values) for name, metric in metrics.items()}
    pooled = matrix.pooled[: len(values)]
    so_far = [continual_metrics.average_incremental_accuracy(pooled[: t + 1]) for t in range(len(values))]
    columns |= {"pooled_accuracy": pooled, "average_incremental_accuracy": torch.stack(so_far)}
    return matrix_csv(torch.stack([*columns.values()], 1), "after_task", [*columns])


def summary_text(content: StateDict, files: Sequence[str], figures: Sequence[str]) -> str:
    """Return the report for readers, in Markdown.

    Args:
        content: of ``accuracy_matrix.json``.
        files: names of the report's data files.
        figures: names of its PNG files.
    """
    rows: Sequence[Sequence[float | None]] = content["matrix"]
    columns, samples = range(len(rows)), SAMPLES[content["evaluated_on"]]
    lines = [f"# {run_name(content)}", ""]
    lines += [f"Accuracy in % on the {samples} of each task (column) after each task (row).", ""]
    lines += ["| after | " + " | ".join(f"task {j}" for j in columns) + " |"]
    lines += ["|---" * (len(rows) + 1) + "|"]
    for i, row in enumerate(rows):
        cells = ["" if value is None else in_percent(value) for value in row]
        lines.append(f"| task {i} | " + " | ".join(cells) + " |")
    lines += ["", *_markdown(*metrics_of(content)), ""]
    lines += [f"R[i, j] is the accuracy on the {samples} of task j after task i, T the number of tasks."]
    if content["tasks_known"]:
        lines += ["", "The network knows the task of each sample, and has an output layer for each task (task-IL)."]
    if "matrix_task_aware" in content:
        lines += ["", "Task-aware: the scores are restricted to the classes of the sample's task (task-IL)."]
    for name in figures:
        lines += ["", f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"]
    lines += ["", *_markdown(*tasks_of(content))]
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {name} | {_escape(words)} |" for name, words in details_of(content)]
    if content["references"]:
        lines += ["", f"To cite (`{content['cite']}` prints BibTeX):", ""]
        lines += [f"- {reference}" for reference in content["references"]]
    lines += ["", "Data: " + ", ".join(f"[{name}]({name})" for name in files) + "."]
    return "\n".join(lines) + "\n"


def details_of(content: StateDict) -> list[tuple[str, str]]:
    """Return how a run was done, in words: agent, data, seed, sizes, seconds, versions; without what is unknown.

    Args:
        content: of ``accuracy_matrix.json``.
    """
    known = [(key, name) for key, name in _DETAILS.items() if content.get(key) is not None]
    words = {"wall_time_s": _seconds, "data_options": _arguments}
    return [(name, words.get(key, _words)(content[key])) for key, name in known]


def metrics_of(content: StateDict) -> tuple[list[str], list[list[str]]]:
    """Return a row for each metric with its formula, and a column for each way of counting hits.

    Args:
        content: of ``accuracy_matrix.json``.

    Returns:
        The heads of the columns, and the rows.
    """
    columns = {"%": content}
    if content.get("top5") is not None:
        columns["top-5, %"] = content["top5"]
    if "matrix_task_aware" in content:
        columns["task-aware, %"] = {key: content.get(f"{key}_task_aware") for key in _METRICS}
    rows = []
    for key, name in _METRICS.items():
        values = [source.get(key) for source in columns.values()]
        cells = ["not defined" if value is None else in_percent(value) for value in values]
        rows.append([name, FORMULAS[key], *cells])
    return ["metric", "formula", *columns], rows


def tasks_of(content: StateDict) -> tuple[list[str], list[list[str]]]:
    """Return a row for each task: its number, its classes, its samples, and its epochs.

    Args:
        content: of ``accuracy_matrix.json``; a dash stands for what one of an earlier version lacks.

    Returns:
        The heads of the columns, and the rows.
    """
    keys = ("task_samples", "task_test_samples", "task_epochs", "planned_epochs")
    columns, rows = [content.get(key) or [] for key in keys], []
    for task, classes in enumerate(content.get("task_classes") or []):
        names = ", ".join(map(str, classes[:_NAMED])) + (", ..." if len(classes) > _NAMED else "")
        learnt_on, tested_on, learnt, planned = (str(v[task]) if task < len(v) else "-" for v in columns)
        epochs = learnt if planned in (learnt, "-") else f"{learnt} of {planned}, ended early"
        rows.append([str(task), names, learnt_on, tested_on, epochs])
    samples = SAMPLES.get(content.get("evaluated_on", "test"), "samples")
    return ["task", "classes", "training samples", samples, "epochs"], rows


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_escape, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items())
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _arguments(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _seconds(phases: Mapping[str, float]) -> str:
    """Return the sum of all phases, and those that took any time worth a digit."""
    shown = {phase.replace("_", " "): value for phase, value in phases.items() if value >= 0.05}
    return f"{sum(phases.values()):.1f}" + (f": {_words(shown)}" if shown else "")


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
