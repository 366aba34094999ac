"""What the report says of a run: the content of ``accuracy_matrix.json``."""

from __future__ import annotations

import functools
import hashlib
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dcl_lightning._lightning import callbacks_of, datamodule_of
from dcl_lightning.functional import continual_metrics
from dcl_lightning.metrics import AccuracyMatrix
from dcl_lightning.report.buffer_log import MemoryLog
from dcl_lightning.report.citations import DATASETS, METHODS, method_of, references
from dcl_lightning.types import Task

__all__ = ["facts_of", "figures_of"]


def facts_of(
    folder: Path, trainer: pl.Trainer, agent: pl.LightningModule, clock: Any, memory: MemoryLog
) -> dict[str, Any]:
    """Return the content of ``accuracy_matrix.json``; None for what is not known.

    Args:
        folder: of the run, where its ``config.yaml`` lies.
        trainer: of the run.
        agent: that was trained.
        clock: has the results and the tasks.
        memory: what the memories held.
    """
    data, results = datamodule_of(trainer), clock.results
    baseline = clock.baseline if _comes_again(clock.tasks) else None
    top5 = None if results.top5 is None else figures_of(results.top5)
    aware = {} if results.task_aware is None else figures_of(results.task_aware)
    rows = {"nominal": memory.nominal, "stored": memory.stored, "distinct": memory.distinct}
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    return {
        **figures_of(results.matrix, baseline),
        "top5": top5,
        **{f"{name}_task_aware": value for name, value in aware.items()},
        "formulas": continual_metrics.FORMULAS,
        "task_classes": [_tested(task) for task in clock.tasks],
        "task_samples": [task.num_samples for task in clock.tasks],
        "task_test_samples": results.matrix.total.amax(0)[: len(clock.tasks)].tolist(),
        "agent": type(agent).__name__,
        "dataset": getattr(data, "dataset_name", None),
        "seed": getattr(data, "seed", None),
        "world_size": trainer.world_size,
        "num_parameters": sum(p.numel() for p in agent.parameters() if p.requires_grad),
        "buffer_bytes": memory.num_bytes if memory.lines else None,
        "selection": _selection(trainer, data),
        "optimizer_steps": trainer.global_step,
        "samples_seen": getattr(clock, "samples_seen", None),
        "buffer_rows": rows if memory.lines else None,
        "peak_host_bytes": _peak_host_bytes(),
        "peak_device_bytes": peak,
        "wall_time_s": getattr(clock, "wall_time", None),
        "config_hash": _hash(folder / "config.yaml"),
        **_citations(type(agent), getattr(data, "dataset_name", None)),
        "versions": {
            **{name: _version(name) for name in ("torch", "lightning", "dcl_lightning")},
            "python": platform.python_version(),
        },
    }


def figures_of(matrix: AccuracyMatrix, baseline: Tensor | None = None) -> dict[str, Any]:
    """Return the figures of the rows so far, None where one is not defined.

    Args:
        matrix: the accuracy matrix.
        baseline: ``(T,)`` the untrained network's accuracies, for forward transfer.
    """
    pooled, rows = matrix.pooled, len(matrix.evaluated)
    without_first = continual_metrics.average_incremental_accuracy(pooled[:rows], skip_first=True)
    forward = None if baseline is None else continual_metrics.forward_transfer(matrix.values, baseline)
    return {
        "matrix": _numbers(matrix.values),
        "average_accuracy": _number(matrix.average_accuracy),
        "average_incremental_accuracy": _number(matrix.average_incremental_accuracy),
        "average_incremental_accuracy_without_first": _number(without_first),
        "pooled_accuracy": _number(pooled[rows - 1]),
        "pooled_accuracy_after_task": _numbers(pooled),
        "learning_accuracy": _number(matrix.learning_accuracy),
        "forgetting": _number(matrix.forgetting),
        "backward_transfer": _number(matrix.backward_transfer),
        "forward_transfer": None if forward is None else _number(forward),
    }


def _citations(kind: type, dataset: str | None) -> dict[str, Any]:
    """Return the papers of method and data set, and the command that prints their BibTeX; None if there are none."""
    method = method_of(kind)
    keys = [*METHODS.get(method or "", ()), *DATASETS.get(dataset or "", ())]
    command = f"dcl-lightning cite{f' --model {method}' if method else ''}"
    command += f" --data.dataset {dataset}" if dataset in DATASETS else ""
    return {"references": [reference.short for reference in references(keys)], "cite": command if keys else None}


def _comes_again(tasks: Sequence[Task]) -> bool:
    """Return whether every task is of classes that an earlier one has: else nothing can be known of it beforehand."""
    earlier: set[int] = set(tasks[0].classes)
    for task in tasks[1:]:
        if not set(task.tested) <= earlier:
            return False
        earlier |= set(task.classes)
    return True


def _tested(task: Task) -> list[int | str]:
    """Return the original labels of the classes that the task's test set is of."""
    return [label for y, label in zip(task.classes, task.labels, strict=True) if y not in task.leaked]


def _selection(trainer: pl.Trainer, data: Any) -> str:
    """Say which samples a callback or schedule selects on: ``none``, ``validation`` or ``test``."""
    watchers: list[Any] = [*callbacks_of(trainer), *trainer.lr_scheduler_configs]
    if not any(str(getattr(watcher, "monitor", "")).startswith("val/") for watcher in watchers):
        return "none"
    return "validation" if getattr(data, "val_ratio", 0) else "test"


def _number(value: Tensor) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number


def _numbers(values: Tensor) -> list[Any]:
    return [_numbers(v) if v.ndim else _number(v) for v in values]


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


@functools.cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        # The package in a checkout that was not installed.
        import dcl_lightning

        return dcl_lightning.__version__ if name == "dcl_lightning" else None
