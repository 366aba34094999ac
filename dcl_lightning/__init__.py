"""Distributed continual learning with rehearsal for PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dcl_lightning._version import __version__ as __version__
from dcl_lightning.distributed.registration import register_strategies

if TYPE_CHECKING:
    from dcl_lightning.agents import (
        AGEM,
        DER,
        ER,
        ERACE,
        EWC,
        GEM,
        MIR,
        NIL,
        PCR,
        SCR,
        SI,
        SLDA,
        BiC,
        ClosedForm,
        ContinualAgent,
        DarkReplay,
        DERpp,
        FineTuning,
        GDumb,
        ICaRL,
        LwF,
        OnlineICaRL,
        RanPAC,
        RehearsingAgent,
        SimpleCIL,
    )
    from dcl_lightning.callbacks import Rehearsal, TaskClock, TaskReport
    from dcl_lightning.data import ContinualDataModule
    from dcl_lightning.distributed import FSDP2Strategy, HorovodStrategy
    from dcl_lightning.memory.config import RehearsalConfig
    from dcl_lightning.metrics import AccuracyMatrix


__all__ = [
    "AGEM",
    "DER",
    "ER",
    "ERACE",
    "EWC",
    "GEM",
    "MIR",
    "NIL",
    "PCR",
    "SCR",
    "SI",
    "SLDA",
    "AccuracyMatrix",
    "BiC",
    "ClosedForm",
    "ContinualAgent",
    "ContinualDataModule",
    "DERpp",
    "DarkReplay",
    "FSDP2Strategy",
    "FineTuning",
    "GDumb",
    "HorovodStrategy",
    "ICaRL",
    "LwF",
    "OnlineICaRL",
    "RanPAC",
    "Rehearsal",
    "RehearsalConfig",
    "RehearsingAgent",
    "SimpleCIL",
    "TaskClock",
    "TaskReport",
]

# Imported when first used: data sets and networks need packages that take seconds to import.
_MODULES = ("agents", "backbones", "callbacks", "data", "functional", "metrics")
_HOMES = {
    "AccuracyMatrix": "metrics",
    "ContinualDataModule": "data",
    "FSDP2Strategy": "distributed.fsdp2",
    "HorovodStrategy": "distributed.horovod.strategy",
    "Rehearsal": "callbacks",
    "RehearsalConfig": "memory.config",
    "TaskClock": "callbacks",
    "TaskReport": "callbacks",
}  # all others are agents


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"dcl_lightning.{name}")
    if name in __all__:
        return vars(importlib.import_module(f"dcl_lightning.{_HOMES.get(name, 'agents')}"))[name]
    raise AttributeError(f"module 'dcl_lightning' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})


register_strategies()
