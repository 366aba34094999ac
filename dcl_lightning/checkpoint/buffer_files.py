"""Saves each worker's rehearsal memory to a file beside the checkpoint, and restores it on any number of workers."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from dcl_lightning.checkpoint.directory import checkpoint_folder
from dcl_lightning.checkpoint.io import (
    FORMAT,
    KEY,
    STAGING,
    Writable,
    check_files,
    copy_file,
    stage_files,
)
from dcl_lightning.checkpoint.reshard import reshard
from dcl_lightning.comm import Comm, allgather_text, comm_of, raise_together
from dcl_lightning.errors import CheckpointError, ConfigurationError
from dcl_lightning.memory.config import RehearsalConfig, ResolvedConfig, resolve
from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.memory.pytree import flatten, rebuild
from dcl_lightning.memory.rows import Representatives
from dcl_lightning.memory.storage import RowStore
from dcl_lightning.types import PyTree, StateDict

__all__ = ["RowsFile", "SavedMemories", "refuse_another_memory", "save_memory", "write_memory"]

_CHUNK_BYTES = 1 << 23
_ALIGNED = 64
_LENGTH = 8  # the file begins with the length of its header, a number of that many bytes


def write_memory(file: Writable, manager: MemoryManager, in_flight: object = None) -> None:
    """Write a memory in chunks, so that the copy in RAM stays within a few MB however large the memory is.

    Args:
        file: written from its beginning to its end.
        manager: of the memory, which must not change meanwhile.
        in_flight: the draw for the next step, in plain types and tensors.
    """
    buffer = manager.buffer
    store, slots = buffer.store, buffer.slots_at(torch.arange(len(buffer)))
    columns = [(name, store.column(name, slots[:0])) for name in store.names]
    header = {
        "manager": manager.state_dict(),
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
    """A saved memory, whose rows are read on demand.

    Args:
        path: the file, with its digest already checked.

    Attributes:
        header: ``manager`` (its bookkeeping), ``in_flight``, ``capacity``, ``rows`` and ``columns``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            known = io.BytesIO(file.read(length))
        # A run may resume on a machine without the GPU that it was saved on.
        self.header: StateDict = torch.load(known, map_location="cpu", weights_only=True)
        self._start = _LENGTH + length

    def read_into(self, store: RowStore, places: Tensor, slots: Tensor) -> None:
        """Write rows of the file into slots of a store.

        Args:
            store: the destination.
            places: ``(m,)`` int64, indices of the rows in the file.
            slots: ``(m,)`` int64, distinct.

        Raises:
            ConfigurationError: the store has other columns.
        """
        names = [name for name, _, _ in self.header["columns"]]
        if names != store.names:
            raise ConfigurationError(
                f"the saved memory has the columns {names}, this run's has {store.names}: resume the run that saved it"
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
                # Mapped copy-on-write: rows are only read, but torch warns of arrays that it cannot write.
                raw = np.memmap(self.path, np.uint8, "c", start, (num_bytes,))
                yield torch.from_numpy(raw).view(dtype).view(count, *shape)
            else:
                yield torch.zeros(count, *shape, dtype=dtype)
            start += num_bytes + _gap(num_bytes)


def _rows_at_once(column: Tensor) -> int:
    row_bytes = column.element_size() * int(np.prod(column.shape[1:], dtype=np.int64))
    return max(_CHUNK_BYTES // max(row_bytes, 1), 1)


def _gap(num_bytes: int) -> int:
    """Return the padding in bytes after which the next column is aligned for its type."""
    return -num_bytes % _ALIGNED


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().reshape(-1).view(torch.uint8)


# These keys say how the work is done and where rows lie; they do not change which rows are stored.
_HARMLESS = ("execution", "prefetch", "storage")


def save_memory(
    trainer: pl.Trainer,
    checkpoint: StateDict,
    config: ResolvedConfig,
    manager: MemoryManager,
    in_flight: Representatives | None,
) -> None:
    """Write this worker's memory to a staging folder, and record the files of all workers in the checkpoint.

    Every worker calls this.

    Args:
        trainer: of the fit.
        checkpoint: being saved; receives the record.
        config: of the memory.
        manager: of the memory, with no work pending.
        in_flight: the draw for the next step.
    """
    # Tensors only, so that the file holds no class of the user's batches; cloned, as torch.save writes whole storages.
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
    """The memories of a checkpoint's workers, kept until the first batch arrives and the memory can be built.

    Args:
        memory: their record in the checkpoint.
    """

    def __init__(self, memory: StateDict) -> None:
        self._memory = memory
        self.folder = Path(memory["folder"])

    @classmethod
    def of(cls, checkpoint: StateDict, config: ResolvedConfig, comm: Comm) -> SavedMemories | None:
        """Return the memories of a checkpoint, their files checked; None if it was saved before the first step.

        Every worker calls this.

        Args:
            checkpoint: as loaded.
            config: of this run's memory.
            comm: the cluster.

        Raises:
            CheckpointError: files are missing or damaged, or the run had no memory.
            ConfigurationError: this run's memory is configured differently.
        """
        memory = checkpoint.get(KEY, {}).get("memory")
        if memory is None:
            if checkpoint["global_step"]:
                raise CheckpointError(
                    f"the checkpoint of step {checkpoint['global_step']} has no memory: its run had none; "
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
        """Capacity of the whole job in rows."""
        return int(self._memory["capacity"])

    def fits(self, manager: MemoryManager, comm: Comm) -> bool:
        """Return whether an existing memory can take these rows without being rebuilt.

        Args:
            manager: of the memory.
            comm: the cluster.
        """
        return manager.total == self.capacity and comm.size == len(self._memory["files"]) == len(manager.sizes)

    def restore(self, manager: MemoryManager, example: PyTree) -> Representatives | None:
        """Fill this worker's memory; return its pending draw for the next step.

        On another number of workers the rows are redistributed, and the next step draws again: None.

        Args:
            manager: of the memory, with this worker's share of the capacity.
            example: has the structure of a draw.
        """
        files = [RowsFile(self.folder / file["name"]) for file in self._memory["files"]]
        comm = manager.comm
        if len(files) != comm.size:
            dealt = reshard([file.header["manager"] for file in files], comm.size, comm.rank)
            manager.load_state_dict(dealt.manager)
            for file, (places, slots) in zip(files, dealt.rows, strict=True):
                file.read_into(manager.buffer.store, places, slots)
            return None
        mine = files[comm.rank]
        manager.load_state_dict(mine.header["manager"])
        places = torch.arange(len(manager.buffer))
        mine.read_into(manager.buffer.store, places, manager.buffer.slots_at(places))
        if mine.header["in_flight"] is None:
            return None
        rows, *others = mine.header["in_flight"]
        return Representatives(rebuild(example, rows), *others)

    def save_again(self, trainer: pl.Trainer, checkpoint: StateDict) -> None:
        """Copy these files for a checkpoint that is saved before the first batch after a resume.

        Every worker calls this.

        Args:
            trainer: of the fit.
            checkpoint: being saved; receives the record.
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
    before: StateDict | ResolvedConfig, now: ResolvedConfig, what: str, free: Sequence[str] = _HARMLESS
) -> None:
    """Refuse to continue with a memory that was filled under another configuration.

    Args:
        before: configuration under which the memory was filled.
        now: present configuration.
        what: words of the message before the former value.
        free: names of values that may differ.

    Raises:
        ConfigurationError: a value that decides which rows are stored differs; the message names both.
    """
    # An earlier version's configuration lacks keys that it did not know: defaults complete it.
    former = asdict(resolve(RehearsalConfig.of(before)))
    for name, value in asdict(now).items():
        if name not in free and former[name] != value:
            raise ConfigurationError(
                f"rehearsal.{name}={value}: {what} {former[name]}; go on with that, or begin with an empty memory"
            )
