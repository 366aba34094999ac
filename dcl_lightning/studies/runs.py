"""Runs as a study finds them: their reports, and what tells runs of one configuration apart from those of another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dcl_lightning.errors import ConfigurationError

__all__ = ["Run", "find_runs", "grouped", "is_finished"]

REPORT = Path("report") / "accuracy_matrix.json"


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        folder: where it lies.
        facts: the content of its ``accuracy_matrix.json``.
        seed: of training.
        order: the order of classes, as it was given; None for the data's own.
        key: the same for runs that differ in seed, order and place alone.
    """

    folder: Path
    facts: dict[str, Any]
    seed: int
    order: str | None
    key: str


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
        reports = [path] if path.is_file() else sorted(path.rglob("accuracy_matrix.json"))
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
        matrix = json.loads(report.read_text())["matrix"]
    except (OSError, ValueError, KeyError):
        return None
    return matrix[-1] if matrix and any(value is not None for value in matrix[-1]) else None


def _read(report: Path) -> Run:
    folder = report.parent.parent
    facts = json.loads(report.read_text())
    config_file = folder / "config.yaml"
    config = yaml.safe_load(config_file.read_text()) if config_file.is_file() else {}
    data = dict((config.get("data") or {}).get("init_args") or {})
    order = data.pop("class_order", None)
    data.pop("seed", None)
    same = {"model": config.get("model"), "data": data} if config else {k: facts[k] for k in ("agent", "dataset")}
    same["workers"] = facts.get("world_size")
    key = hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()
    seed = config.get("seed_everything", facts.get("seed"))
    return Run(folder, facts, int(seed or 0), None if order is None else str(order), key)


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
