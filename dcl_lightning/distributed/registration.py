"""Registers ``Trainer(strategy="fsdp2")`` and ``"horovod"`` as soon as Lightning is imported.

The import of Lightning takes seconds, and ``--version``, a mistyped command or the supervisor of a job need none of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["register_strategies"]

_LIGHTNING = "lightning.pytorch"


def register_strategies() -> None:
    """Register both strategies: now if Lightning is imported, otherwise right after its import."""
    if _LIGHTNING in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterLightning())


def _register() -> None:
    for module in ("fsdp2", "horovod.strategy"):
        importlib.import_module(f"dcl_lightning.distributed.{module}")


class _AfterLightning(MetaPathFinder):
    """Finds Lightning where Python finds it, and registers the strategies once its own loader has run it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LIGHTNING:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_register(module: ModuleType) -> None:
                execute(module)
                _register()

            # The loader itself stays: others ask it for sources and resources.
            vars(spec.loader)["exec_module"] = then_register
        return spec
