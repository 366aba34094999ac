"""``--ckpt_path``: finds the latest whole checkpoint for ``last``, and refuses a file that cannot be loaded."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from glob import escape, glob
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from dcl_lightning.checkpoint.directory import latest_checkpoint
from dcl_lightning.checkpoint.io import check_seal
from dcl_lightning.errors import CheckpointError, ConfigurationError, suggestion
from dcl_lightning.types import StateDict

__all__ = ["checkpoint_files", "refuse_foreign_classes", "refuse_missing_checkpoint", "resume_last"]

# A part of a command's parsed configuration, or a dict read from YAML: both have ``get`` and ``[]``.
Config = Namespace | dict[str, Any]

_FOUND_BY_LIGHTNING = ("last", "hpc")
# Files in a checkpoint that is a folder: FSDP's, DeepSpeed's.
_SHARDED = (".metadata", "checkpoint", "latest")
_TRUSTED = ("dcl_lightning", "lightning", "torch", "torchvision", "timm")


# -- --ckpt_path last --------------------------------------------------------------------------------


def resume_last(config: Config, trains: bool) -> None:
    """Replace ``ckpt_path: last`` by the latest whole checkpoint of the run; a fit continues in its folder.

    Args:
        config: of the command, parsed and not instantiated; changed in place.
        trains: whether the command is ``fit``.

    Raises:
        ConfigurationError: the run has none.
    """
    if config.get("ckpt_path") != "last":
        return
    trainer = config["trainer"]
    logger = _first_logger(trainer)
    path, problems = latest_checkpoint(checkpoint_files(trainer), trains)
    for problem in problems:
        rank_zero_info(f"passed over: {problem}")
    root = _root(logger)
    if path is None:
        searched = [root / "*" / "checkpoints"] if root is not None else _folders(trainer)[:1]
        found = f" ({len(problems)} cannot be used; {problems[0]})" if problems else ""
        raise ConfigurationError(
            f"ckpt_path=last: no {'whole ' if problems else ''}checkpoint in {', '.join(map(str, searched))}{found}: "
            "leave --ckpt_path out to start the run, or give a path"
        )
    config["ckpt_path"] = str(path)
    version = None if root is None else _version_of(path, root.resolve())
    if trains and version is not None:
        number = version.name.removeprefix("version_")
        logger["init_args"]["version"] = int(number) if number.isdigit() else version.name
        _keep_metrics(version)


def checkpoint_files(trainer: Config) -> list[Path]:
    """Return the checkpoints of a run, of all its versions.

    Args:
        trainer: the trainer's part of a command's configuration.
    """
    # A metric's slash in the name of a checkpoint makes folders, "epoch=1-val/acc=0.9.ckpt". All files below the run's
    # own folders are the run's; other runs may save below a folder that the user named, so the name has to fit.
    own = [file for folder in _folders(trainer) for file in folder.rglob("*.ckpt")]
    return own + [Path(file) for pattern in _patterns(trainer.get("callbacks")) for file in glob(pattern)]


def _version_of(path: Path, root: Path) -> Path | None:
    """Return the folder of the run's version that a checkpoint belongs to."""
    return next((p.parent for p in path.parents if p.name == "checkpoints" and p.parent.parent == root), None)


def _first_logger(trainer: Config) -> Any:
    logger = trainer.get("logger")
    return logger[0] if isinstance(logger, list) and logger else logger


def _init_args(part: object) -> Any:
    return part.get("init_args") if isinstance(part, (dict, Namespace)) else None


def _root(logger: object) -> Path | None:
    """Return the folder that has one folder for each version; None where that is unknown."""
    args = _init_args(logger)
    if args is None or "version" not in args or args.get("save_dir", args.get("root_dir")) is None:
        return None
    return Path(args.get("save_dir", args.get("root_dir")), args.get("name", "lightning_logs") or "")


def _folders(trainer: Config) -> list[Path]:
    base, logger = Path(trainer.get("default_root_dir") or os.getcwd()), _first_logger(trainer)
    if logger is False or logger is None:
        return [base / "checkpoints"]
    root = _root(logger)
    if root is None:
        return [base / "checkpoints", *base.glob("lightning_logs/*/checkpoints")]
    version = _init_args(logger)["version"]
    if version is not None:
        return [root / (f"version_{version}" if isinstance(version, int) else version) / "checkpoints"]
    return sorted(root.glob("*/checkpoints"))


def _patterns(callbacks: object) -> Iterator[str]:
    """Yield patterns of the files that checkpoint callbacks save in the folders that they were given."""
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        args = _init_args(callback) or {}
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
    """Rename the metrics logged so far: Lightning's CSVLogger truncates the file in its folder."""
    file = folder / "metrics.csv"
    if file.is_file():
        number = len(list(folder.glob("metrics_before_*.csv"))) + 1
        file.rename(folder / f"metrics_before_{number}.csv")


# -- any other path ----------------------------------------------------------------------------------


def refuse_missing_checkpoint(path: str | os.PathLike[str] | None) -> None:
    """Refuse a checkpoint that does not exist or cannot be loaded, before anything is made.

    Args:
        path: ``ckpt_path`` of the command, None without one.

    Raises:
        ConfigurationError: with the nearest name in its folder.
        CheckpointError: it cannot be read, or is no checkpoint.
    """
    if path is None or path in _FOUND_BY_LIGHTNING or "://" in str(path):
        return
    if str(path).startswith("registry") and importlib.util.find_spec("litmodels") is not None:
        return
    path = os.path.expanduser(str(path))
    if path == "best":
        raise ConfigurationError("ckpt_path=best is known within one fit alone: give the path of a checkpoint, or last")
    if "\0" in path or not os.path.exists(path):
        folder, name = os.path.split(path)
        near = suggestion(name, os.listdir(folder or ".") if os.path.isdir(folder or ".") else [])
        raise ConfigurationError(f"ckpt_path={path}: no such file{near}")
    if os.path.isdir(path):
        if not any(os.path.exists(os.path.join(path, name)) for name in _SHARDED):
            raise ConfigurationError(f"ckpt_path={path} is a folder: give a checkpoint in it, or last")
        return
    if not _load(path, "meta").keys() >= {"state_dict", "pytorch-lightning_version"}:
        raise CheckpointError(f"{path} is no checkpoint of Lightning's: give one that a fit has saved")


def refuse_foreign_classes(path: str | None) -> None:
    """Refuse to build an agent from a checkpoint that names classes of modules that are not imported.

    Args:
        path: the checkpoint, None without one; Lightning reports one that does not exist.

    Raises:
        CheckpointError: it cannot be read.
        ConfigurationError: a class is from a module that is neither imported nor of this package, torch, torchvision,
            timm or Lightning.
    """
    if path is None or not Path(path).is_file():
        return
    check_seal(path)
    for name in _class_paths(_load(path, "cpu").get("hyper_parameters", {})):
        module = name.rpartition(".")[0]
        if module and module.split(".")[0] not in _TRUSTED and module not in sys.modules:
            raise ConfigurationError(
                f"{path} names the class {name}, which is not imported because a file says so: give --model and what "
                "belongs to it on the command line"
            )


def _load(path: str, device: str) -> StateDict:
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # any, from a broken file
        check_seal(path)
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason})") from error
    return content if isinstance(content, dict) else {}


def _class_paths(values: object) -> Iterator[str]:
    parts: Iterable[object] = ()
    if isinstance(values, dict):
        parts = values.values()
        for key in ("class_path", "_class_path", "_instantiator"):
            if isinstance(values.get(key), str):
                yield values[key]
    elif isinstance(values, (list, tuple)):
        parts = values
    for part in parts:
        yield from _class_paths(part)
