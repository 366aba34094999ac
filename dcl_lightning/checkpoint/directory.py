"""The folders in which a run saves checkpoints, and the latest intact checkpoint in them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

import lightning.pytorch as pl
import torch

from dcl_lightning.checkpoint.io import KEY, KINDS, STAGING, check_files, check_seal, side_folder
from dcl_lightning.comm import Comm, raise_together
from dcl_lightning.errors import CheckpointError
from dcl_lightning.paths import expanded
from dcl_lightning.types import StateDict

__all__ = ["ClaimedFolders", "checkpoint_folder", "latest_checkpoint", "problem_of"]

_LOCK = "lock"


def checkpoint_folder(trainer: pl.Trainer) -> str:
    """Return the folder of the trainer's first checkpoint callback, else Lightning's default."""
    return next(iter(_folders(trainer)), os.path.join(trainer.default_root_dir, "checkpoints"))


def _dirpaths(trainer: pl.Trainer) -> list[str | None]:
    """Return ``dirpath`` of each checkpoint callback that has one; a callback that is not set up yet has None."""
    return [saver.dirpath for saver in trainer.checkpoint_callbacks if hasattr(saver, "dirpath")]


def _folders(trainer: pl.Trainer) -> list[str]:
    return [expanded(str(folder)) for folder in _dirpaths(trainer) if folder]


class ClaimedFolders:
    """The folders in which one job saves; the claim ends with its process, however that ends."""

    def __init__(self) -> None:
        self._locks: dict[Path, IO[str]] = {}

    def claim(self, trainer: pl.Trainer, comm: Comm) -> list[Path]:
        """Lock the folders of the trainer's checkpoints, if it saves any, and remove a killed run's unfinished files.

        Args:
            trainer: the trainer, set up.
            comm: the cluster; every worker calls this.

        Returns:
            The folders, on worker 0.

        Raises:
            CheckpointError: a folder cannot be written, or another job saves there.
        """
        if not _dirpaths(trainer):
            return []
        error = ""
        if comm.rank == 0:
            for folder in _folders(trainer):
                try:
                    if "://" not in folder:
                        self._claim(Path(os.path.realpath(folder)))
                except CheckpointError as failed:
                    error = str(failed)
                except OSError as failed:
                    error = (
                        f"checkpoints cannot be saved in {folder} ({failed.strerror}): give a folder for the results"
                    )
        raise_together(comm, error, CheckpointError)
        return list(self._locks)

    def _claim(self, folder: Path) -> None:
        staging = folder / STAGING
        while folder not in self._locks:
            staging.mkdir(parents=True, exist_ok=True)
            lock = open(staging / _LOCK, "a+")  # noqa: SIM115 (open as long as the job runs)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip()
                lock.close()
                raise CheckpointError(
                    f"another job (process {holder or 'unknown'}) saves its checkpoints in {folder}: wait for its end, "
                    "or give trainer.default_root_dir or a logger of its own"
                ) from None
            except OSError:
                pass  # a file system without locks
            if os.path.exists(lock.name) and os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                self._locks[folder] = lock
            else:  # removed by a job that has just ended
                lock.close()
        held = self._locks[folder]
        held.truncate(0)
        held.write(f"{os.getpid()} on {os.uname().nodename}")
        held.flush()
        for left in staging.iterdir():
            if left.name != _LOCK:
                shutil.rmtree(left, ignore_errors=True)
                left.unlink(missing_ok=True)

    def release(self) -> None:
        """Release the locks; safe to repeat."""
        while self._locks:
            folder, lock = self._locks.popitem()
            with suppress(OSError):  # not empty
                os.unlink(lock.name)
                (folder / STAGING).rmdir()
                folder.rmdir()
            lock.close()


def problem_of(path: Path, resumes: bool = True) -> str:
    """Return why a checkpoint cannot be read, or with ``resumes`` cannot be resumed; an empty string if it can.

    Resuming needs the memory and the optimizer, too.
    """
    try:
        check_seal(path)
        checkpoint: StateDict = torch.load(path, map_location="cpu", weights_only=True)
        if resumes and "optimizer_states" not in checkpoint:
            return f"{path} has only weights"
        records = {kind: checkpoint.get(KEY, {}).get(kind) for kind in KINDS if resumes or kind == "weights"}
        found = [(side_folder(path, record, kind), record["files"]) for kind, record in records.items() if record]
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # reading a broken file raises many kinds
        return f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]})"
    problems = (check_files(folder, files, range(len(files))) for folder, files in found)
    return next((problem for problem in problems if problem), "")


def latest_checkpoint(files: Iterable[Path], resumes: bool = True) -> tuple[Path | None, list[str]]:
    """Return the latest checkpoint among files without a ``problem_of``, and the problems of those that are newer."""
    found = {file.resolve() for file in files if file.is_file()}
    problems: list[str] = []
    for path in sorted(found, key=lambda file: (file.stat().st_mtime_ns, str(file)), reverse=True):
        problem = problem_of(path, resumes)
        if not problem:
            return path, problems
        problems.append(problem)
    return None, problems
