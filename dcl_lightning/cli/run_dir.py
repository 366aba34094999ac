"""The folder of a run: checked before the work begins, and shared with no other run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dcl_lightning._lightning import choose_version, has_version
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.report.paths import run_folder

__all__ = ["OwnFolders", "SaveConfig", "check_place"]


_FILES_BELOW = 256  # bytes of the longest path of a run's files below their folder


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` beside the report, once the first batch has shown that the run is not refused.

    Lightning's own writes it before set-up, and to a folder that all runs of some loggers share.

    Attributes:
        accepted: whether there was a batch, or nothing left to do.
    """

    accepted = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write nothing yet."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it, in one process."""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(
            self.config, str(folder / self.config_filename), skip_none=False, overwrite=True, multifile=self.multifile
        )

    def _accept(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        if self.accepted or trainer.sanity_checking:
            return
        self.accepted = True
        self.on_train_batch_start = None  # spares each step a call
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, str(trainer.state.fn))

    on_train_batch_start: Any = _accept
    on_validation_batch_start: Any = _accept
    on_test_batch_start: Any = _accept
    on_predict_batch_start: Any = _accept
    on_fit_end = _accept


class OwnFolders:
    """Lets loggers make their folder ``version_N`` when they choose its number, so that no two runs have one.

    Lightning looks for the next number and makes the folder later: runs started together share it. Make this in the
    process that writes; a version that was given is kept.

    Args:
        loggers: of the run; those that write into one folder get one number.
    """

    def __init__(self, loggers: Sequence[Any] = ()) -> None:
        self._versions: dict[str, int] = {}
        self._made: list[Path] = []  # from the top down
        for logger in loggers:
            if isinstance(logger, (CSVLogger, TensorBoardLogger)) and "://" not in str(logger.root_dir):
                choose_version(logger, partial(self._next, os.path.abspath(logger.root_dir)))
                if has_version(logger):  # Lightning makes that folder in set-up
                    self._note_missing(Path(os.path.abspath(logger.log_dir)))

    def remove(self) -> None:
        """Remove the folders of a run that was refused, and those above them that were made for them alone.

        One whose version was given may be another run's, too: it is removed if it is empty.
        """
        for root, version in self._versions.items():
            shutil.rmtree(Path(root) / f"version_{version}", ignore_errors=True)
        for folder in reversed(self._made):
            with suppress(OSError):  # another run's is in it
                folder.rmdir()
        self._versions, self._made = {}, []

    def _note_missing(self, folder: Path) -> None:
        self._made += [part for part in (*reversed(folder.parents), folder) if not part.exists()]

    def _next(self, root: str, first_free: Callable[[], int]) -> int:
        if root not in self._versions:
            version = first_free()
            self._note_missing(Path(root))
            while True:
                try:
                    (Path(root) / f"version_{version}").mkdir(parents=True)
                    break
                except FileExistsError:
                    version += 1
            self._versions[root] = version
        return self._versions[root]


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
