"""Data sets of continuum: classes by their path, and objects."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from dcl_lightning.data.images.decode import read_image
from dcl_lightning.errors import ConfigurationError, DataError, DatasetNotFoundError, suggestion

__all__ = ["arrays_of_class", "imported", "read_continuum"]


def imported(path: str, key: str) -> Any:
    """Return what a class path names.

    Args:
        path: module and name, with a dot between them.
        key: what sets it, for the message.

    Raises:
        ConfigurationError: no such module, one that cannot be imported, or no such name in it; with the nearest.
    """
    module, _, attribute = path.rpartition(".")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a module of the user's may raise anything
        raise ConfigurationError(f"{key}={path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(found, attribute):
        near = suggestion(attribute, [name for name in dir(found) if not name.startswith("_")])
        raise ConfigurationError(f"{key}={path!r} cannot be imported: {module} has no {attribute!r}{near}")
    return getattr(found, attribute)


def arrays_of_class(name: str, root: str, download: bool, known: Iterable[str]) -> tuple[Any, ...]:
    """Return ``(x_train, y_train, t_train, x_test, y_test, t_test)`` of a data set of continuum's kind.

    Args:
        name: its class path; the class takes ``(path, train, download)`` and has ``get_data()``.
        root: folder of the data set.
        download: whether it may be fetched.
        known: names of data sets that need no class path, for the message.

    Raises:
        ConfigurationError: no such class, or one of another kind.
        DatasetNotFoundError: no such folder, and nothing may be fetched.
        DataError: the data cannot be read.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigurationError(
            f"data.dataset={name!r}: give one of {', '.join(sorted(known))}, or a continuum data set's class path"
            f"{suggestion(name, known)}"
        )
    cls = imported(name, "data.dataset")
    if not isinstance(cls, type) or not callable(getattr(cls, "get_data", None)):
        ours = attribute.lower()
        instead = f"data.dataset={ours}" if ours in known else f"one of {', '.join(sorted(known))}"
        raise ConfigurationError(
            f"data.dataset={name!r} is no data set of continuum's kind, a class that takes (path, train, download) and "
            f"has get_data(): give {instead}, or in Python (x_train, y_train, x_test, y_test)"
        )
    try:
        inspect.signature(cls).bind(root, train=True, download=download)
    except TypeError as error:
        raise ConfigurationError(
            f"data.dataset={name!r} is no class that takes (path, train, download), as continuum's do: {error}"
        ) from error
    if not download and not os.path.isdir(root):
        # continuum creates the folder before it notices that nothing is there.
        raise DatasetNotFoundError(name, os.path.abspath(root), "the files of that data set", True)
    arrays: list[Any] = []
    for train in (True, False):
        try:
            split = cls(root, train=train, download=download)
        except Exception as error:  # continuum raises whatever it meets
            raise DataError(f"data set '{name}' in {os.path.abspath(root)} cannot be read: {error}") from error
        arrays += read_continuum(split, name)
    return tuple(arrays)


def read_continuum(split: Any, name: str) -> tuple[Any, Any, Any]:
    """Return inputs, labels, and task ids or None, of one split.

    Args:
        split: object with ``get_data``.
        name: how messages call it.

    Raises:
        DataError: the data cannot be read.
    """
    try:
        x, y, t = split.get_data()
    except UnicodeEncodeError as error:
        raise DataError(
            f"data set '{name}' cannot be read: continuum keeps names of files in ASCII, found {str(error.object)!r}; "
            "use data.dataset=folder, or names without accents"
        ) from error
    except Exception as error:
        raise DataError(f"data set '{name}' cannot be read: {error}") from error
    if isinstance(x, np.ndarray) and x.dtype.kind in "OUS":
        return _read_images([os.fsdecode(path) for path in x]), y, t
    return x, y, t


def _read_images(paths: list[str]) -> np.ndarray:
    """Return ``(n, H, W, 3)`` uint8, all images in memory; grey and transparent ones become RGB."""
    images: list[np.ndarray] = []
    for path in paths:
        images.append(read_image(path).permute(1, 2, 0).numpy())
        if images[-1].shape != images[0].shape:
            sizes = " and ".join(f"{h}x{w}" for h, w, _ in (images[0].shape, images[-1].shape))
            raise DataError(f"images differ in size, {sizes} ({path}): resize them to one size first")
    return np.stack(images)
