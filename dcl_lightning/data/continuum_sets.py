"""Data sets of continuum's kind: classes by their path, and objects."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from dcl_lightning.errors import ConfigurationError, DataError, DatasetNotFoundError, suggestion

__all__ = ["arrays_of_class", "read_continuum"]


def arrays_of_class(name: str, root: str, download: bool, known: Iterable[str]) -> tuple[Any, ...]:
    """Return ``(x_train, y_train, t_train, x_test, y_test, t_test)`` of a data set of continuum's kind.

    Args:
        name: its class path; the class takes ``(path, train, download)``.
        root: folder of the data set.
        download: whether it may be fetched.
        known: names of data sets that need no class path, for the message.

    Raises:
        ConfigurationError: no such class.
        DatasetNotFoundError: no such folder, and nothing may be fetched.
        DataError: the data cannot be read.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigurationError(
            f"data.dataset={name!r}: give one of {', '.join(sorted(known))}, or a continuum data set's class path"
            f"{suggestion(name, known)}"
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"data.dataset={name!r} cannot be imported: {error}") from error
    if not download and not os.path.isdir(root):
        # continuum creates the folder before it notices that nothing is there.
        raise DatasetNotFoundError(name, os.path.abspath(root), "the files of that data set", True)
    arrays: list[Any] = []
    for train in (True, False):
        try:
            split = cls(root, train=train, download=download)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise DataError(f"data set '{name}' in {os.path.abspath(root)} cannot be read: {error}") from error
        except TypeError as error:
            raise ConfigurationError(
                f"data.dataset={name!r} is no class that takes (path, train, download), as continuum's do: {error}"
            ) from error
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
    except (AttributeError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise DataError(f"data set '{name}' cannot be read: {error}") from error
    if isinstance(x, np.ndarray) and x.dtype.kind in "OUS":
        return _read_images([os.fsdecode(path) for path in x]), y, t
    return x, y, t


def _read_images(paths: list[str]) -> np.ndarray:
    """Return ``(n, H, W, 3)`` uint8, all images in memory; grey and transparent ones become RGB."""
    from PIL import Image

    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise DataError(f"image {path} cannot be read: {error}") from error
        if images[-1].shape != images[0].shape:
            sizes = " and ".join(f"{h}x{w}" for h, w, _ in (images[0].shape, images[-1].shape))
            raise DataError(f"images differ in size, {sizes} ({path}): resize them to one size first")
    return np.stack(images)
