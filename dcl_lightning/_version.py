"""The release of this package, and those of the packages that are installed."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__", "version_of"]

__version__ = "0.2.0"


@functools.cache
def version_of(name: str) -> str | None:
    """Return the version of a package; None if it is not installed.

    Args:
        name: of its distribution.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        # This package runs from a checkout that was not installed.
        return __version__ if name == "dcl_lightning" else None
