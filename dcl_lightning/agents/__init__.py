"""Agents: one file a method, each a ``LightningModule``."""

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.finetuning import FineTuning
from dcl_lightning.agents.icarl import ICaRL

__all__ = ["ContinualAgent", "FineTuning", "ICaRL"]
