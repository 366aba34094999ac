"""What the report says of a run: the content of ``accuracy_matrix.json``."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor

from dcl_lightning._lightning import callbacks_of, datamodule_of, monitored_by
from dcl_lightning._version import version_of
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.functional import continual_metrics
from dcl_lightning.metrics import AccuracyMatrix
from dcl_lightning.metrics.evaluation import StreamResults
from dcl_lightning.report.citations import DATASETS, method_of, papers_of, references
from dcl_lightning.report.counts import MemoryLog
from dcl_lightning.types import StateDict, Task

__all__ = ["StreamRecord", "content_of", "stream_metrics", "tested_labels"]


class StreamRecord(Protocol):
    """What a task clock records of a stream.

    Attributes:
        results: counts of every evaluation.
        tasks: those of the fit.
        samples_seen: ``new`` and ``rehearsed`` training samples.
        wall_time: seconds of each phase of the fit.
        task_epochs: epochs of each task, and those that it was to have.
    """

    results: StreamResults
    tasks: list[Task]

    @property
    def samples_seen(self) -> dict[str, int]: ...  # noqa: D102 (described above)

    @property
    def wall_time(self) -> dict[str, float]: ...  # noqa: D102 (described above)

    @property
    def task_epochs(self) -> list[tuple[int, int]]: ...  # noqa: D102 (described above)


def content_of(
    folder: Path, trainer: pl.Trainer, agent: pl.LightningModule, record: StreamRecord, memory: MemoryLog
) -> StateDict:
    """Return the content of ``accuracy_matrix.json``; None for what is unknown.

    Args:
        folder: of the run, where its ``config.yaml`` lies.
        trainer: of the run.
        agent: that was trained.
        record: results and tasks.
        memory: what the memories held.
    """
    data, results = datamodule_of(trainer), record.results
    aware = {} if results.task_aware is None else stream_metrics(results.task_aware)
    rows = {"nominal": memory.nominal, "stored": memory.stored, "distinct": memory.distinct}
    return {
        **stream_metrics(results.matrix, record.results.baseline if _repeats_classes(record.tasks) else None),
        "top5": None if results.top5 is None else stream_metrics(results.top5),
        **{f"{name}_task_aware": value for name, value in aware.items()},
        "formulas": continual_metrics.FORMULAS,
        "task_classes": [tested_labels(task) for task in record.tasks],
        "task_epochs": [learnt for learnt, _ in record.task_epochs],
        "planned_epochs": [planned for _, planned in record.task_epochs],
        "task_samples": [task.num_samples for task in record.tasks],
        "task_test_samples": results.matrix.total.amax(0)[: len(record.tasks)].tolist(),
        "agent": type(agent).__name__,
        "tasks_known": agent.hparams.get("head") == "per_task",
        "dataset": data.dataset_name,
        "data_options": data.options,
        "seed": data.seed,
        "world_size": trainer.world_size,
        "num_parameters": sum(p.numel() for p in agent.parameters() if p.requires_grad),
        "buffer_bytes": memory.num_bytes if memory.lines else None,
        "evaluated_on": data.evaluate_on,
        "selection": _selection(trainer, data),
        "optimizer_steps": trainer.global_step,
        "samples_seen": record.samples_seen,
        "buffer_rows": rows if memory.lines else None,
        "peak_host_bytes": _peak_host_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None,
        "wall_time_s": record.wall_time,
        "config_hash": _hash(folder / "config.yaml"),
        **_citations(type(agent), data.dataset_name),
        "versions": {
            **{name: version_of(name) for name in ("torch", "lightning", "dcl_lightning")},
            "python": platform.python_version(),
        },
    }


def stream_metrics(matrix: AccuracyMatrix, baseline: Tensor | None = None) -> StateDict:
    """Return the metrics of the rows so far, None where one is not defined.

    Args:
        matrix: the accuracy matrix.
        baseline: ``(T,)`` the untrained network's accuracies, for forward transfer.
    """
    pooled, rows = matrix.pooled, len(matrix.evaluated)
    without_first = continual_metrics.average_incremental_accuracy(pooled[:rows], skip_first=True)
    return {
        "matrix": [_numbers(row) for row in matrix.values],
        "average_accuracy": _number(matrix.average_accuracy),
        "average_incremental_accuracy": _number(matrix.average_incremental_accuracy),
        "average_incremental_accuracy_without_first": _number(without_first),
        "pooled_accuracy": _number(pooled[rows - 1]),
        "pooled_accuracy_after_task": _numbers(pooled),
        "learning_accuracy": _number(matrix.learning_accuracy),
        "forgetting": _number(matrix.forgetting),
        "backward_transfer": _number(matrix.backward_transfer),
        "forward_transfer": (
            None if baseline is None else _number(continual_metrics.forward_transfer(matrix.values, baseline))
        ),
    }


def _citations(kind: type, dataset: str) -> StateDict:
    """Return the papers of method and data set, and the command that prints their BibTeX; None without papers."""
    method = method_of(kind)
    keys = [*(papers_of(kind) or ()), *DATASETS.get(dataset, ())]
    command = f"dcl-lightning cite{f' --model {method}' if method else ''}"
    command += f" --data.dataset {dataset}" if dataset in DATASETS else ""
    return {"references": [reference.short for reference in references(keys)], "cite": command if keys else None}


def _repeats_classes(tasks: Sequence[Task]) -> bool:
    """Return whether earlier tasks have all classes of each task: only then is forward transfer defined."""
    earlier: set[int] = set(tasks[0].classes)
    for task in tasks[1:]:
        if not set(task.tested) <= earlier:
            return False
        earlier |= set(task.classes)
    return True


def tested_labels(task: Task) -> list[int | str]:
    """Return the original labels of the classes that a task is tested on.

    Args:
        task: the task.
    """
    return [label for y, label in zip(task.classes, task.labels, strict=True) if y not in task.leaked]


def _selection(trainer: pl.Trainer, data: ContinualDataModule) -> str:
    """Return which samples a callback or a schedule selects on: ``none``, ``validation``, or those evaluated on."""
    watchers = (*callbacks_of(trainer), *trainer.lr_scheduler_configs)
    if not any(monitored_by(watcher).startswith("val/") for watcher in watchers):
        return "none"
    return data.evaluate_on if data.validate_on == data.evaluate_on else "validation"


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def _numbers(values: Tensor) -> list[float | None]:
    return [_number(value) for value in values]


def _peak_host_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _hash(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
