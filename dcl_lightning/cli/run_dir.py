"""The folder of a run: checked before training, unique to the run, and removed if the run is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from dcl_lightning._lightning import choose_version, has_version
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.report.paths import run_folder

__all__ = ["OwnFolders", "SaveConfig", "check_place"]

_FILES_BELOW = 256  # bytes of the longest path of a run's files below their folder


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder with the first batch, when the run can no longer be refused.

    Lightning's own callback writes it before set-up, and into a folder that all runs of some loggers share.

    Attributes:
        accepted: whether a batch has started, or a fit has ended without one.
    """

    accepted = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace Lightning's, which writes here."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it; called on worker 0 only."""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(
            self.config, str(folder / self.config_filename), skip_none=False, overwrite=True, multifile=self.multifile
        )

    def _accept(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object) -> None:
        if self.accepted or trainer.sanity_checking:
            return
        self.accepted = True
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, str(trainer.state.fn))

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _accept
    on_fit_end = _accept


class OwnFolders:
    """Lets loggers make their folder ``version_N`` when they choose its number, so that no two runs share one.

    Lightning makes the folder later, so that runs started together would choose the same number. A version that was
    given is kept. Use it on worker 0 only.

    Args:
        loggers: of the run; those with the same root folder get the same number.
    """

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._versions: dict[str, int] = {}
        self._made: list[Path] = []  # from the top down
        for logger in loggers:
            if isinstance(logger, (CSVLogger, TensorBoardLogger)) and "://" not in str(logger.root_dir):
                choose_version(logger, partial(self._next, os.path.abspath(logger.root_dir)))
                if has_version(logger):  # Lightning makes that folder in set-up
                    self._note_missing(Path(os.path.abspath(logger.log_dir)))

    def remove(self) -> None:
        """Remove the folders of a run that was refused, and their parents that did not exist before.

        A folder whose version was given may hold another run: it is removed only if it is empty.
        """
        for root, version in self._versions.items():
            shutil.rmtree(Path(root) / f"version_{version}", ignore_errors=True)
        for folder in reversed(self._made):
            with suppress(OSError):  # another run uses it
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
    """Refuse a folder for results that cannot be written.

    Args:
        folder: need not exist yet; None and remote addresses are not checked.
        key: of the configuration.

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
