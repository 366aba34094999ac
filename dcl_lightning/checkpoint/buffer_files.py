"""The memories of all workers in a checkpoint: a file per worker, read by the same number of workers or another."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from dcl_lightning.checkpoint.directory import checkpoint_folder
from dcl_lightning.checkpoint.reshard import reshard
from dcl_lightning.checkpoint.worker_files import (
    FORMAT,
    KEY,
    STAGING,
    check_files,
    copy_file,
    stage_files,
)
from dcl_lightning.comm import Comm, allgather_text, comm_of, raise_together
from dcl_lightning.errors import CheckpointError, ConfigurationError
from dcl_lightning.memory.config import RehearsalConfig, ResolvedConfig, resolve
from dcl_lightning.memory.manager import MemoryManager, Representatives
from dcl_lightning.memory.pytree import flatten, rebuild
from dcl_lightning.memory.storage import RowStore

__all__ = ["RowsFile", "SavedMemories", "Writable", "refuse_another_memory", "save_memory", "write_memory"]


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


# What says how work is done and where rows lie, and not what is stored.
_HARMLESS = ("execution", "prefetch", "storage")


def save_memory(
    trainer: pl.Trainer,
    checkpoint: dict[str, Any],
    config: ResolvedConfig,
    manager: MemoryManager,
    in_flight: Representatives | None,
) -> None:
    """Write this worker's memory beside a checkpoint that is being saved, and tell the checkpoint of all of them.

    Args:
        trainer: every worker's calls this.
        checkpoint: is told.
        config: what the memory was told.
        manager: of the memory, with no work pending.
        in_flight: what was drawn for the next step.
    """
    # Tensors alone: the file holds no class of the user's batches. Copies: one may be part of a larger tensor.
    drawn = None if in_flight is None else ([t.clone() for _, t in flatten(in_flight.rows)], *in_flight[1:])
    files = stage_files(comm_of(trainer.strategy), _root(trainer), lambda file: write_memory(file, manager, drawn))
    ours = checkpoint.setdefault(KEY, {"format": FORMAT})
    ours["memory"] = {"config": asdict(config), "capacity": manager.total, **files}


def _root(trainer: pl.Trainer) -> Path:
    folder = checkpoint_folder(trainer)
    if "://" in folder:
        folder = os.path.join(trainer.default_root_dir, "checkpoints")
    return Path(os.path.abspath(folder), STAGING)


class SavedMemories:
    """The memories of a checkpoint's workers, until the first batch has come and they can be taken.

    Args:
        memory: what the checkpoint tells of them.
    """

    def __init__(self, memory: dict[str, Any]) -> None:
        self._memory = memory
        self.folder = Path(memory["folder"])

    @classmethod
    def of(cls, checkpoint: dict[str, Any], config: ResolvedConfig, comm: Comm) -> SavedMemories | None:
        """Return the memories of a checkpoint, whole; None if it was saved before there were any.

        Args:
            checkpoint: as it was loaded.
            config: what this run's memory was told.
            comm: the cluster; every worker calls this.

        Raises:
            CheckpointError: files are missing or damaged, or there are none though the run had begun.
            ConfigurationError: this run's memory is another one.
        """
        memory = checkpoint.get(KEY, {}).get("memory")
        if memory is None:
            if checkpoint["global_step"]:
                raise CheckpointError(
                    f"the checkpoint of step {checkpoint['global_step']} has no memory: it is of a run without one; "
                    "start from its weights with load_from_checkpoint"
                )
            return None
        refuse_another_memory(memory["config"], config, "the checkpoint's run had")
        files = memory["files"]
        read = [comm.rank] if len(files) == comm.size else list(range(len(files)))
        raise_together(comm, check_files(Path(memory["folder"]), files, read), CheckpointError)
        return cls(memory)

    @property
    def capacity(self) -> int:
        """Rows of the whole job."""
        return self._memory["capacity"]

    def fits(self, manager: MemoryManager, comm: Comm) -> bool:
        """Return whether a memory that is there can take these rows as it is.

        Args:
            manager: of the memory.
            comm: the cluster.
        """
        return manager.total == self.capacity and comm.size == len(self._memory["files"]) == len(manager.sizes)

    def restore(self, manager: MemoryManager, example: Any) -> Representatives | None:
        """Fill this worker's memory; return what it had drawn for its next step.

        On another number of workers the rows are dealt out anew, and the next step draws again.

        Args:
            manager: of the memory, of this worker's part of the capacity.
            example: a nest like what is drawn.
        """
        files = [RowsFile(self.folder / file["name"]) for file in self._memory["files"]]
        comm = manager.comm
        if len(files) != comm.size:
            dealt = reshard([file.header["manager"] for file in files], comm.size, comm.rank)
            manager.take_bookkeeping(dealt.manager)
            for file, (places, slots) in zip(files, dealt.rows, strict=True):
                file.read_into(manager.buffer.store, places, slots)
            return None
        mine = files[comm.rank]
        manager.take_bookkeeping(mine.header["manager"])
        places = torch.arange(len(manager.buffer))
        mine.read_into(manager.buffer.store, places, manager.buffer.slots_at(places))
        if mine.header["in_flight"] is None:
            return None
        rows, *others = mine.header["in_flight"]
        return Representatives(rebuild(example, rows), *others)

    def save_again(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Give a checkpoint that is saved before the first batch the files that this run began with.

        Args:
            trainer: every worker's calls this.
            checkpoint: is told.
        """
        comm, error = comm_of(trainer.strategy), ""
        place = Path(allgather_text(comm, str(_root(trainer) / uuid.uuid4().hex) if comm.rank == 0 else "")[0])
        if comm.rank == 0:
            try:
                place.mkdir(parents=True)
                for file in self._memory["files"]:
                    copy_file(self.folder / file["name"], place / file["name"])
            except OSError as failed:
                error = str(CheckpointError.not_written(place, failed))
        raise_together(comm, error, CheckpointError)
        memory = {k: v for k, v in self._memory.items() if k != "folder"} | {"token": place.name, "staged": str(place)}
        checkpoint.setdefault(KEY, {"format": FORMAT})["memory"] = memory


def refuse_another_memory(
    before: dict[str, Any] | ResolvedConfig, now: ResolvedConfig, what: str, free: Sequence[str] = _HARMLESS
) -> None:
    """Refuse to go on with a memory that was filled in another way.

    Args:
        before: what the memory was told then.
        now: what it is told now.
        what: the beginning of the message, before the former value.
        free: names of values that may differ.

    Raises:
        ConfigurationError: a value differs that says what is stored; both are named.
    """
    # Completed, as an earlier version's leaves out what was as by default.
    former = asdict(resolve(RehearsalConfig.of(before)))
    for name, value in asdict(now).items():
        if name not in free and former[name] != value:
            raise ConfigurationError(
                f"rehearsal.{name}={value}: {what} {former[name]}; go on with that, or begin with an empty memory"
            )
