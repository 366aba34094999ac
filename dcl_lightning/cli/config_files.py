"""What configuration files and flags say together: values of another agent or optimizer are dropped, nulls refused."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import SIZES

__all__ = ["last_model", "refuse_nulls", "with_one_optimizer", "without_other_agent"]

# How a network is built and optimized, whichever agent trains it.
_SHARED_KEYS = {
    "backbone", "compile", "decay_biases_and_norms", "epochs_per_task", "gamma", "lr", "lr_scheduler", "memory_format",
    "milestones", "momentum", "optimizer", "optimizer_reset", "scale_lr", "warmup_epochs", "weight_decay",
}  # fmt: skip


def without_other_agent(args: Sequence[str]) -> list[str]:
    """Return the arguments without the values in configuration files that belong to another agent.

    After ``--config icarl.yaml --model base`` the parser would keep every value of iCaRL's that the new class accepts.
    Only the backbone, how it is optimized, and the memory's size are kept; the rest is dropped with a notice.

    Args:
        args: arguments of the command line.
    """
    result = list(args)
    name = last_model(args)
    if name is None:
        return result
    for i, arg in enumerate(args[: _places_of_model(args)[-1]]):
        flag, _, value = arg.partition("=")
        if flag not in ("--config", "-c"):
            continue
        place = i if value else i + 1
        text = _shared_config(value or args[place], name)
        if text is not None:
            result[place] = f"{flag}={text}" if value else text
    return result


def last_model(args: Sequence[str]) -> str | None:
    """Return the value of the last ``--model``; None without one."""
    places = _places_of_model(args)
    if not places:
        return None
    at = places[-1]
    return args[at].partition("=")[2] or (args[at + 1] if at + 1 < len(args) else "")


def _places_of_model(args: Sequence[str]) -> list[int]:
    return [i for i, arg in enumerate(args) if arg == "--model" or arg.startswith("--model=")]


def _shared_config(path: str, name: str) -> str | None:
    """Return the file's content with the shared values alone; None if it configures no agent other than ``name``."""
    path = os.path.expanduser(path)
    config = _loaded(path) if os.path.isfile(path) else None
    if not isinstance(config, dict):
        return None
    model = config.get("model")
    if not isinstance(model, dict) or str(model.get("class_path")).split(".")[-1] == name.split(".")[-1]:
        return None
    values = model.get("init_args") or {}
    kept = {key: value for key, value in values.items() if key in _SHARED_KEYS}
    dropped = set(values) - _SHARED_KEYS
    memory = values.get("rehearsal")
    if isinstance(memory, dict) and _keeps_samples(name):
        kept["rehearsal"] = {key: value for key, value in memory.items() if key in SIZES}
        others = {f"rehearsal.{key}" for key, value in memory.items() if key not in SIZES and value is not None}
        dropped = dropped - {"rehearsal"} | others
    if dropped:
        said = ", model.".join(sorted(dropped))
        rank_zero_info(f"{path}: model.{said} belonged to {model['class_path']} and are dropped")
    return yaml.safe_dump({**config, "model": {"class_path": name, "init_args": kept}}, sort_keys=False)


def _keeps_samples(name: str) -> bool:
    """Return whether an agent, by its short name or class path, has a memory whose size can be given."""
    from dcl_lightning.agents import ContinualAgent, short_names

    kind = vars(short_names).get(name) or _class_at(name)
    return isinstance(kind, type) and issubclass(kind, ContinualAgent) and kind.rehearses


def with_one_optimizer(args: Sequence[str]) -> list[str]:
    """Return the arguments with flags that leave the optimizer one rate, momentum and weight decay.

    The parser completes ``model.optimizer`` by the defaults of its class; afterwards nobody can tell which of
    ``model.lr`` and ``model.optimizer.lr`` was given. The later one wins, with a notice. The agent refuses two
    different rates from one file, or both from the command line.

    Args:
        args: arguments of the command line.
    """
    given: dict[str, tuple[int, str, object]] = {}  # by key: number of the source, its name, the value
    for number, (source, values) in enumerate(_sources(args)):
        for key, value in values.items():
            given[key] = number, source, value
        if values.get("optimizer", "") is None:
            given = {key: entry for key, entry in given.items() if not _is_of_optimizer(key)}
    at = max((entry[0] for key, entry in given.items() if _is_of_optimizer(key)), default=None)
    if at is None:
        return list(args)
    added: list[str] = []
    for key in ("momentum", "weight_decay"):
        number, source, value = given.get(key, (at, "", None))
        if number < at and value:
            added.append(f"--model.{key}=0")
            rank_zero_info(f"{source}: model.{key}={value} belonged to another optimizer and is dropped")
    number, source, lr = given.get("lr", (-1, "", None))
    own_number, own_source, own = given.get("optimizer.lr", (-1, "", None))
    if lr is not None and (own is None or number > own_number):
        added.append(f"--model.optimizer.lr={lr}")
        if own not in (None, lr):
            rank_zero_info(f"{own_source}: model.optimizer.lr={own} is replaced by model.lr={lr}")
    elif lr is not None and number < own_number:
        added.append("--model.lr=null")
        if own != lr:
            rank_zero_info(f"{source}: model.lr={lr} is replaced by model.optimizer.lr={own}")
    return [*args, *added]


def _is_of_optimizer(key: str) -> bool:
    return key.partition(".")[0] == "optimizer"


def _sources(args: Sequence[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the values below ``model`` by key: of each file in order, then of all flags together."""
    flags: dict[str, object] = {}
    for i, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        value = value or (args[i + 1] if "=" not in arg and i + 1 < len(args) else "")
        if flag in ("--config", "-c"):
            config = _loaded(value)
            model = config.get("model") if isinstance(config, dict) else None
            if isinstance(model, str) and os.path.isfile(os.path.join(os.path.dirname(value), model)):
                model = _loaded(os.path.join(os.path.dirname(value), model))
            yield value if os.path.isfile(value) else flag, dict(_flat(model, ""))
        elif flag == "--model" and os.path.isfile(value):
            yield value, dict(_flat(_loaded(value), ""))
        elif flag == "--model" or flag.startswith("--model."):
            key = flag.removeprefix("--model").removeprefix(".").replace("init_args.", "")
            flags |= dict(_flat(_loaded(value), key))
    yield "the command line", flags


def _loaded(text: str) -> object:
    """Return the content of a file, or of YAML itself; None where the parser will say why it cannot be read."""
    try:
        if os.path.isfile(text):
            text = Path(text).read_text(encoding="utf-8")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def _flat(node: object, prefix: str) -> Iterator[tuple[str, object]]:
    if not isinstance(node, dict):
        if isinstance(node, (str, int)):
            with suppress(OverflowError, ValueError):
                node = float(node)  # YAML reads 1e-3 as a string
        yield prefix, node
        return
    for key, value in node.items():
        if key == "class_path":
            yield prefix, value
        elif key == "init_args":
            yield from _flat(value, prefix)
        else:
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def refuse_nulls(config: object, key: str = "") -> None:
    """Refuse null for a value that cannot be None: the parser accepts it for any argument of a class.

    Args:
        config: of the command, parsed and not instantiated.
        key: of the configuration as a whole.

    Raises:
        ConfigurationError: with the type of the value.
    """
    if isinstance(config, list):
        for item in config:
            refuse_nulls(item, key)
    if not isinstance(config, (dict, Namespace)):
        return
    entries = _entries(config)
    path, values = entries.get("class_path"), entries.get("init_args")
    if isinstance(path, str) and isinstance(values, (dict, Namespace)):
        kind = _class_at(path)
        for name, value in _entries(values).items():
            if value is None and kind is not None:
                _refuse_null(kind, name, f"{key}.{name}")
    for name, value in entries.items():
        inner = "" if name in ("class_path", "init_args") else name
        refuse_nulls(value, ".".join(part for part in (key, str(inner)) if part))


def _entries(level: Mapping[str, object] | Namespace) -> Mapping[str, object]:
    # A namespace's own items are those of all levels below it.
    return vars(level) if isinstance(level, Namespace) else level


def _class_at(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    with suppress(ImportError):
        kind = vars(importlib.import_module(module)).get(name)
        return kind if inspect.isclass(kind) else None
    return None


def _refuse_null(kind: type, name: str, key: str) -> None:
    for base in inspect.getmro(kind):
        parameter = inspect.signature(base).parameters.get(name) if "__init__" in vars(base) else None
        if parameter is None:
            continue
        try:
            hint = get_type_hints(vars(base)["__init__"]).get(name, Any)
        except NameError:  # a type from a package that is not installed
            return
        # The parser itself asks for arguments without a default, unless the data module brings them.
        if parameter.default in (None, inspect.Parameter.empty) or hint is Any or type(None) in get_args(hint):
            return
        shown = str(hint).replace("typing.", "").replace("collections.abc.", "") if get_args(hint) else hint.__name__
        raise ConfigurationError(f"{key}=null: give {shown}")
