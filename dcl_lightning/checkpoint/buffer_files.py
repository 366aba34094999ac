"""One worker's memory as a file: what is known of the rows first, then column after column, as they lie in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.memory.pytree import rebuild
from dcl_lightning.memory.storage import RowStore

__all__ = ["RowsFile", "Writable", "write_memory"]

_CHUNK_BYTES = 1 << 23
_ALIGNED = 64
_LENGTH = 8  # bytes of the number that the file begins with: the length of what is known of the rows


class Writable(Protocol):
    """What bytes can be written into."""

    def write(self, data: Any) -> int:
        """Write bytes, or what has a buffer of them; return their number."""
        ...


def write_memory(file: Writable, manager: MemoryManager, in_flight: Any = None) -> None:
    """Write a memory; what it costs beside the file is a few MB, however large the memory.

    Args:
        file: to write into, from its beginning to its end.
        manager: of the memory; nothing may change it meanwhile.
        in_flight: what was drawn for the next step, in plain types and tensors.
    """
    buffer = manager.buffer
    store, slots = buffer.store, buffer.slots_at(torch.arange(len(buffer)))
    columns = [(name, store.column(name, slots[:0])) for name in store.names]
    header = {
        "manager": manager.bookkeeping(),
        "in_flight": in_flight,
        "capacity": store.capacity,
        "rows": len(slots),
        "columns": [[name, str(empty.dtype).removeprefix("torch."), list(empty.shape[1:])] for name, empty in columns],
    }
    known = io.BytesIO()
    torch.save(header, known)
    known.write(bytes(_gap(_LENGTH + known.tell())))
    file.write(known.tell().to_bytes(_LENGTH, "little"))
    file.write(known.getbuffer())
    for name, empty in columns:
        written = 0
        for chunk in slots.split(_rows_at_once(empty)):
            written += file.write(_as_bytes(store.column(name, chunk)).numpy().data)
        file.write(bytes(_gap(written)))


class RowsFile:
    """A memory that was written; rows are read when they are asked for.

    Args:
        path: the file, of which the digest was looked at.

    Attributes:
        header: what is known of the rows: ``manager``, ``in_flight``, ``capacity``, ``rows`` and ``columns``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            # What was on a GPU may go on without one.
            known = io.BytesIO(file.read(length))
        self.header: dict[str, Any] = torch.load(known, map_location="cpu", weights_only=True)
        self._start = _LENGTH + length

    def read_into(self, store: RowStore, places: Tensor, slots: Tensor) -> None:
        """Write rows of the file into slots of a store.

        Args:
            store: where they go.
            places: ``(m,)`` int64, which rows of the file.
            slots: ``(m,)`` int64, distinct.

        Raises:
            ConfigurationError: the store has other columns.
        """
        names = [name for name, _, _ in self.header["columns"]]
        if names != store.names:
            raise ConfigurationError(
                f"saved memory has the columns {names}, this one {store.names}: resume its own run"
            )
        if not len(places):
            return
        columns = list(self._columns())
        step = min(_rows_at_once(column) for column in columns)
        for chunk, into in zip(places.split(step), slots.split(step), strict=True):
            store.insert(into, rebuild(store.example, [column[chunk] for column in columns]))

    def _columns(self) -> Iterator[Tensor]:
        start, count = self._start, self.header["rows"]
        for _, name, shape in self.header["columns"]:
            dtype = getattr(torch, name)
            num_bytes = count * dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            if num_bytes:
                # Private: rows are only read, and torch wants what it could write.
                raw = np.memmap(self.path, np.uint8, "c", start, (num_bytes,))
                yield torch.from_numpy(raw).view(dtype).view(count, *shape)
            else:
                yield torch.zeros(count, *shape, dtype=dtype)
            start += num_bytes + _gap(num_bytes)


def _rows_at_once(column: Tensor) -> int:
    row_bytes = column.element_size() * int(np.prod(column.shape[1:], dtype=np.int64))
    return max(_CHUNK_BYTES // max(row_bytes, 1), 1)


def _gap(num_bytes: int) -> int:
    """Return how many bytes follow so that a column begins where its type can be read."""
    return -num_bytes % _ALIGNED


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().reshape(-1).view(torch.uint8)
