"""Configuration files that are followed by another agent or another optimizer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

__all__ = ["last_model", "with_one_optimizer", "without_other_agent"]

# What says how a network is built and optimised, whichever agent trains it.
_SHARED_KEYS = {
    "backbone",
    "decay_biases_and_norms",
    "epochs_per_task",
    "gamma",
    "lr",
    "milestones",
    "momentum",
    "optimizer",
    "optimizer_reset",
    "scale_lr",
    "warmup_epochs",
    "weight_decay",
}


def without_other_agent(args: list[str]) -> list[str]:
    """Return the arguments with what belonged to another agent taken out of configuration files.

    After ``--config icarl.yaml --model base`` the parser would keep every old value that the new class
    accepts. Only the backbone and how it is optimised are kept; what is dropped is said.

    Args:
        args: arguments of the command line.
    """
    result = list(args)
    name = last_model(args)
    if name is None:
        return result
    at = _places_of_model(args)[-1]
    for i, arg in enumerate(args[:at]):
        flag, _, value = arg.partition("=")
        if flag not in ("--config", "-c"):
            continue
        place = i if value else i + 1
        text = _kept_config(value or args[place], name)
        if text is not None:
            result[place] = f"{flag}={text}" if value else text
    return result


def last_model(args: list[str]) -> str | None:
    """Return what the last ``--model`` names; None without one.

    Args:
        args: arguments of the command line.
    """
    places = _places_of_model(args)
    if not places:
        return None
    at = places[-1]
    return args[at].partition("=")[2] or (args[at + 1] if at + 1 < len(args) else "")


def _places_of_model(args: list[str]) -> list[int]:
    return [i for i, arg in enumerate(args) if arg == "--model" or arg.startswith("--model=")]


def _kept_config(path: str, name: str) -> str | None:
    """Return the file's content less what belonged to another agent than ``name``; None if nothing did."""
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        return None
    config = _loaded(path)
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or str(model.get("class_path")).split(".")[-1] == name.split(".")[-1]:
        return None
    values = model.get("init_args") or {}
    dropped = sorted(set(values) - _SHARED_KEYS)
    if dropped:
        print(
            f"{path}: model.{', model.'.join(dropped)} belonged to {model['class_path']} and are dropped",
            file=sys.stderr,
        )
    config["model"] = {"class_path": name, "init_args": {k: v for k, v in values.items() if k in _SHARED_KEYS}}
    return yaml.safe_dump(config, sort_keys=False)


def with_one_optimizer(args: list[str]) -> list[str]:
    """Return the arguments with flags added that leave the optimizer one rate, momentum and weight decay.

    The parser completes ``model.optimizer`` by the defaults of its class, so that nobody could tell later which of
    ``model.lr`` and ``model.optimizer.lr`` was meant. What stands later wins; what it replaces is said. The agent
    refuses two rates in one place.

    Args:
        args: arguments of the command line.
    """
    told: dict[str, tuple[int, str, Any]] = {}  # by key: the place, what it is called, the value
    for place, (source, values) in enumerate(_sources(args)):
        for key, value in values.items():
            told[key] = place, source, value
        if values.get("optimizer", "") is None:
            told = {key: entry for key, entry in told.items() if not key.startswith("optimizer")}
    at = max((entry[0] for key, entry in told.items() if key.startswith("optimizer")), default=None)
    if at is None:
        return list(args)
    added: list[str] = []
    for key in ("momentum", "weight_decay"):
        place, source, value = told.get(key, (at, "", None))
        if place < at and value:
            added.append(f"--model.{key}=0")
            print(f"{source}: model.{key}={value} belonged to another optimizer and is dropped", file=sys.stderr)
    place, source, lr = told.get("lr", (-1, "", None))
    own_place, own_source, own = told.get("optimizer.lr", (-1, "", None))
    if lr is not None and (own is None or place > own_place):
        added.append(f"--model.optimizer.lr={lr}")
        if own not in (None, lr):
            print(f"{own_source}: model.optimizer.lr={own} is replaced by model.lr={lr}", file=sys.stderr)
    elif lr is not None and place < own_place:
        added.append("--model.lr=null")
        if own != lr:
            print(f"{source}: model.lr={lr} is replaced by model.optimizer.lr={own}", file=sys.stderr)
    return [*args, *added]


def _sources(args: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what files and flags say below ``model``, files in their order and all flags together at last."""
    flags: dict[str, Any] = {}
    for i, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        value = value or (args[i + 1] if "=" not in arg and i + 1 < len(args) else "")
        if flag in ("--config", "-c"):
            model = _loaded(value)
            model = model.get("model") if isinstance(model, dict) else None
            if isinstance(model, str) and os.path.isfile(os.path.join(os.path.dirname(value), model)):
                model = _loaded(os.path.join(os.path.dirname(value), model))
            yield value if os.path.isfile(value) else flag, dict(_flat(model, ""))
        elif flag == "--model" and os.path.isfile(value):
            yield value, dict(_flat(_loaded(value), ""))
        elif flag == "--model" or flag.startswith("--model."):
            key = flag.removeprefix("--model").removeprefix(".").replace("init_args.", "")
            flags |= dict(_flat(_loaded(value), key))
    yield "the command line", flags


def _loaded(text: str) -> Any:
    """Return what a file, or YAML itself, says; None where it cannot be read, which is left to the parser."""
    try:
        if os.path.isfile(text):
            text = Path(text).read_text(encoding="utf-8")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        with suppress(TypeError, ValueError):
            node = float(node)  # YAML takes 1e-3 for a string
        yield prefix, node
        return
    for key, value in node.items():
        if key == "class_path":
            yield prefix, value
        elif key == "init_args":
            yield from _flat(value, prefix)
        else:
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
