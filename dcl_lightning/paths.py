"""Paths as users write them, and files that readers never see half-written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dcl_lightning.errors import ConfigurationError

__all__ = ["absolute", "expanded", "replacing"]

T = TypeVar("T")


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


def expanded(values: T) -> T:
    """Return values with the home folder in place of ``~`` or ``~user`` at the beginning of every string.

    A shell does not expand ``--key=~/folder``, nor a path in a configuration file.

    >>> expanded({"increment": [2, "5"]})
    {'increment': [2, '5']}

    Args:
        values: strings, ``--key=value`` included, and other values, nested in lists and mappings; the latter are
            changed in place.
    """
    result: Any = values
    if isinstance(values, str):
        key, equals, value = values.partition("=")
        flag = key.startswith("--") and equals
        result = f"{key}={os.path.expanduser(value)}" if flag else os.path.expanduser(values)
    elif isinstance(values, list):
        result = [expanded(value) for value in values]
    elif hasattr(values, "keys") and hasattr(values, "__setitem__"):
        for key in list(values.keys()):
            result[key] = expanded(result[key])
    return result


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a draft that replaces the file once it is complete; an exception leaves the old file.

    Args:
        path: of the file.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
