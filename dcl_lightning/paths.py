"""Paths as users write them: a leading ``~`` is their home, and a relative one is below the folder they are in."""

from __future__ import annotations

import os
from typing import Any

from dcl_lightning.errors import ConfigurationError

__all__ = ["absolute", "expanded"]


def absolute(path: str | os.PathLike[str]) -> str:
    """Return a path that stays the same when the process changes its working folder.

    Args:
        path: relative, absolute, or below ``~`` or ``~user``; an address such as ``s3://bucket`` is returned as it is.

    Raises:
        ConfigurationError: a relative path, and the working folder has been removed.
    """
    text = os.path.expanduser(os.fspath(path))
    try:
        return text if "://" in text else os.path.abspath(text)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{text} is relative to the working folder, which has been removed: change to another folder"
        ) from error


def expanded(values: Any) -> Any:
    """Return values with the home folder in place of ``~`` or ``~user`` at the beginning of every string.

    A shell expands neither ``--key=~/folder`` nor what stands in a configuration file.

    >>> expanded({"increment": [2, "5"]})
    {'increment': [2, '5']}

    Args:
        values: strings, ``--key=value`` too, and anything else, in lists and mappings; the latter are changed in place.
    """
    if isinstance(values, str):
        key, equals, value = values.partition("=")
        if key.startswith("--") and equals:
            return f"{key}={os.path.expanduser(value)}"
        return os.path.expanduser(values)
    if isinstance(values, list):
        return [expanded(value) for value in values]
    if hasattr(values, "keys") and hasattr(values, "__setitem__"):
        for key in list(values.keys()):
            values[key] = expanded(values[key])
    return values
