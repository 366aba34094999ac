"""Objects that a configuration names by ``class_path`` and ``init_args``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from dcl_lightning.errors import ConfigurationError, suggestion

__all__ = ["built", "class_and_options", "imported"]


def imported(path: str, key: str) -> Any:
    """Return what a class path, set by ``key``, names.

    Raises:
        ConfigurationError: there is none; with the nearest name.
    """
    module, _, attribute = path.rpartition(".")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything
        raise ConfigurationError(f"{key}={path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(found, attribute):
        near = suggestion(attribute, [name for name in dir(found) if not name.startswith("_")])
        raise ConfigurationError(f"{key}={path!r} cannot be imported: {module} has no {attribute!r}{near}")
    return getattr(found, attribute)


def class_and_options(spec: Mapping[str, Any], key: str, allowed: str) -> tuple[Any, dict[str, Any]]:
    """Return the class of a ``class_path`` and its ``init_args``, built where these have class paths themselves.

    Args:
        spec: with these two keys.
        key: of the configuration, for messages.
        allowed: what else can be given, for messages.

    Raises:
        ConfigurationError: other keys, or no such class.
    """
    path = spec.get("class_path")
    if not isinstance(path, str) or "." not in path or set(spec) - {"class_path", "init_args"}:
        raise ConfigurationError(f"{key}={dict(spec)}: give {allowed}")
    options = {name: built(value, key, allowed) for name, value in (spec.get("init_args") or {}).items()}
    return imported(path, key), options


def built(value: object, key: str, allowed: str) -> object:
    """Return a value with an object in place of each mapping that has a class path, also in lists.

    Raises:
        ConfigurationError: a class that cannot be found, or that refuses its options.
    """
    if isinstance(value, Mapping) and "class_path" in value:
        cls, options = class_and_options(value, key, allowed)
        try:
            return cls(**options)
        except Exception as error:  # of whatever type the class raises
            raise ConfigurationError(
                f"{key}: {value['class_path']} refuses {options or 'no options'}: {' '.join(str(error).split())}"
            ) from error
    return [built(one, key, allowed) for one in value] if isinstance(value, list) else value
