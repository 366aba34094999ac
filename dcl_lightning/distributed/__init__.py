"""Distributed training: ranks, cores and broadcasts; Horovod stands in a package of its own.

Nothing here imports Horovod before a strategy, or a collective, needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcl_lightning.distributed.horovod.metrics import attach_metrics
    from dcl_lightning.distributed.horovod.strategy import HorovodStrategy

__all__ = ["HorovodStrategy", "attach_metrics"]

_HOMES = {"HorovodStrategy": "horovod.strategy", "attach_metrics": "horovod.metrics"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
