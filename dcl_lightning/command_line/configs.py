"""Configuration files that are followed by another agent."""

from __future__ import annotations

import os
import sys

import yaml

__all__ = ["last_model", "without_other_agent"]

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
    with open(path, encoding="utf-8") as file:
        config = yaml.safe_load(file)
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
