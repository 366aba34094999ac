"""The report: a table on the screen after each task, and files in the run's folder at the end."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dcl_lightning.callbacks.tables import csv_text, summary_text, table_text
from dcl_lightning.functional.continual_metrics import forward_transfer
from dcl_lightning.types import Task

__all__ = ["TaskReport"]


class TaskReport(pl.Callback):
    """Shows and writes the accuracy matrix that the trainer's ``TaskClock`` fills.

    After each task worker 0 prints the rows so far. At the end of ``fit`` it writes
    ``report/accuracy_matrix.json``, ``.csv``, ``.png`` (with matplotlib) and ``report/summary.md`` into
    the run's folder; not with ``fast_dev_run``, which leaves nothing behind. Figures are fractions in
    the files and per cent on the screen and in the summary.

    Args:
        show_table: whether to print the table after each task.
    """

    def __init__(self, show_table: bool = True) -> None:
        self.show_table = show_table
        self._written = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Owe a report for each ``fit``."""
        if stage == "fit":
            self._written = False

    def on_task_evaluated(self, trainer: pl.Trainer, agent: pl.LightningModule, task: Task) -> None:
        """Print and log the rows so far; the clock calls this after it has written the task's row."""
        clock = _clock_of(trainer)
        if clock is not None:
            names = ("average_accuracy", "forgetting", "backward_transfer")
            figures = {f"cl/{name}": float(getattr(clock.matrix, name)) for name in names}
            figures = {name: value for name, value in figures.items() if not math.isnan(value)}
            for logger in trainer.loggers:
                logger.log_metrics({**figures, "task": float(task.index)}, step=trainer.global_step)
        if self.show_table and clock is not None and trainer.is_global_zero:
            print("\n" + table_text(clock.matrix.evaluated, task.num_tasks), flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report."""
        self._write_once(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report if there was nothing left to train (a finished run was resumed)."""
        self._write_once(trainer, pl_module)

    def _write_once(self, trainer: pl.Trainer, agent: pl.LightningModule) -> None:
        if self._written or getattr(trainer, "fast_dev_run", False):
            return
        self._written = True
        # ``log_dir`` is a broadcast: every worker asks, one writes.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        clock = _clock_of(trainer)
        if not trainer.is_global_zero:
            return
        if clock is None or not clock.evaluated_rows:
            rank_zero_warn("TaskReport: no task was evaluated, so there is no report")
            return
        report = folder / "report"
        try:
            _write_report(report, trainer, agent, clock)
        except OSError as error:
            rank_zero_warn(f"TaskReport: no report, because {report} cannot be written: {error}")
        else:
            print(f"Report: {report}", flush=True)


def _clock_of(trainer: pl.Trainer) -> Any:
    """Return the trainer's callback that holds the matrix, or None."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if all(hasattr(callback, name) for name in ("matrix", "tasks", "evaluated_rows")):
            return callback
    return None


def _write_report(report: Path, trainer: pl.Trainer, agent: pl.LightningModule, clock: Any) -> None:
    facts = _facts(report.parent, trainer, agent, clock)
    report.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, indent=1, allow_nan=False, default=_plain)
    _replace(report / "accuracy_matrix.json", (text + "\n").encode())
    _replace(report / "accuracy_matrix.csv", csv_text(clock.matrix.values).encode())
    picture = _picture(clock.matrix)
    if picture is not None:
        _replace(report / "accuracy_matrix.png", picture)
    _replace(report / "summary.md", summary_text(facts, picture is not None).encode())


def _facts(folder: Path, trainer: pl.Trainer, agent: pl.LightningModule, clock: Any) -> dict[str, Any]:
    """Return the content of ``accuracy_matrix.json``; None for what is not known."""
    data = getattr(trainer, "datamodule", None)
    matrix, baseline = clock.matrix, getattr(clock, "baseline", None)
    transfer = None if baseline is None else _number(forward_transfer(matrix.values, baseline))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    return {
        "matrix": _numbers(matrix.values),
        "task_classes": [list(task.labels) for task in clock.tasks],
        "task_samples": [task.num_samples for task in clock.tasks],
        "average_accuracy": _number(matrix.average_accuracy),
        "average_incremental_accuracy": _number(matrix.average_incremental_accuracy),
        "pooled_accuracy": _number(matrix.pooled[clock.evaluated_rows - 1]),
        "pooled_accuracy_after_task": _numbers(matrix.pooled),
        "learning_accuracy": _number(matrix.learning_accuracy),
        "forgetting": _number(matrix.forgetting),
        "backward_transfer": _number(matrix.backward_transfer),
        "forward_transfer": transfer,
        "top5": None,
        "agent": type(agent).__name__,
        "dataset": getattr(data, "dataset_name", None),
        "seed": getattr(data, "seed", None),
        "world_size": trainer.world_size,
        "num_parameters": sum(p.numel() for p in agent.parameters() if p.requires_grad),
        "buffer_bytes": getattr(agent, "buffer_bytes", None),
        "selection": _selection(trainer, data),
        "optimizer_steps": trainer.global_step,
        "samples_seen": getattr(clock, "samples_seen", None),
        "buffer_rows": getattr(agent, "buffer_rows", None),
        "peak_host_bytes": _peak_host_bytes(),
        "peak_device_bytes": peak,
        "wall_time_s": getattr(clock, "wall_time", None),
        "config_hash": _hash(folder / "config.yaml"),
        "versions": {
            **{name: _version(name) for name in ("torch", "lightning", "dcl_lightning")},
            "python": platform.python_version(),
        },
    }


def _selection(trainer: pl.Trainer, data: Any) -> str:
    """Say which samples a callback or schedule selects on: ``none``, ``validation`` or ``test``."""
    watchers: list[Any] = [*trainer.callbacks, *trainer.lr_scheduler_configs]  # type: ignore[attr-defined]
    if not any(str(getattr(watcher, "monitor", "")).startswith("val/") for watcher in watchers):
        return "none"
    return "validation" if getattr(data, "val_ratio", 0) else "test"


def _number(value: Tensor) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number


def _numbers(values: Tensor) -> list[Any]:
    return [_numbers(v) if v.ndim else _number(v) for v in values]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _peak_host_bytes() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _hash(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        # The package in a checkout that was not installed.
        import dcl_lightning

        return dcl_lightning.__version__ if name == "dcl_lightning" else None


def _picture(matrix: Any) -> bytes | None:
    """Return the heat map as PNG, or None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        rank_zero_info("TaskReport: no picture without matplotlib: pip install 'dcl-lightning[plot]'")
        return None
    side = 2.0 + 0.55 * min(max(matrix.num_tasks, 4), 20)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    matrix.plot(figure.subplots())
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, bbox_inches="tight")
    return out.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old or the new one, whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
