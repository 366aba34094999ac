"""Distributed training: ranks, cores, and the strategies fsdp2 and horovod; Horovod is imported only when used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcl_lightning.distributed.fsdp2 import FSDP2Strategy
    from dcl_lightning.distributed.horovod.comm import attach_metrics
    from dcl_lightning.distributed.horovod.strategy import HorovodStrategy

__all__ = ["FSDP2Strategy", "HorovodStrategy", "attach_metrics"]

_MODULES = {
    "FSDP2Strategy": "fsdp2",
    "HorovodStrategy": "horovod.strategy",
    "attach_metrics": "horovod.comm",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
