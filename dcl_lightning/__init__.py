"""Distributed continual learning with rehearsal for PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dcl_lightning._version import __version__ as __version__

# Makes ``Trainer(strategy="horovod")`` known; imports no Horovod.
from dcl_lightning.distributed.horovod.strategy import HorovodStrategy

if TYPE_CHECKING:
    from dcl_lightning.agents import (
        AGEM,
        DER,
        ER,
        ERACE,
        EWC,
        GEM,
        NIL,
        SI,
        BiC,
        ContinualAgent,
        DarkReplay,
        DERpp,
        FineTuning,
        GDumb,
        ICaRL,
        LwF,
        RehearsingAgent,
    )
    from dcl_lightning.callbacks import Rehearsal, TaskClock, TaskReport
    from dcl_lightning.data import ContinualDataModule
    from dcl_lightning.memory.config import RehearsalConfig
    from dcl_lightning.metrics import AccuracyMatrix


__all__ = [
    "AGEM",
    "DER",
    "ER",
    "ERACE",
    "EWC",
    "GEM",
    "NIL",
    "SI",
    "AccuracyMatrix",
    "BiC",
    "ContinualAgent",
    "ContinualDataModule",
    "DERpp",
    "DarkReplay",
    "FineTuning",
    "GDumb",
    "HorovodStrategy",
    "ICaRL",
    "LwF",
    "Rehearsal",
    "RehearsalConfig",
    "RehearsingAgent",
    "TaskClock",
    "TaskReport",
]

# Imported when first used: data sets and networks bring packages that ``import dcl_lightning`` must not wait for.
_HOMES = {
    "AGEM": "agents",
    "AccuracyMatrix": "metrics",
    "BiC": "agents",
    "ContinualAgent": "agents",
    "ContinualDataModule": "data",
    "DER": "agents",
    "DERpp": "agents",
    "DarkReplay": "agents",
    "ER": "agents",
    "ERACE": "agents",
    "EWC": "agents",
    "FineTuning": "agents",
    "GDumb": "agents",
    "GEM": "agents",
    "ICaRL": "agents",
    "LwF": "agents",
    "NIL": "agents",
    "Rehearsal": "callbacks",
    "RehearsalConfig": "memory.config",
    "RehearsingAgent": "agents",
    "SI": "agents",
    "TaskClock": "callbacks",
    "TaskReport": "callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dcl_lightning' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dcl_lightning.{_HOMES[name]}"), name)
