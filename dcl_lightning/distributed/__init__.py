"""Many workers: Horovod's strategy and launcher, and the collectives that the rest of the package uses.

Nothing here imports Horovod before a strategy, or a collective, needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcl_lightning.distributed.comm import comm_of
    from dcl_lightning.distributed.metrics import attach_metrics
    from dcl_lightning.distributed.strategy import HorovodStrategy

__all__ = ["HorovodStrategy", "attach_metrics", "comm_of"]

_HOMES = {"HorovodStrategy": "strategy", "attach_metrics": "metrics", "comm_of": "comm"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
