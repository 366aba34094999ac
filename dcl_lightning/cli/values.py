"""Checks values that the parser accepts, but from which nothing can be built."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import torch

from dcl_lightning.checkpoint.io import check_seal
from dcl_lightning.errors import CheckpointError, ConfigurationError, suggestion

__all__ = ["of_lightning", "refuse_no_checkpoint", "refuse_nulls"]

# Packages that say in their own words what is wrong with a value.
_LIBRARIES = ("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "torch", "torchmetrics")
# What Lightning looks for itself.
_WORDS = ("last", "hpc")
# What is in a checkpoint that is a folder: FSDP's, DeepSpeed's.
_SHARDED = (".metadata", "checkpoint", "latest")


@contextmanager
def of_lightning() -> Iterator[None]:
    """Let what Lightning or torch refuses before the first batch, and packages that are missing, be a user's error.

    Raises:
        ConfigurationError: with the library's own message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = f": pip install {error.name}" if error.name else ""
        raise ConfigurationError(f"{error}{remedy}") from error
    except (OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        innermost = error
        while innermost.__cause__ is not None and not isinstance(innermost, ConfigurationError):
            innermost = innermost.__cause__  # type: ignore[assignment]
        if _raised_in(innermost).partition(".")[0] in _LIBRARIES:
            raise ConfigurationError(_of_name(str(innermost)) or repr(innermost)) from error
        raise


def _of_name(message: str) -> str:
    """Return Lightning's message on an accelerator or strategy that there is not, with the nearest."""
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    found = re.search(r"`(accelerator|strategy)='([^']*)'`", message)
    if found is None:
        return message
    names = StrategyRegistry.available_strategies()
    if found[1] == "accelerator":
        names = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    usual = [name for name in ("auto", "ddp", "horovod", "fsdp") if name in ("auto", *names)]
    listed = names if found[1] == "accelerator" else usual
    return f"trainer.{found[1]}={found[2]}: give {', '.join(listed)} or a class path{suggestion(found[2], names)}"


def _raised_in(error: BaseException) -> str:
    """Return the name of the module that raised an exception."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return module


def refuse_no_checkpoint(path: Any) -> None:
    """Refuse a checkpoint that is not there, before anything is made.

    Args:
        path: ``ckpt_path`` of the command, None without one.

    Raises:
        ConfigurationError: with the nearest name in its folder.
        CheckpointError: it cannot be read, or holds something else.
    """
    if path is None or path in _WORDS or "://" in str(path):
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
    try:
        keys = set(torch.load(path, map_location="meta", weights_only=True))
    except Exception as error:  # whatever reading a broken file raises
        check_seal(path)
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({str(error).partition(chr(10))[0]})") from error
    if not keys >= {"state_dict", "pytorch-lightning_version"}:
        raise CheckpointError(f"{path} is no checkpoint of Lightning's: give one that a fit has saved")


def refuse_nulls(config: Any, key: str = "") -> None:
    """Refuse null for a value that cannot be None: the parser takes it for anything below a class.

    Args:
        config: of the command, parsed and not instantiated.
        key: of the configuration as a whole.

    Raises:
        ConfigurationError: with the type of the value.
    """
    if isinstance(config, list):
        for item in config:
            refuse_nulls(item, key)
    if not hasattr(config, "get") or not hasattr(config, "items"):
        return
    values = config.get("init_args")
    if isinstance(config.get("class_path"), str) and hasattr(values, "get"):
        kind = _class_at(config["class_path"])
        for name, value in _entries(values):
            if value is None and kind is not None:
                _refuse_null(kind, name, f"{key}.{name}")
    for name, value in _entries(config):
        inner = "" if name in ("class_path", "init_args") else name
        refuse_nulls(value, ".".join(part for part in (key, inner) if part))


def _entries(level: Any) -> Iterable[tuple[str, Any]]:
    # The items of a parser's namespace are those of all levels below it.
    return (level if isinstance(level, Mapping) else vars(level)).items()


def _class_at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _refuse_null(kind: Any, name: str, key: str) -> None:
    for base in inspect.getmro(kind) if inspect.isclass(kind) else ():
        parameter = inspect.signature(base).parameters.get(name) if "__init__" in vars(base) else None
        if parameter is None:
            continue
        try:
            hint = get_type_hints(vars(base)["__init__"]).get(name, Any)
        except NameError:  # of a package that is not installed
            return
        # The parser itself asks for what has no default, unless the data module brings it.
        if parameter.default in (None, inspect.Parameter.empty) or hint is Any or type(None) in get_args(hint):
            return
        said = str(hint).replace("typing.", "").replace("collections.abc.", "") if get_args(hint) else hint.__name__
        raise ConfigurationError(f"{key}=null: give {said}")
