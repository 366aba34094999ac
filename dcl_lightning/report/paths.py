"""The folder of a run's files."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import lightning.pytorch as pl

from dcl_lightning.paths import expanded

__all__ = ["begin_run", "run_folder"]

_WITHOUT_LOGGER: WeakKeyDictionary[pl.Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of a run's files, which is that of its checkpoints; call it on worker 0 only.

    It is ``log_dir`` of the first logger where that has one, else the folder ``save_dir/name/version``, as of the
    checkpoints of other loggers. Without a logger it is ``default_root_dir``, or a new folder ``version_N`` in it if
    another run's files lie there already.

    Args:
        trainer: of the run.
    """
    if not trainer.loggers:
        if trainer not in _WITHOUT_LOGGER:
            _WITHOUT_LOGGER[trainer] = _free_folder(Path(expanded(str(trainer.default_root_dir))))
        return _WITHOUT_LOGGER[trainer]
    logger = trainer.loggers[0]
    if logger.log_dir is not None:
        return Path(expanded(str(logger.log_dir)))
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(expanded(str(logger.save_dir or trainer.default_root_dir))) / str(logger.name) / version


def begin_run(trainer: pl.Trainer) -> None:
    """Let ``run_folder`` choose anew, so that a trainer without a logger that fits again keeps its first report."""
    _WITHOUT_LOGGER.pop(trainer, None)


def _free_folder(root: Path) -> Path:
    if not any((root / name).exists() for name in ("report", "config.yaml")):
        return root
    for number in itertools.count(1):
        folder = root / f"version_{number}"
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder
