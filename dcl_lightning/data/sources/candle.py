"""The NT3 benchmark of CANDLE: normal or tumour tissue from the expression of 60,483 genes."""

from __future__ import annotations

import os

import numpy as np

from dcl_lightning.data.folders import text_lines
from dcl_lightning.data.sources.cache import Arrays, cached_arrays
from dcl_lightning.errors import DataError

__all__ = ["FILES", "NUM_FEATURES", "read_candle"]

NUM_FEATURES = 60_483
FILES = ("nt_train2.csv", "nt_test2.csv")


def read_candle(folder: str) -> Arrays:
    """Return ``(x_train, y_train, x_test, y_test)``: ``(n, 60483)`` float32, memory-mapped, and ``(n,)`` int64, 0 or 1.

    Each feature is divided by its largest absolute value in the training rows. The tables, which have no header and
    begin each row with the label, are parsed once and cached.

    Raises:
        DataError: a row of another width, a cell that is no finite number, or another label; the message names file
            and row.
    """

    def read() -> Arrays:
        (x, y), (x_test, y_test) = (_parse(os.path.join(folder, file)) for file in FILES)
        largest = np.abs(x).max(0)
        largest[largest == 0] = 1
        return x / largest, y, x_test / largest, y_test

    return cached_arrays(folder, "candle", FILES, read)


def _parse(path: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [_numbers(path, number, line.split(",")) for number, line in text_lines(path)]
    if not rows:
        raise DataError(f"{path} has no rows")
    table = np.stack(rows)
    return table[:, 1:], table[:, 0].astype(np.int64)


def _numbers(path: str, number: int, cells: list[str]) -> np.ndarray:
    if len(cells) != NUM_FEATURES + 1:
        raise DataError(
            f"{path}, row {number} has {len(cells)} columns: expected {NUM_FEATURES + 1}, the label and "
            f"{NUM_FEATURES} features"
        )
    try:
        values = np.fromiter(map(float, cells), dtype=np.float32, count=len(cells))
    except ValueError:
        values = np.array([_or_nan(cell) for cell in cells], dtype=np.float32)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        column = int(wrong[0])
        raise DataError(
            f"{path}, row {number}, column {column + 1}: {cells[column].strip()[:40]!r} is no finite number"
        )
    if values[0] not in (0, 1):
        raise DataError(f"{path}, row {number}: label {cells[0].strip()!r}, expected 0 or 1")
    return values


def _or_nan(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")
