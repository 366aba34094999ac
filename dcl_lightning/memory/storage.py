"""Where rows lie: one preallocated column for each tensor of a nest."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.memory.nests import Nest, flatten, map_tensors, rebuild, refuse_another_row

__all__ = ["RowStore", "available_bytes"]


_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def _word(column: Tensor) -> torch.dtype:
    """Return the type in which rows are moved: their own if a row is one number, else the widest integer that fits."""
    if column.ndim == 1 and column.dtype != torch.bfloat16:
        return column.dtype
    row_bytes = column[0].numel() * column.element_size()
    return next(word for word in _WORDS if row_bytes % word.itemsize == 0)


def _as_words(rows: Tensor, word: torch.dtype) -> Tensor:
    """Return rows ``(m, ...)`` as ``(m, words)`` or ``(m,)``, without a copy if they are contiguous and aligned."""
    if rows.dtype == word and rows.ndim == 1:
        return rows
    rows = rows.contiguous()
    if rows.storage_offset() * rows.element_size() % word.itemsize:
        rows = rows.clone()
    return rows.view(len(rows), -1).view(word)


def _as_rows(words: Tensor, column: Tensor) -> Tensor:
    """Undo ``_as_words``: return rows of the type and shape that the column has."""
    return words if words.ndim == 1 else words.view(column.dtype).view(len(words), *column.shape[1:])


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; to a GPU it goes from page-locked memory, while the host goes on."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def available_bytes(device: str | Path) -> int | None:
    """Return how many bytes can still be allocated, None if the system does not say.

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


class RowStore:
    """A fixed number of rows of a nest of tensors; writes and reads cost the rows moved, whatever the capacity.

    Args:
        example: a nest of tensors ``(n, ...)``, n of any size; each gives a column ``(capacity, ...)`` of its dtype.
            Tensors on the device ``meta`` do, for they are only looked at. Extra columns (logits, features) are
            part of the nest.
        capacity: number of rows, at least 1.
        device: ``cpu`` (pinned where CUDA is available), a CUDA device, or a folder, made if it is not there, for
            memory-mapped columns that the host reads.

    Raises:
        ConfigurationError: the capacity is below 1 or does not fit in what is available.
        TypeError: a leaf of the nest is no tensor.
    """

    def __init__(self, example: Nest, capacity: int, device: str | Path = "cpu") -> None:
        if capacity < 1:
            raise ConfigurationError(f"memory of {capacity} rows: give at least 1")
        leaves = flatten(example)
        self.capacity = capacity
        self.names = [name for name, _ in leaves]
        self._example = map_tensors(lambda tensor: tensor[:0].detach().to("meta"), example)
        shapes = [(capacity, *tensor.shape[1:]) for _, tensor in leaves]
        self.num_bytes = sum(math.prod(s) * t.element_size() for s, (_, t) in zip(shapes, leaves, strict=True))

        folder = None if isinstance(device, str) and device.split(":")[0] in ("cpu", "cuda") else Path(device)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cpu" if folder is not None else str(device))
        there = available_bytes(folder or str(device))
        if there is not None and self.num_bytes > there:
            raise ConfigurationError(
                f"memory of {capacity} rows wants {self.num_bytes:,} bytes on {device}, where {there:,} are available: "
                "store fewer rows or put it elsewhere (cpu, cuda, a folder)"
            )
        pin = self._pinned = folder is None and self.device.type == "cpu" and torch.cuda.is_available()
        self._columns: list[Tensor] = []
        for index, (shape, (_, tensor)) in enumerate(zip(shapes, leaves, strict=True)):
            if folder is None:
                column = torch.zeros(shape, dtype=tensor.dtype, device=self.device, pin_memory=pin)
            elif math.prod(shape) == 0:
                column = torch.zeros(shape, dtype=tensor.dtype)
            else:
                file = str(folder / f"column{index}.bin")
                column = torch.from_file(file, shared=True, size=math.prod(shape), dtype=tensor.dtype).view(shape)
            self._columns.append(column)
        self._row_types = [(column.shape[1:], column.dtype) for column in self._columns]
        # The same memory in words, of columns whose rows have bytes at all.
        self._words = [_word(column) for column in self._columns]
        self._targets = [
            _as_words(column, word) if column.numel() else None
            for column, word in zip(self._columns, self._words, strict=True)
        ]
        # On the host NumPy moves rows, in a third of the time that torch takes for as few.
        on_host = self.device.type == "cpu"
        self._arrays = [None if target is None or not on_host else target.numpy() for target in self._targets]

    @property
    def example(self) -> Nest:
        """A nest like those of its rows, without rows."""
        return self._example

    def __len__(self) -> int:
        """Return the capacity."""
        return self.capacity

    def check(self, rows: Nest) -> list[tuple[str, Tensor]]:
        """Return the columns of rows by name, once it is sure that they are like those of the store.

        Args:
            rows: a nest like the example.

        Raises:
            DataError: names, shapes or dtypes are not those of the store.
            TypeError: a leaf of the rows is no tensor.
        """
        leaves = flatten(rows)
        if [name for name, _ in leaves] != self.names:
            raise DataError(f"rows have the columns {[name for name, _ in leaves]}, the memory has {self.names}")
        for (name, tensor), (shape, dtype) in zip(leaves, self._row_types, strict=True):
            refuse_another_row(name, (shape, dtype), (tensor.shape[1:], tensor.dtype))
        return leaves

    def insert(self, slots: Tensor, rows: Nest, chosen: Tensor | None = None) -> None:
        """Write rows.

        Args:
            slots: ``(m,)`` int64, distinct, in ``[0, capacity)``.
            rows: a nest like the example, on any device.
            chosen: ``(m,)`` int64, which of the rows; all m if None.

        Raises:
            DataError: names, shapes or dtypes are not those of the store.
            TypeError: a leaf of the rows is no tensor.
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

    def gather(self, slots: Tensor, out: Nest | None = None) -> Nest:
        """Read rows.

        Args:
            slots: ``(m,)`` int64, in ``[0, capacity)``.
            out: a nest like the example, of m rows, to write into; it may be a view, and on another device.

        Returns:
            A nest of m rows: ``out`` if given, else new tensors on the device of the store.
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
            rows = [column.index_select(0, slots) for column in self._columns]
        if out is None:
            return rebuild(self._example, rows)
        for (_, target), source in zip(flatten(out), rows, strict=True):
            target.copy_(source, non_blocking=True)
        return out

    def column(self, name: str, slots: Tensor) -> Tensor:
        """Return rows ``(m, ...)`` of one column alone, on the CPU.

        Args:
            name: one of ``names``.
            slots: ``(m,)`` int64, in ``[0, capacity)``.
        """
        return self._columns[self.names.index(name)].index_select(0, slots.to(self.device)).cpu()

    def _taken(self, array: npt.NDArray[Any], places: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
        if not self._pinned:
            return torch.from_numpy(array[places])
        # Page-locked like the store, so that a GPU fetches the rows while the host goes on.
        rows = torch.empty((len(places), *array.shape[1:]), dtype=dtype, pin_memory=True)
        array.take(places, axis=0, out=rows.numpy(), mode="clip")  # unchecked: straight into the rows
        return rows

    def state_dict(self, slots: Tensor | None = None) -> dict[str, Any]:
        """Return a copy of rows, on the CPU: ``slots`` ``(n,)`` and ``columns``, a tensor ``(n, ...)`` for each name.

        Args:
            slots: ``(n,)`` int64, those to save; all if None.
        """
        slots = torch.arange(self.capacity) if slots is None else slots.cpu().clone()
        there = slots.to(self.device)
        columns = [column.index_select(0, there).cpu() for column in self._columns]
        return {"slots": slots, "columns": dict(zip(self.names, columns, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write the rows of a state back to their slots; other slots stay as they are.

        Raises:
            ConfigurationError: the columns are others, or a slot lies beyond the capacity.
        """
        slots: Tensor = state["slots"]
        if list(state["columns"]) != self.names:
            raise ConfigurationError(f"saved memory has the columns {list(state['columns'])}, this one {self.names}")
        if slots.numel() and int(slots.max()) >= self.capacity:
            raise ConfigurationError(
                f"saved memory uses slot {int(slots.max())}, this one has {self.capacity}: give the capacity it had"
            )
        self.insert(slots, rebuild(self._example, list(state["columns"].values())))
