"""Restricts which classes a checkpoint may import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dcl_lightning.checkpoint.io import check_seal
from dcl_lightning.errors import CheckpointError, ConfigurationError

__all__ = ["refuse_foreign_classes"]

_TRUSTED = ("dcl_lightning", "lightning", "torch", "torchvision", "timm")


def refuse_foreign_classes(path: str | None) -> None:
    """Refuse to build an agent from a checkpoint that names classes of modules that nobody asked for.

    Args:
        path: the checkpoint, if there is one; one that is not there is left to who loads it.

    Raises:
        CheckpointError: it cannot be read.
        ConfigurationError: a class is of a module that is neither of this package, torch, torchvision, timm, Lightning
            nor imported.
    """
    if path is None or not Path(path).is_file():
        return
    check_seal(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True).get("hyper_parameters", {})
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]})") from error
    for name in _class_paths(values):
        module = name.rpartition(".")[0]
        if module and module.split(".")[0] not in _TRUSTED and module not in sys.modules:
            raise ConfigurationError(
                f"{path} names the class {name}, which is not imported because a file says so: give --model and what "
                "belongs to it on the command line"
            )


def _class_paths(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            if key in ("class_path", "_class_path", "_instantiator") and isinstance(value, str):
                yield value
            yield from _class_paths(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _class_paths(value)
