"""Short names of the agents, as they stand on the command line and in configuration files."""

from __future__ import annotations

from dcl_lightning.agents.finetuning import FineTuning
from dcl_lightning.agents.icarl import ICaRL

__all__ = ["base", "icarl"]


class base(FineTuning):
    """Short name of ``FineTuning``."""


class icarl(ICaRL):
    """Short name of ``ICaRL``."""
