"""Where a run's files go, and files that a reader never sees half-written."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import lightning.pytorch as pl

from dcl_lightning.paths import expanded

__all__ = ["begin_run", "replacing", "run_folder"]

# Of trainers without a logger.
_CHOSEN: WeakKeyDictionary[pl.Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: pl.Trainer) -> Path:
    """Return where a run's files go: beside its checkpoints; ask in the process that writes.

    Lightning's ``log_dir`` is that for loggers that write files of their own. Of others it is the folder that all runs
    share, while checkpoints go to a folder for each run. Without a logger it is ``default_root_dir``, or a folder
    ``version_N`` in it where another run's files lie there already.

    Args:
        trainer: of the run.
    """
    if not trainer.loggers:
        if trainer not in _CHOSEN:
            _CHOSEN[trainer] = _without_logger(Path(expanded(str(trainer.default_root_dir))))
        return _CHOSEN[trainer]
    logger = trainer.loggers[0]
    own = getattr(logger, "log_dir", None)
    if own is not None:
        return Path(expanded(str(own)))
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(expanded(str(logger.save_dir or trainer.default_root_dir))) / str(logger.name) / version


def begin_run(trainer: pl.Trainer) -> None:
    """Let ``run_folder`` choose anew: a trainer without a logger that fits again must not replace its first report.

    Args:
        trainer: at the set-up of a fit.
    """
    _CHOSEN.pop(trainer, None)


def _without_logger(root: Path) -> Path:
    if not any((root / name).exists() for name in ("report", "config.yaml")):
        return root
    for number in itertools.count(1):
        folder = root / f"version_{number}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("numbers do not end")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a draft beside the file, which takes its place once it is written; nothing is left if that fails.

    Args:
        path: of the file.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
