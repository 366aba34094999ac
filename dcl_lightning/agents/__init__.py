"""Agents: one file a method, each a ``LightningModule``."""

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.finetuning import FineTuning
from dcl_lightning.agents.icarl import ICaRL
from dcl_lightning.agents.nil import NIL

__all__ = ["NIL", "ContinualAgent", "FineTuning", "ICaRL"]
