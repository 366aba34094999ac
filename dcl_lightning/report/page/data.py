"""What a page shows of a run, read from the folder of its report."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from dcl_lightning.types import StateDict

__all__ = ["PAGE", "MemoryLine", "PageRun", "Values", "read_run"]

Cells = Sequence[Sequence[float | None]]

PAGE = "index.html"  # of one run, in its report


class Values(NamedTuple):
    """A table of numbers, as a CSV file has it.

    Args:
        columns: their names.
        rows: their names.
        cells: a number for each row and column; None where there is none.
    """

    columns: list[str]
    rows: list[str]
    cells: list[list[float | None]]


class MemoryLine(NamedTuple):
    """Rows of one class and origin in one worker's memory.

    Args:
        task: the last task that was trained.
        label: of the class.
        origin: the task in which they were stored.
        rows: how many.
    """

    task: int
    label: str
    origin: int
    rows: int


@dataclass(frozen=True)
class PageRun:
    """One run.

    Args:
        name: how its folder is called.
        facts: the content of its ``accuracy_matrix.json``.
        order: the order of classes, as it was given.
        config: text of its configuration file; empty if it has none.
        classes: accuracies of the classes (columns) after each task (rows), as fractions.
        confusion: samples by true class (row) and predicted class (column).
        memory: what the memories held.
        links: addresses of its files, relative to the page, by their names.
    """

    name: str
    facts: StateDict
    order: str | None = None
    config: str = ""
    classes: Values | None = None
    confusion: Values | None = None
    memory: Sequence[MemoryLine] = ()
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def matrix(self) -> list[list[float | None]]:
        """The accuracy matrix up to the last task that was evaluated."""
        rows: Cells = self.facts["matrix"]
        known = [i for i, row in enumerate(rows) if any(value is not None for value in row)]
        size = max(known, default=-1) + 1
        return [list(row[:size]) for row in rows[:size]]


def read_run(report: Path, facts: StateDict, page: Path, name: str | None = None, order: str | None = None) -> PageRun:
    """Return what the folder of a report has; what is missing or cannot be read stays out.

    Args:
        report: the folder, within that of the run.
        facts: the content of its ``accuracy_matrix.json``.
        page: the file from which links go to the files.
        name: of the run; by default the last two parts of its folder.
        order: the order of classes, as it was given.
    """
    # A fit without a memory leaves the file of an earlier one in the same folder.
    memory = _memory(report / "buffer.csv") if facts.get("buffer_rows") else []
    files = sorted(p for p in report.glob("[!.]*") if p.is_file() and p.name != PAGE)
    files += [p for p in (report.parent / "config.yaml", report.parent / "metrics.csv") if p.is_file()]
    return PageRun(
        name="/".join(report.resolve().parent.parts[-2:]) if name is None else name,
        facts=facts,
        order=order,
        config=_text(report.parent / "config.yaml"),
        classes=_values(report / "accuracy_of_classes.csv"),
        confusion=_values(report / "confusion_matrix.csv"),
        memory=memory,
        links={p.name: _address(p, page) for p in files},
    )


def _address(file: Path, page: Path) -> str:
    path = os.path.relpath(file.resolve(), page.resolve().parent)
    return quote(Path(path).as_posix(), errors="surrogateescape")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return ""


def _rows(file: Path) -> list[list[str]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            return list(csv.reader(lines))
    except (OSError, ValueError, csv.Error):
        return []


def _values(file: Path) -> Values | None:
    lines = _rows(file)
    if len(lines) < 2 or any(len(line) != len(lines[0]) for line in lines):
        return None
    try:
        cells = [[_number(cell) for cell in line[1:]] for line in lines[1:]]
    except ValueError:
        return None
    return Values(lines[0][1:], [line[0] for line in lines[1:]], cells)


def _number(cell: str) -> float | None:
    value = float(cell) if cell else math.nan
    return value if math.isfinite(value) else None


def _memory(file: Path) -> list[MemoryLine]:
    head, *lines = _rows(file) or [[]]
    try:
        task, label, origin, rows = (head.index(name) for name in ("task", "class", "origin_task", "rows"))
        return [MemoryLine(int(line[task]), line[label], int(line[origin]), int(line[rows])) for line in lines]
    except (LookupError, ValueError):
        return []
