"""Storage of rows: one preallocated column per tensor of a sample."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.memory.pytree import flatten, map_tensors, rebuild, refuse_another_row
from dcl_lightning.types import PyTree, StateDict

__all__ = ["RowStore", "available_bytes", "refuse_lack_of_space"]


_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def _word(column: Tensor) -> torch.dtype:
    """Return the dtype in which rows are copied: their own if a row is a scalar, else the widest integer that fits."""
    if column.ndim == 1 and _numpy_knows(column.dtype):
        return column.dtype
    row_bytes = column[0].numel() * column.element_size()
    return next(word for word in _WORDS if row_bytes % word.itemsize == 0)


def _numpy_knows(dtype: torch.dtype) -> bool:
    try:
        torch.empty(0, dtype=dtype).numpy()
    except TypeError:
        return False
    return True


def _as_words(rows: Tensor, word: torch.dtype) -> Tensor:
    """Return rows ``(m, ...)`` as ``(m, words)`` or ``(m,)``, without a copy if they are contiguous and aligned."""
    rows = rows.resolve_conj().resolve_neg()
    if rows.dtype == word and rows.ndim == 1:
        return rows
    rows = rows.contiguous()
    if rows.storage_offset() * rows.element_size() % word.itemsize:
        rows = rows.clone()
    return rows.view(len(rows), -1).view(word)


def _as_rows(words: Tensor, column: Tensor) -> Tensor:
    """Undo ``_as_words``: return rows with the dtype and shape of the column."""
    return (
        words
        if words.dtype == column.dtype and words.ndim == 1
        else words.view(column.dtype).view(len(words), *column.shape[1:])
    )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; copies to a GPU are asynchronous, from page-locked memory."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def available_bytes(device: str | Path) -> int | None:
    """Return how many bytes can still be allocated; None if the system does not report it.

    Args:
        device: ``cpu``, a CUDA device, or a folder.
    """
    if isinstance(device, Path):
        return shutil.disk_usage(device).free
    if device != "cpu":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    limit, used = _read_number("/sys/fs/cgroup/memory.max"), _read_number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        found.append(max(limit - used, 0))
    return min(found, default=None)


def _folder(device: str | Path) -> Path | None:
    """Return the folder of memory-mapped rows, None if rows lie on a device."""
    if isinstance(device, str) and device.split(":")[0] in ("cpu", "cuda"):
        return None
    if str(device) in ("gpu", "disk", "ram"):
        raise ConfigurationError(f"rehearsal.storage={device}: give cpu, cuda, or the path of a folder")
    return Path(device).expanduser()


def refuse_lack_of_space(example: PyTree, capacity: int, device: str | Path = "cpu", workers: int = 1) -> int:
    """Return the size of a store in bytes, if that much space is available.

    Args:
        example: as for ``RowStore``.
        capacity: number of rows.
        device: as for ``RowStore``.
        workers: number of workers on this host, each with such a store on the same device or in the same folder.

    Raises:
        ConfigurationError: too little space is available, or the device does not exist.
        DataError: a column cannot be stored.
        TypeError: a leaf of the nest is not a tensor.
    """
    leaves = flatten(example)
    for name, tensor in leaves:
        _refuse_layout(name, tensor)
    num_bytes = sum(capacity * math.prod(t.shape[1:]) * t.element_size() for _, t in leaves)
    folder = _folder(device)
    if folder is None and str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"rehearsal.storage={device}: PyTorch finds no GPU here; give cpu, or a folder")
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"rehearsal.storage={device} cannot be made ({error.strerror})") from error
    there = available_bytes(folder or str(device))
    if there is not None and num_bytes * workers > there:
        share = f", on each of {workers} workers of this host" if workers > 1 else ""
        raise ConfigurationError(
            f"memory of {capacity} rows needs {num_bytes:,} bytes on {device}{share}, where {there:,} are available: "
            "store fewer rows or choose another storage (cpu, cuda, a folder)"
        )
    return num_bytes


def _refuse_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        raise DataError(
            f"column '{name or 'batch'}' is a {kind} tensor, whose rows cannot be stored: make it dense in the collate "
            "function (to_dense, dequantize, padding)"
        )


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a column mapped from a file that is unlinked at once.

    No other worker or job can open the file, and it disappears with the process. Its space is reserved first, since
    writing to a mapped file on a full disk kills the process.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        number, path = tempfile.mkstemp(".rows", "rehearsal-", folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(number, 0, num_bytes)
            data = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
        finally:
            os.close(number)
            os.unlink(path)
    except OSError as error:
        raise ConfigurationError(
            f"rehearsal.storage={folder}: cannot reserve {num_bytes:,} bytes ({error.strerror}); store fewer rows, or "
            "give another folder"
        ) from error
    return data.view(dtype).view(shape)


class RowStore:
    """A fixed number of rows of a nest of tensors; reads and writes cost the rows moved, independent of the capacity.

    Args:
        example: a nest of tensors ``(n, ...)`` with any n, also on the device ``meta``; each defines a column
            ``(capacity, ...)`` of its dtype. Extra columns (logits, features) are part of the nest.
        capacity: number of rows, at least 1.
        device: ``cpu`` (page-locked if CUDA is available), a CUDA device, or a folder for memory-mapped columns, made
            if missing. Each store has its own unlinked files there.

    Raises:
        ConfigurationError: the capacity is below 1, or too little space is available.
        DataError: a column cannot be stored.
        TypeError: a leaf of the nest is not a tensor.
    """

    def __init__(self, example: PyTree, capacity: int, device: str | Path = "cpu") -> None:
        if capacity < 1:
            raise ConfigurationError(f"memory of {capacity} rows: give at least 1")
        leaves = flatten(example)
        self.num_bytes = refuse_lack_of_space(example, capacity, device)
        self.capacity = capacity
        self.names = [name for name, _ in leaves]
        self._example = map_tensors(lambda tensor: tensor[:0].detach().to("meta"), example)
        shapes = [(capacity, *tensor.shape[1:]) for _, tensor in leaves]
        self._storage, folder = device, _folder(device)
        self.device = torch.device("cpu" if folder is not None else str(device))
        pin = self._pinned = folder is None and self.device.type == "cpu" and torch.cuda.is_available()
        self._columns: list[Tensor] = []
        for shape, (_, tensor) in zip(shapes, leaves, strict=True):
            if folder is None:
                column = torch.zeros(shape, dtype=tensor.dtype, device=self.device, pin_memory=pin)
            elif math.prod(shape) == 0:
                column = torch.zeros(shape, dtype=tensor.dtype)
            else:
                column = _mapped(folder, shape, tensor.dtype)
            self._columns.append(column)
        self._row_types = [(column.shape[1:], column.dtype) for column in self._columns]
        # Views of the columns as words; None for columns whose rows are empty.
        self._words = [_word(column) for column in self._columns]
        self._targets = [
            _as_words(column, word) if column.numel() else None
            for column, word in zip(self._columns, self._words, strict=True)
        ]
        # On the host NumPy copies rows; for few rows it takes a third of torch's time.
        on_host = self.device.type == "cpu"
        self._arrays = [None if target is None or not on_host else target.numpy() for target in self._targets]

    def __getstate__(self) -> StateDict:
        """Return the constructor's arguments and the columns."""
        return {"storage": self._storage, "capacity": self.capacity, "example": self._example, "rows": self._columns}

    def __setstate__(self, state: StateDict) -> None:
        """Make the store anew, and copy the rows into it."""
        self.__init__(state["example"], state["capacity"], state["storage"])  # type: ignore[misc]
        for column, rows in zip(self._columns, state["rows"], strict=True):
            column.copy_(rows)

    @property
    def example(self) -> PyTree:
        """A nest like the stored ones, without rows."""
        return self._example

    def __len__(self) -> int:
        """Return the capacity."""
        return self.capacity

    def check(self, rows: PyTree) -> list[tuple[str, Tensor]]:
        """Return the columns of rows by name, after checking that they match those of the store.

        Args:
            rows: a nest like the example.

        Raises:
            DataError: names, shapes or dtypes are not those of the store.
            TypeError: a leaf of the rows is not a tensor.
        """
        leaves = flatten(rows)
        if [name for name, _ in leaves] != self.names:
            raise DataError(f"rows have the columns {[name for name, _ in leaves]}, the memory has {self.names}")
        for (name, tensor), (shape, dtype) in zip(leaves, self._row_types, strict=True):
            _refuse_layout(name, tensor)
            refuse_another_row(name, (shape, dtype), (tensor.shape[1:], tensor.dtype))
        return leaves

    def insert(self, slots: Tensor, rows: PyTree, chosen: Tensor | None = None) -> None:
        """Write rows.

        Args:
            slots: ``(m,)`` int64, distinct, in ``[0, capacity)``.
            rows: a nest like the example, on any device.
            chosen: ``(m,)`` int64, indices of the rows to write; all m if None.

        Raises:
            DataError: names, shapes or dtypes are not those of the store.
            TypeError: a leaf of the rows is not a tensor.
        """
        leaves = self.check(rows)
        if not slots.numel():
            return
        places, picked = slots.cpu().numpy(), slice(None) if chosen is None else chosen.cpu().numpy()
        there = slots if self.device.type == "cpu" else _moved(slots, self.device)
        for (_, tensor), target, word, array in zip(leaves, self._targets, self._words, self._arrays, strict=True):
            source = tensor.detach()
            if target is None:
                continue
            if array is not None and not source.is_cuda:
                array[places] = _as_words(source, word).numpy()[picked]
                continue
            if chosen is not None:
                source = source.index_select(0, _moved(chosen, source.device))
            target.index_copy_(0, there, _as_words(_moved(source, self.device), word))

    def gather(self, slots: Tensor) -> PyTree:
        """Read rows.

        Args:
            slots: ``(m,)`` int64, in ``[0, capacity)``.

        Returns:
            A nest of m rows, new tensors on the device of the store.
        """
        if self.device.type == "cpu" and slots.numel():
            places = slots.numpy()
            rows = [
                torch.zeros((len(slots), *column.shape[1:]), dtype=column.dtype)
                if target is None or array is None
                else _as_rows(self._taken(array, places, target.dtype), column)
                for column, target, array in zip(self._columns, self._targets, self._arrays, strict=True)
            ]
        else:
            slots = _moved(slots, self.device)
            rows = [self._selected(index, slots) for index in range(len(self._columns))]
        return rebuild(self._example, rows)

    def column(self, name: str, slots: Tensor) -> Tensor:
        """Return rows ``(m, ...)`` of a single column, on the CPU.

        Args:
            name: one of ``names``.
            slots: ``(m,)`` int64, in ``[0, capacity)``.
        """
        return self._selected(self.names.index(name), slots.to(self.device)).cpu()

    def _selected(self, index: int, slots: Tensor) -> Tensor:
        column, words = self._columns[index], self._targets[index]
        if words is None:
            return column.new_zeros((len(slots), *column.shape[1:]))
        return _as_rows(words.index_select(0, slots), column)

    def _taken(self, array: npt.NDArray[Any], places: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
        if not self._pinned:
            return torch.from_numpy(array[places])
        # Page-locked like the store, so that the copy to a GPU is asynchronous.
        rows = torch.empty((len(places), *array.shape[1:]), dtype=dtype, pin_memory=True)
        array.take(places, axis=0, out=rows.numpy(), mode="clip")  # unchecked: straight into the rows
        return rows
