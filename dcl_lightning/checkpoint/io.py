"""Saves a checkpoint and the side files that all workers write for it atomically; verifies them on load.

A checkpoint ``x.ckpt`` is the manifest of ``x.ckpt.memory/<token>/``: it records the token, and each file's name, size
and digest. All are written under other names and renamed; they become valid when the checkpoint is renamed. A
checkpoint ends with a digest of itself in the comment of the zip file that it is, which other programs ignore.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol, cast

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from dcl_lightning._lightning import set_wrapped_io, wrapped_io
from dcl_lightning.comm import Comm, allgather_text, raise_together
from dcl_lightning.errors import CheckpointError
from dcl_lightning.paths import expanded
from dcl_lightning.types import StateDict

__all__ = [
    "FORMAT", "KEY", "KINDS", "STAGING", "SideFilesIO", "Writable", "check_files", "check_seal", "copy_file",
    "keep_side_files", "side_folder", "stage_files",
]  # fmt: skip

KEY = "dcl_lightning"  # of this package's part of a checkpoint
# Kinds of side files, the workers' memories and their parts of the weights: what a missing one means.
KINDS = {
    "memory": "training resumes only with the memory, in the folder beside the checkpoint; validate, test and predict "
    "do without",
    "weights": "the weights are in the folder beside the checkpoint",
}
FORMAT = 1
STAGING = ".staging"
_SEAL = b"dcl_lightning sha256 "
_SEAL_BYTES = len(_SEAL) + 64
_ZIP_END = 22  # bytes of a zip file's last record, whose last two are the length of the comment that follows
_CHUNK = 1 << 22
_NOT_OURS = "this package gives no such names; the checkpoint was changed or is not to be trusted, use another one"


# -- side files: one of each worker -------------------------------------------------------------------


class Writable(Protocol):
    """A sink for bytes."""

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes; return their number."""
        ...


class _Hashed:
    """Hashes what is written to a file, from its beginning to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        self._file.write(data)
        count = memoryview(data).nbytes
        self.num_bytes += count
        return count

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


def stage_files(comm: Comm, root: Path, write: Callable[[Writable], None]) -> StateDict:
    """Let every worker write its file into a new folder below ``root``; return the record for the checkpoint.

    Args:
        comm: the cluster; every worker calls this.
        root: a folder that all workers see; worker 0's is used.
        write: writes this worker's file.

    Returns:
        ``token``, ``staged`` (the folder) and ``files``: for each worker ``name``, ``bytes`` and ``sha256``.

    Raises:
        CheckpointError: on all workers, if one could not write or worker 0 does not see its file.
    """
    place = allgather_text(comm, str(root / uuid.uuid4().hex) if comm.rank == 0 else "")[0]
    folder, name = Path(place), f"rank_{comm.rank}"
    mine: StateDict = {"name": name, "host": socket.gethostname()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as file:
            hashed = _Hashed(file)
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


def side_folder(path: str | os.PathLike[str], record: StateDict, kind: str = "memory") -> Path:
    """Return the folder of a checkpoint's side files, following links.

    Args:
        path: the checkpoint.
        record: its record of the side files.
        kind: of the files, one of ``KINDS``.

    Raises:
        CheckpointError: the recorded token could be a path to another place.
    """
    token = str(record["token"])
    if not re.fullmatch("[0-9a-f]{32}", token):
        raise CheckpointError(f"{path} gives {token!r} as the folder of its {kind}: {_NOT_OURS}")
    place = path if "://" in str(path) else os.path.realpath(os.path.expanduser(path))
    return Path(f"{place}.{kind}", token)


def copy_file(source: Path, target: Path) -> None:
    """Copy a side file; return when the copy is on the disk."""
    with open(source, "rb") as read, open(target, "wb") as written:
        shutil.copyfileobj(read, written, _CHUNK)
        written.flush()
        os.fsync(written.fileno())


def check_files(folder: Path, files: list[StateDict], read: Iterable[int]) -> str:
    """Return what is wrong with side files; an empty string if nothing is.

    Args:
        folder: of the files.
        files: the checkpoint's record of each worker's file.
        read: which of the files are compared with their digests; of the others only the sizes are checked.
    """
    read = set(read)
    for rank, file in enumerate(files):
        if file["name"] != f"rank_{rank}":
            return f"{folder}: the checkpoint gives {file['name']!r} as the file of worker {rank}: {_NOT_OURS}"
        path = folder / file["name"]
        if not path.is_file():
            return f"{path} is missing: {KINDS[folder.parent.suffix[1:]]}"
        if not _has_size(path, file["bytes"]) or (rank in read and _digest(path) != file["sha256"]):
            return f"{path} is damaged or of another checkpoint: resume from another one of the run"
    return ""


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return _sha256(file, path.stat().st_size)


def _sha256(file: IO[bytes], num_bytes: int, end: bytes = b"") -> str:
    """Return the digest of a file's next bytes, followed by others."""
    digest = hashlib.sha256()
    while num_bytes > 0 and (chunk := file.read(min(_CHUNK, num_bytes))):
        digest.update(chunk)
        num_bytes -= len(chunk)
    digest.update(end)
    return digest.hexdigest()


# -- the checkpoint -----------------------------------------------------------------------------------


def keep_side_files(strategy: Strategy) -> SideFilesIO:
    """Let a strategy save, load and remove checkpoints together with their side files; safe to repeat.

    Its present plugin, also a user's own, still writes the checkpoint itself.
    """
    holder, io = None, strategy.checkpoint_io
    while not isinstance(io, SideFilesIO) and (inner := wrapped_io(io)) is not None:
        holder, io = io, inner
    if isinstance(io, SideFilesIO):
        return io
    ours = SideFilesIO(io)
    if holder is None:
        strategy.checkpoint_io = ours
    else:
        # Inside a plugin that saves in the background, so that all work happens there, in order.
        set_wrapped_io(holder, ours)
    return ours


class SideFilesIO(CheckpointIO):
    """Moves a checkpoint's side files into place, then writes the checkpoint; removes both together.

    Args:
        base: writes and reads the checkpoint itself. Lightning's default is bypassed for writing, to do that at once.

    Attributes:
        folders: those that the job has claimed; a killed job's unfinished files are looked for there.
    """

    def __init__(self, base: CheckpointIO) -> None:
        self.base = base
        self.folders: list[Path] = []
        self._busy = threading.Lock()  # a plugin may save in the background while another checkpoint is removed

    def __getstate__(self) -> StateDict:
        """Return the state without the lock, because a trainer may be copied."""
        return {name: value for name, value in vars(self).items() if name != "_busy"}

    def __setstate__(self, state: StateDict) -> None:
        """Set the state, with a new lock."""
        vars(self).update(state, _busy=threading.Lock())

    def save_checkpoint(self, checkpoint: StateDict, path: str | Path, storage_options: object = None) -> None:
        """Make a checkpoint and its side files valid together, in place of what had this name.

        Raises:
            CheckpointError: it cannot be written; what had this name before is intact.
        """
        records = {kind: checkpoint.get(KEY, {}).get(kind) or {} for kind in KINDS}
        staged = {kind: record.pop("staged", None) for kind, record in records.items()}
        if "://" in str(path):
            if any(staged.values()):
                raise CheckpointError(
                    f"{path}: a memory is saved in files beside the checkpoint, as are weights in parts, which need a "
                    "folder of a file system: give ModelCheckpoint(dirpath=...) one"
                )
            self.base.save_checkpoint(checkpoint, path, storage_options)
            return
        path = expanded(os.fspath(path))
        with self._busy:
            tokens = {kind: record.get("token", "") for kind, record in records.items()}
            self._save(checkpoint, path, storage_options, {k: place for k, place in staged.items() if place}, tokens)

    def _save(
        self, checkpoint: StateDict, path: str | Path, options: object, staged: dict[str, str], tokens: dict[str, str]
    ) -> None:
        target = Path(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        folders = {kind: Path(f"{target}.{kind}") for kind in KINDS}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for kind, place in staged.items():
                folder, token = folders[kind], tokens[kind]
                folder.mkdir(exist_ok=True)
                shutil.move(place, folder / token)
                # From the inside out: after a crash, the checkpoint must not exist before all that it needs does.
                for entered in (folder / token, folder, target.parent):
                    _sync_folder(entered)
            if type(self.base) is TorchCheckpointIO and options is None:
                _write(checkpoint, target, self._staging(target))
            else:
                self.base.save_checkpoint(checkpoint, path, options)
        except OSError as error:
            for kind, place in staged.items():
                for left in (place, folders[kind] / tokens[kind]):
                    shutil.rmtree(left, ignore_errors=True)
            raise CheckpointError.not_written(path, error) from error
        for kind, folder in folders.items():
            _keep_only(folder, tokens[kind])

    def _staging(self, target: Path) -> Path:
        """Return a folder on the target's file system, from which a rename moves a checkpoint into place."""
        for folder in self.folders:
            # A checkpoint named after a metric, such as "epoch=1-val/acc=0.9", lies below the claimed folder.
            if target.is_relative_to(folder) and folder.stat().st_dev == target.parent.stat().st_dev:
                return folder / STAGING
        return target.parent / STAGING

    def load_checkpoint(self, path: str | Path, *args: object, **kwargs: object) -> StateDict:
        """Return a checkpoint with whole weights, see ``read_checkpoint``."""
        from dcl_lightning.checkpoint.shards import fill_whole  # which needs this module

        checkpoint = self.read_checkpoint(path, *args, **kwargs)
        fill_whole(checkpoint)
        return checkpoint

    def read_checkpoint(self, path: str | Path, *args: object, **kwargs: object) -> StateDict:
        """Return a checkpoint, with the folders of its side files added to its records; other arguments go to ``base``.

        Raises:
            CheckpointError: it does not exist, is damaged, or was written by a later version of this package.
        """
        remote = "://" in str(path)
        path = path if remote else expanded(os.fspath(path))
        if type(self.base) is TorchCheckpointIO and not remote:
            check_seal(path)
        try:
            # Plugins may take further arguments, which their base class does not declare.
            checkpoint: StateDict = self.base.load_checkpoint(path, *args, **kwargs)  # type: ignore[arg-type]
        except Exception as error:
            if remote:
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason[0]})") from error
        ours = checkpoint.get(KEY)
        if ours is not None:
            if ours["format"] > FORMAT:
                raise CheckpointError(
                    f"{path} has format {ours['format']}, and this version reads up to {FORMAT}: update dcl_lightning"
                )
            for kind in KINDS:
                if ours.get(kind):
                    ours[kind]["folder"] = str(side_folder(path, ours[kind], kind))
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, then its side files."""
        path = expanded(os.fspath(path))
        with self._busy:
            self.base.remove_checkpoint(path)
            if "://" not in str(path):
                for kind in KINDS:
                    shutil.rmtree(f"{path}.{kind}", ignore_errors=True)

    def teardown(self) -> None:
        """Finish what the base plugin does in the background."""
        self.base.teardown()


def _write(checkpoint: StateDict, target: Path, staging: Path) -> None:
    """Write a sealed checkpoint under another name and rename it."""
    part = staging / f"{uuid.uuid4().hex}.part"
    part.parent.mkdir(exist_ok=True)
    try:
        with open(part, "wb") as file:
            hashed = _Hashed(file)
            torch.save(checkpoint, cast(IO[bytes], hashed))
            file.seek(-2, os.SEEK_END)
            file.write(_SEAL_BYTES.to_bytes(2, "little") + _SEAL + hashed.digest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        _sync_folder(target.parent)
    except RuntimeError as error:
        # torch.save raises it for a full disk.
        cause = error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error).splitlines()[0])
        raise cause from error
    finally:
        part.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            part.parent.rmdir()


def check_seal(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that differs from what was written; those of other programs have no seal and are accepted.

    Raises:
        CheckpointError: it does not exist, or was truncated or changed.
    """
    try:
        with open(path, "rb") as file:
            intact = _is_intact(file)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {error.strerror}") from error
    if not intact:
        raise CheckpointError(
            f"checkpoint {path} is damaged: it is not what was written; resume from another one of the run"
        )


def _is_intact(file: IO[bytes]) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _SEAL_BYTES - _ZIP_END, 0))
    tail = file.read()
    if len(tail) < _SEAL_BYTES + _ZIP_END or tail[_ZIP_END : _ZIP_END + len(_SEAL)] != _SEAL:
        # Not sealed: complete if it ends as a zip file without a comment does.
        return tail[-_ZIP_END:-18] == b"PK\x05\x06" and tail[-2:] == b"\0\0"
    if tail[_ZIP_END - 2 : _ZIP_END] != _SEAL_BYTES.to_bytes(2, "little"):
        return False
    file.seek(0)
    # Before the seal was added, the length of the comment was 0.
    return _sha256(file, size - _SEAL_BYTES - 2, b"\0\0").encode() == tail[-64:]


def _keep_only(folder: Path, token: str) -> None:
    """Remove the side files of an earlier checkpoint of the same name."""
    if not folder.is_dir():
        return
    for old in folder.iterdir():
        if old.name != token:
            shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):  # not empty
        folder.rmdir()


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, if the file system supports it."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
