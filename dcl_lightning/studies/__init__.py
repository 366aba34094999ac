"""Studies of several runs: side by side (``compare``), repeated (``repeat``) and searched (``sweep``)."""

from __future__ import annotations

import importlib

__all__ = ["main"]


def main(args: list[str]) -> int:
    """Run a study.

    Args:
        args: its name, ``compare``, ``repeat`` or ``sweep``, and its arguments.

    Returns:
        Exit code.
    """
    return int(importlib.import_module(f"dcl_lightning.studies.{args[0]}").main(args[1:]))
