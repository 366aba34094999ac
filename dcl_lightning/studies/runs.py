"""Runs as a study finds them: their reports, and what tells runs of one configuration apart from those of another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dcl_lightning.errors import ConfigurationError

__all__ = ["Run", "find_runs", "grouped", "is_finished", "one_each"]

REPORT = Path("report") / "accuracy_matrix.json"

# Of the trainer's options those that change what is learnt; devices are told by the number of workers.
_LEARNS = (
    "precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches",
    "overfit_batches", "sync_batchnorm",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        folder: where it lies.
        facts: the content of its ``accuracy_matrix.json``.
        seed: of training; None where neither configuration nor report say it.
        order: the order of classes, as it was given; None for the data's own.
        key: the same for runs that differ in seed, order and place alone.
        written: when its report was written, in seconds since 1970.
    """

    folder: Path
    facts: dict[str, Any]
    seed: int | None
    order: str | None
    key: str
    written: float

    @property
    def replicate(self) -> tuple[int | str, str | None]:
        """What makes it one sample of its configuration: seed and order; a run of unknown seed is one of its own."""
        return str(self.folder.resolve()) if self.seed is None else self.seed, self.order


def find_runs(places: Sequence[str]) -> list[Run]:
    """Return the finished runs in and below folders, sorted by folder.

    Args:
        places: folders of runs or of studies, or reports.

    Raises:
        ConfigurationError: there is none in one of them.
    """
    runs: dict[Path, Run] = {}
    for place in places:
        path = Path(place)
        reports = [path] if os.path.isfile(path) else []
        if os.path.isdir(path):
            reports = sorted(path.rglob("accuracy_matrix.json"))
        found = [_read(report) for report in reports if _last_row(report) is not None]
        if not found:
            raise ConfigurationError(f"{place}: no finished run in or below it, none with {REPORT}")
        runs |= {run.folder.resolve(): run for run in found}
    return list(runs.values())


def is_finished(folder: Path) -> bool:
    """Return whether a run's report is of the whole stream."""
    return _last_row(folder / REPORT) is not None


def _last_row(report: Path) -> list[float | None] | None:
    """Return the last row of a report's matrix; None if there is no report or the stream was not learnt to its end."""
    try:
        last = json.loads(report.read_text())["matrix"][-1]
        return last if any(value is not None for value in last) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # something else of that name
        return None


def _read(report: Path) -> Run:
    folder = report.parent.parent
    facts = json.loads(report.read_text())
    config_file = folder / "config.yaml"
    config = yaml.safe_load(config_file.read_text()) if config_file.is_file() else {}
    data = dict((config.get("data") or {}).get("init_args") or {})
    order = data.pop("class_order", None)
    data.pop("seed", None)
    same = {"model": config.get("model"), "data": data} if config else {k: facts[k] for k in ("agent", "dataset")}
    trainer = config.get("trainer") or {}
    same["trainer"] = {name: trainer[name] for name in _LEARNS if trainer.get(name) is not None}
    same["workers"] = facts.get("world_size")
    key = hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()
    seed = config.get("seed_everything")
    if seed is None or isinstance(seed, bool):  # drawn, or none: the report knows
        seed = facts.get("seed")
    order = None if order is None else str(order)
    return Run(folder, facts, None if seed is None else int(seed), order, key, report.stat().st_mtime)


def one_each(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Keep one run of each configuration, seed and order: a copy, or a run that was resumed, is no second sample.

    Args:
        runs: in any order.

    Returns:
        Of each the one whose report is newest, where the first of them stood; and a line for each that came again.
    """
    same: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        same.setdefault((run.key, run.replicate), []).append(run)
    kept, notes = [], []
    for copies in same.values():
        newest = max(copies, key=lambda run: run.written)
        kept.append(newest)
        if len(copies) > 1:
            others = ", ".join(str(run.folder) for run in copies if run is not newest)
            order = "" if newest.order is None else f", order {newest.order}"
            notes.append(
                f"Seed {newest.seed}{order} of one configuration counts once, by the newest run {newest.folder}, "
                f"without {others}"
            )
    return kept, notes


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return runs of one configuration together, by a name: that of their folder, with a number if two share it.

    Args:
        runs: in any order.
    """
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
    names: dict[str, list[Run]] = {}
    for members in by_key.values():
        name = members[0].folder.parent.name or str(members[0].facts.get("agent"))
        number = 2
        unique = name
        while unique in names:
            unique, number = f"{name} ({number})", number + 1
        names[unique] = members
    return names
