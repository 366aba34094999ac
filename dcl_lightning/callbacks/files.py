"""Where a run's files go, and files that readers see whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl

from dcl_lightning.paths import expanded

__all__ = ["replacing", "run_folder"]


def run_folder(trainer: pl.Trainer) -> Path:
    """Return where a run's files go: beside its checkpoints; ask in the process that writes.

    Lightning's ``log_dir`` is that for loggers that write files of their own. Of others it is the folder that all runs
    share, while checkpoints go to a folder for each run.

    Args:
        trainer: of the run.
    """
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    own = getattr(logger, "log_dir", None)
    if own is not None:
        return Path(expanded(str(own)))
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(expanded(str(logger.save_dir or trainer.default_root_dir))) / str(logger.name) / version


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
