"""The seed of a run."""

from __future__ import annotations

import os
from typing import Any

from dcl_lightning.errors import whole_number

__all__ = ["SEEDS", "seed_of_run"]

# Below this NumPy and Lightning take seeds, too.
SEEDS = 1 << 32


def seed_of_run(given: Any, key: str = "data.seed") -> int:
    """Return the seed that was given, else the one given to ``seed_everything``, else 0.

    Args:
        given: from 0 to below 2**32, Python's or NumPy's; None if none was.
        key: what sets it.

    Raises:
        ConfigurationError: any other.
    """
    if given is not None:
        return whole_number(key, given, 0, SEEDS)
    # Where Lightning's ``seed_everything`` leaves it for other processes.
    found = os.environ.get("PL_GLOBAL_SEED", "0")
    return whole_number("PL_GLOBAL_SEED", int(found) if found.isdecimal() else found, 0, SEEDS)
