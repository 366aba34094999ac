"""``--ckpt_path last``: finds the run's latest whole checkpoint, and continues in its folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from glob import escape, glob
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from dcl_lightning.checkpoint.directory import latest_checkpoint
from dcl_lightning.errors import ConfigurationError

__all__ = ["checkpoint_files", "go_on_from_last"]


def go_on_from_last(config: Any, trains: bool) -> None:
    """Replace ``last`` by the newest whole checkpoint of the run's versions; training goes on in its folder.

    Args:
        config: of the command, parsed and not instantiated; changed in place.
        trains: whether the command is ``fit``.

    Raises:
        ConfigurationError: there is none.
    """
    if config.get("ckpt_path") != "last":
        return
    trainer = config["trainer"]
    logger = _first_logger(trainer)
    path, problems = latest_checkpoint(checkpoint_files(trainer), trains)
    for problem in problems:
        rank_zero_info(f"passed over: {problem}")
    if path is None:
        looked = ", ".join(str(folder) for folder in _shown(trainer, logger))
        found = f" ({len(problems)} cannot be used; {problems[0]})" if problems else ""
        raise ConfigurationError(
            f"ckpt_path=last: no {'whole ' if problems else ''}checkpoint in {looked}{found}: leave --ckpt_path out to "
            "start the run, or give a path"
        )
    config["ckpt_path"] = str(path)
    root = _root(trainer, logger)
    version = None if root is None else _version_of(path, root.resolve())
    if trains and version is not None:
        number = version.name.removeprefix("version_")
        logger["init_args"]["version"] = int(number) if number.isdigit() else version.name
        _keep_metrics(version)


def checkpoint_files(trainer: Any) -> list[Path]:
    """Return the checkpoints of a run, of all its versions.

    Args:
        trainer: the trainer's part of a command's configuration.
    """
    # A metric's slash in the name of a checkpoint makes folders, "epoch=1-val/acc=0.9.ckpt". Everything below the run's
    # own folders is the run's; below a folder that the user named other runs may save, so the name has to fit.
    own = [file for folder in _folders(trainer, _first_logger(trainer)) for file in folder.rglob("*.ckpt")]
    return own + [Path(file) for pattern in _patterns(trainer.get("callbacks")) for file in glob(pattern)]


def _version_of(path: Path, root: Path) -> Path | None:
    """Return the folder of the run's version that a checkpoint belongs to."""
    return next((p.parent for p in path.parents if p.name == "checkpoints" and p.parent.parent == root), None)


def _first_logger(trainer: Any) -> Any:
    logger = trainer.get("logger")
    return logger[0] if isinstance(logger, list) and logger else logger


def _init_args(logger: Any) -> Any:
    return logger.get("init_args") if hasattr(logger, "get") else None


def _root(trainer: Any, logger: Any) -> Path | None:
    """Return the folder that has one folder for each version; None where that is not known."""
    args = _init_args(logger)
    if args is None or "version" not in args or args.get("save_dir", args.get("root_dir")) is None:
        return None
    name = args.get("name", "lightning_logs")
    return Path(args.get("save_dir", args.get("root_dir")), name or "")


def _folders(trainer: Any, logger: Any) -> list[Path]:
    base = Path(trainer.get("default_root_dir") or os.getcwd())
    if logger is False or logger is None:
        return [base / "checkpoints"]
    root = _root(trainer, logger)
    if root is None:
        return [base / "checkpoints", *base.glob("lightning_logs/*/checkpoints")]
    version = _init_args(logger)["version"]
    if version is not None:
        return [root / (f"version_{version}" if isinstance(version, int) else version) / "checkpoints"]
    return sorted(root.glob("*/checkpoints"))


def _shown(trainer: Any, logger: Any) -> list[Path]:
    root = _root(trainer, logger)
    return [root / "*" / "checkpoints"] if root is not None else _folders(trainer, logger)[:1]


def _patterns(callbacks: Any) -> Iterator[str]:
    """Yield patterns of the files that checkpoint callbacks save in the folders that they were given."""
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        args = (_init_args(callback) if callback is not None else None) or {}
        if args.get("dirpath") is None:
            continue
        folder = escape(str(args["dirpath"]))
        yield os.path.join(folder, "*.ckpt")
        if args.get("filename"):
            # Lightning replaces "{val/acc:.2f}" by "val/acc=0.90", and by "0.90" without auto_insert_metric_name.
            for value in (r"\1=*", "*"):
                name = re.sub(r"\{([^}:]*)[^}]*\}", value, escape(args["filename"]))
                yield os.path.join(folder, f"{name}*.ckpt")


@rank_zero_only
def _keep_metrics(folder: Path) -> None:
    """Save the figures logged so far from Lightning's CSVLogger, which begins a folder's file anew."""
    file = folder / "metrics.csv"
    if file.is_file():
        number = len(list(folder.glob("metrics_before_*.csv"))) + 1
        file.rename(folder / f"metrics_before_{number}.csv")
