"""The NT3 benchmark of CANDLE: normal or tumour tissue from the expression of 60,483 genes."""

from __future__ import annotations

import os

import numpy as np

from dcl_lightning.data.sources.cache import cached, fingerprint, mapped, write_array
from dcl_lightning.errors import DataError

__all__ = ["FILES", "NUM_FEATURES", "read_candle"]

NUM_FEATURES = 60_483
FILES = ("nt_train2.csv", "nt_test2.csv")


def read_candle(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return ``(x_train, y_train, x_test, y_test)``: ``(n, 60483)`` float32, mapped, and ``(n,)`` int64, 0 or 1.

    Each feature is divided by its largest absolute value among the training rows; the tables are parsed once.

    Args:
        folder: where the two tables lie, without header: the label, then the features.

    Raises:
        DataError: a row of another width, a cell that is no finite number, another label; file and row are named.
    """
    paths = [os.path.join(folder, file) for file in FILES]

    def build(target: str) -> None:
        (x, y), (x_test, y_test) = map(_parse, paths)
        largest = np.abs(x).max(0)
        largest[largest == 0] = 1
        arrays = {"train": x / largest, "train_labels": y, "test": x_test / largest, "test_labels": y_test}
        for name, array in arrays.items():
            write_array(target, name, array)

    stats = [os.stat(path) for path in paths]
    where = cached(folder, "candle", fingerprint(1, *[(s.st_size, s.st_mtime_ns) for s in stats]), build)
    labels = [np.load(os.path.join(where, f"{split}_labels.npy")) for split in ("train", "test")]
    return mapped(where, "train"), labels[0], mapped(where, "test"), labels[1]


def _parse(path: str) -> tuple[np.ndarray, np.ndarray]:
    rows: list[np.ndarray] = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_numbers(path, number, line.split(",")))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
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
