"""Files that all workers write in parallel for one checkpoint, which records their names, sizes and digests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from dcl_lightning.comm import Comm, allgather_text, raise_together
from dcl_lightning.errors import CheckpointError
from dcl_lightning.types import StateDict

__all__ = [
    "FORMAT",
    "KEY",
    "STAGING",
    "Hashed",
    "Writable",
    "check_files",
    "copy_file",
    "side_folder",
    "stage_files",
    "sync_folder",
]

KEY = "dcl_lightning"  # of our part of a checkpoint
FORMAT = 1
STAGING = ".staging"
_CHUNK = 1 << 22
_NOT_OURS = "this package names no file so; the checkpoint was changed or is not to be trusted, use another one"


class Writable(Protocol):
    """A sink for bytes."""

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes; return their number."""
        ...


class Hashed:
    """Hashes what is written to a file, from its beginning to its end.

    Args:
        file: the destination.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes; return their number."""
        self._hash.update(data)
        self._file.write(data)
        count = memoryview(data).nbytes
        self.num_bytes += count
        return count

    def flush(self) -> None:
        """Hand over what is buffered to the system."""
        self._file.flush()

    def digest(self) -> str:
        """SHA-256 of what was written, in hexadecimal."""
        return self._hash.hexdigest()


def stage_files(comm: Comm, root: Path, write: Callable[[Writable], None]) -> StateDict:
    """Let every worker write its file into a new folder below ``root``; return what the checkpoint tells of them.

    Args:
        comm: the cluster; every worker calls this.
        root: the folder, that of worker 0 is taken; all workers must see it.
        write: writes this worker's file into what it is given.

    Returns:
        ``token``, ``staged`` (the folder) and ``files``: of each worker ``name``, ``bytes`` and ``sha256``.

    Raises:
        CheckpointError: on all workers, if one could not write or its file is not seen by worker 0.
    """
    place = allgather_text(comm, str(root / uuid.uuid4().hex) if comm.rank == 0 else "")[0]
    folder, name = Path(place), f"rank_{comm.rank}"
    mine: StateDict = {"name": name, "host": socket.gethostname()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as file:
            hashed = Hashed(file)
            write(hashed)
            file.flush()
            os.fsync(file.fileno())
        mine |= {"bytes": hashed.num_bytes, "sha256": hashed.digest()}
    except OSError as error:
        mine["error"] = str(CheckpointError.not_written(folder / name, error))
    files = [json.loads(text) for text in allgather_text(comm, json.dumps(mine))]
    errors = [file["error"] for file in files if "error" in file]
    if not errors and comm.rank == 0:
        errors = [
            f"worker {rank} on host {file['host']} wrote {folder / file['name']}, and worker 0 on "
            f"{socket.gethostname()} does not see it: checkpoints need a folder that all hosts share"
            for rank, file in enumerate(files)
            if not _has_size(folder / file["name"], file["bytes"])
        ]
    try:
        raise_together(comm, errors[0] if errors else "", CheckpointError)
    except CheckpointError:
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    kept = [{key: file[key] for key in ("name", "bytes", "sha256")} for file in files]
    return {"token": folder.name, "staged": place, "files": kept}


def side_folder(path: str | os.PathLike[str], memory: StateDict) -> Path:
    """Return the folder of a checkpoint's side files; of a link, that of what it points to.

    Args:
        path: the checkpoint.
        memory: what the checkpoint tells of its side files.

    Raises:
        CheckpointError: the folder's name could be a path to somewhere else.
    """
    token = str(memory["token"])
    if not re.fullmatch("[0-9a-f]{32}", token):
        raise CheckpointError(f"{path} gives {token!r} as the folder of its memory: {_NOT_OURS}")
    place = path if "://" in str(path) else os.path.realpath(os.path.expanduser(path))
    return Path(f"{place}.memory", token)


def copy_file(source: Path, target: Path) -> None:
    """Copy a side file; return when it is on the disk.

    Args:
        source: the file.
        target: the copy.

    Raises:
        OSError: it cannot be read or written.
    """
    with open(source, "rb") as read, open(target, "wb") as written:
        shutil.copyfileobj(read, written, _CHUNK)
        written.flush()
        os.fsync(written.fileno())


def check_files(folder: Path, files: list[StateDict], read: list[int]) -> str:
    """Return what is wrong with side files, empty if nothing is.

    Args:
        folder: where they are.
        files: what the checkpoint tells of each worker's.
        read: the workers whose files are looked at as a whole; of the others the sizes are.
    """
    for rank, file in enumerate(files):
        if file["name"] != f"rank_{rank}":
            return f"{folder}: the checkpoint gives {file['name']!r} as the file of worker {rank}: {_NOT_OURS}"
        path = folder / file["name"]
        if not path.is_file():
            return (
                f"{path} is missing: training goes on only with the memory, which lies in the folder beside the "
                "checkpoint; validate, test and predict do without"
            )
        if not _has_size(path, file["bytes"]) or (rank in read and _digest(path) != file["sha256"]):
            return f"{path} is damaged or of another checkpoint: resume from another one of the run"
    return ""


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk, where the file system can be asked to.

    Args:
        folder: the folder.
    """
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:
        return
    finally:
        os.close(number)
