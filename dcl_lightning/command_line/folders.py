"""The folder of a run: tried before the work, and no other run's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dcl_lightning.callbacks.files import run_folder
from dcl_lightning.errors import ConfigurationError

__all__ = ["SaveConfig", "check_place", "leave_no_empty", "own_folders"]


_FILES_BELOW = 256  # bytes of the longest path of a run's files below their folder


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` beside the report: Lightning's own goes where all runs of some loggers share one."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it; Lightning calls this in one process."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(
            self.config, str(folder / self.config_filename), skip_none=False, overwrite=True, multifile=self.multifile
        )


def own_folders(loggers: Sequence[Any]) -> dict[str, int]:
    """Let loggers make their folder ``version_N`` when they choose its number, so that no two runs have one.

    Lightning looks for the next number and makes the folder later: runs started together share it. Call this in the
    process that writes; a version that was given is kept.

    Args:
        loggers: of the run; those that write into one folder get one number.

    Returns:
        The numbers chosen by folder, empty until a logger has chosen.
    """
    made: dict[str, int] = {}
    for logger in loggers:
        if isinstance(logger, (CSVLogger, TensorBoardLogger)) and "://" not in str(logger.root_dir):
            choose: Any = partial(_make_next, logger._get_next_version, os.path.abspath(logger.root_dir), made)
            logger._get_next_version = choose  # type: ignore[method-assign]
    return made


def leave_no_empty(made: dict[str, int]) -> None:
    """Remove folders of a run that ended before it had written anything, and those above them that it leaves empty.

    Args:
        made: as ``own_folders`` returned it.
    """
    for root, version in made.items():
        with suppress(OSError):  # something is in it
            os.removedirs(Path(root) / f"version_{version}")


def _make_next(first_free: Callable[[], int], root: str, made: dict[str, int]) -> int:
    if root not in made:
        version = first_free()
        while True:
            try:
                (Path(root) / f"version_{version}").mkdir(parents=True)
                break
            except FileExistsError:
                version += 1
        made[root] = version
    return made[root]


def check_place(folder: str | os.PathLike[str] | None, key: str) -> None:
    """Refuse a folder for results that cannot be written, before the work and not after it.

    Args:
        folder: need not be there yet; None, or an address elsewhere, is left to who uses it.
        key: what sets it.

    Raises:
        ConfigurationError: it is a file or below one, its name is too long, or it may not be written.
    """
    if folder is None or "://" in str(folder):
        return
    above = os.path.abspath(folder)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    longest = max(map(len, os.fsencode(os.path.abspath(folder)).split(b"/")))
    whole = len(os.fsencode(os.path.abspath(folder))) + _FILES_BELOW
    if longest > os.pathconf(above, "PC_NAME_MAX") or whole > os.pathconf(above, "PC_PATH_MAX"):
        raise ConfigurationError(f"{key}={str(folder)[:40]}...: the name is too long; give a shorter folder")
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        reason = "may not be written" if os.path.isdir(above) else "is no folder"
        raise ConfigurationError(f"{key}={folder}: {above} {reason}; give a folder for the results")
