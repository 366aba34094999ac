"""The seed of a run."""

from __future__ import annotations

import os

__all__ = ["seed_of_run"]


def seed_of_run(given: int | None) -> int:
    """Return the seed that was given, else the one given to ``seed_everything``, else 0.

    Args:
        given: None if none was.
    """
    # Where Lightning's ``seed_everything`` leaves it for other processes.
    return given if given is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
