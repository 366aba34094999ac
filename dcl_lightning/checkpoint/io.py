"""Writes and reads checkpoints atomically: the memories first, the checkpoint itself last.

A checkpoint ``x.ckpt`` is the manifest of ``x.ckpt.memory/<token>/``: it tells the token, the files and their digests.
Both are written under other names and renamed; the checkpoint's rename is the moment in which all become valid. The
checkpoint ends with a digest of itself, as the comment of the zip file that it is, which other programs ignore.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import uuid
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO

from dcl_lightning._lightning import set_wrapped_io
from dcl_lightning.checkpoint.worker_files import FORMAT, KEY, STAGING, Hashed, side_folder, sync_folder
from dcl_lightning.errors import CheckpointError
from dcl_lightning.paths import expanded

__all__ = ["SideFilesIO", "check_seal", "keep_side_files"]

_SEAL = b"dcl_lightning sha256 "
_SEALED = len(_SEAL) + 64
_ZIP_END = 22  # bytes of a zip file's last record, whose last two are the length of the comment that follows
_CHUNK = 1 << 20


def keep_side_files(strategy: Any) -> SideFilesIO:
    """Let a strategy save, load and remove checkpoints together with their side files; safe to repeat.

    Args:
        strategy: the trainer's. What it saved with so far, the user's plugin too, still writes the checkpoint.

    Returns:
        What saves, loads and removes them.
    """
    holder, io = None, strategy.checkpoint_io
    while not isinstance(io, SideFilesIO) and isinstance(getattr(io, "checkpoint_io", None), CheckpointIO):
        holder, io = io, io.checkpoint_io
    if isinstance(io, SideFilesIO):
        return io
    ours = SideFilesIO(io)
    if holder is None:
        strategy.checkpoint_io = ours
    else:
        # Within one that saves in the background, so that all is done in one order there.
        set_wrapped_io(holder, ours)
    return ours


class SideFilesIO(CheckpointIO):
    """Puts a checkpoint's side files to their place, writes the checkpoint last, and takes both away together.

    Args:
        base: writes and reads the checkpoint itself; Lightning's own is done without, to write in one go.

    Attributes:
        folders: that the job has claimed; what a killed job leaves half is looked for there.
    """

    def __init__(self, base: CheckpointIO) -> None:
        self.base = base
        self.folders: list[Path] = []
        self._busy = threading.Lock()  # a plugin may save in the background, where nothing must be removed meanwhile

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the lock: trainers are copied, as Lightning's own way to save allows."""
        return {name: value for name, value in vars(self).items() if name != "_busy"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state back, with a lock of its own."""
        vars(self).update(state, _busy=threading.Lock())

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Make a checkpoint and its side files valid together, in place of what had this name.

        Args:
            checkpoint: what to save.
            path: its place.
            storage_options: for the user's plugin.

        Raises:
            CheckpointError: it cannot be written; what had this name before is still whole.
        """
        memory = checkpoint.get(KEY, {}).get("memory") or {}
        staged, token = memory.pop("staged", None), memory.get("token", "")
        if "://" in str(path):
            self._refuse_remote(path, staged)
            self.base.save_checkpoint(checkpoint, path, storage_options)
            return
        path = expanded(os.fspath(path))
        with self._busy:
            self._save(checkpoint, path, storage_options, staged, token)

    def _save(self, checkpoint: dict[str, Any], path: str | Path, options: Any, staged: str | None, token: str) -> None:
        target = Path(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        folder = Path(f"{target}.memory")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if staged is not None:
                folder.mkdir(exist_ok=True)
                shutil.move(staged, folder / token)
                # From the inside out: the checkpoint must not be there, after a crash, before all that it needs is.
                for entered in (folder / token, folder, target.parent):
                    sync_folder(entered)
            if type(self.base) is TorchCheckpointIO and options is None:
                _write(checkpoint, target, self._staging(target))
            else:
                self.base.save_checkpoint(checkpoint, path, options)
        except OSError as error:
            for left in (staged, folder / token if staged is not None else None):
                if left is not None:
                    shutil.rmtree(left, ignore_errors=True)
            raise CheckpointError.not_written(path, error) from error
        _keep_only(folder, token)

    def _staging(self, target: Path) -> Path:
        """Return the folder in which a checkpoint is written: a rename brings it from there to its place."""
        for folder in self.folders:
            # A name with a metric's slash in it, "epoch=1-val/acc=0.9", makes folders below the claimed one.
            if target.is_relative_to(folder) and folder.stat().st_dev == target.parent.stat().st_dev:
                return folder / STAGING
        return target.parent / STAGING

    def _refuse_remote(self, path: Any, staged: Any) -> None:
        if staged is not None:
            raise CheckpointError(
                f"{path}: a memory is saved in files beside the checkpoint, which need a folder of a file system: give "
                "ModelCheckpoint(dirpath=...) one"
            )

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return a checkpoint, with the place of its side files noted in it.

        Args:
            path: its place.
            *args: for the plugin that reads.
            **kwargs: for the plugin that reads.

        Raises:
            CheckpointError: there is none, it is damaged, or a later version of this package wrote it.
        """
        remote = "://" in str(path)
        path = path if remote else expanded(os.fspath(path))
        if type(self.base) is TorchCheckpointIO and not remote:
            check_seal(path)
        try:
            checkpoint: dict[str, Any] = self.base.load_checkpoint(path, *args, **kwargs)
        except Exception as error:
            if remote:
                raise
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(f"{path} cannot be read as a checkpoint ({told[0]})") from error
        ours = checkpoint.get(KEY)
        if ours is not None:
            if ours["format"] > FORMAT:
                raise CheckpointError(
                    f"{path} has format {ours['format']}, and this version reads up to {FORMAT}: update dcl_lightning"
                )
            if ours.get("memory"):
                ours["memory"]["folder"] = str(side_folder(path, ours["memory"]))
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, then its side files.

        Args:
            path: the checkpoint.
        """
        path = expanded(os.fspath(path))
        with self._busy:
            self.base.remove_checkpoint(path)
            if "://" not in str(path):
                shutil.rmtree(f"{path}.memory", ignore_errors=True)

    def teardown(self) -> None:
        """End what the base does in the background."""
        self.base.teardown()


def _write(checkpoint: dict[str, Any], target: Path, staging: Path) -> None:
    """Write a sealed checkpoint under another name and rename it."""
    part = staging / f"{uuid.uuid4().hex}.part"
    part.parent.mkdir(exist_ok=True)
    try:
        with open(part, "wb") as file:
            hashed = Hashed(file)
            torch.save(checkpoint, cast(IO[bytes], hashed))
            file.seek(-2, os.SEEK_END)
            file.write(_SEALED.to_bytes(2, "little") + _SEAL + hashed.digest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        sync_folder(target.parent)
    except RuntimeError as error:
        # torch's writer tells of a full disk in this way.
        cause = error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error).splitlines()[0])
        raise cause from error
    finally:
        part.unlink(missing_ok=True)
        _remove_if_empty(part.parent)


def check_seal(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that is not as it was written; one that others wrote has no seal and is taken.

    Args:
        path: the checkpoint.

    Raises:
        CheckpointError: there is none, or it was cut short or changed.
    """
    try:
        with open(path, "rb") as file:
            whole = _is_whole(file)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {error.strerror}") from error
    if not whole:
        raise CheckpointError(
            f"checkpoint {path} is damaged: it is not what was written; resume from another one of the run"
        )


def _is_whole(file: IO[bytes]) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _SEALED - _ZIP_END, 0))
    tail = file.read()
    if len(tail) < _SEALED + _ZIP_END or tail[_ZIP_END : _ZIP_END + len(_SEAL)] != _SEAL:
        # Not sealed: whole if it ends as a zip file without a comment does.
        return tail[-_ZIP_END:-18] == b"PK\x05\x06" and tail[-2:] == b"\0\0"
    if tail[_ZIP_END - 2 : _ZIP_END] != _SEALED.to_bytes(2, "little"):
        return False
    digest, left = hashlib.sha256(), size - _SEALED - 2
    file.seek(0)
    while left:
        chunk = file.read(min(_CHUNK, left))
        digest.update(chunk)
        left -= len(chunk)
    digest.update(b"\0\0")  # the length of the comment before there was one
    return digest.hexdigest().encode() == tail[-64:]


def _keep_only(folder: Path, token: str) -> None:
    """Remove what an earlier checkpoint of this name left in its folder of side files."""
    if not folder.is_dir():
        return
    for old in folder.iterdir():
        if old.name != token:
            shutil.rmtree(old, ignore_errors=True)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
