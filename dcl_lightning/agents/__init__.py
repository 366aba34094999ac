"""Agents: one file a method, each a ``LightningModule``."""

# Checkpoints of the command line name agents by their short names; Lightning loads what is imported only.
from dcl_lightning.agents import short_names as short_names
from dcl_lightning.agents.agem import AGEM
from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.bic import BiC
from dcl_lightning.agents.der import DER, DERpp
from dcl_lightning.agents.er import ER
from dcl_lightning.agents.er_ace import ERACE
from dcl_lightning.agents.ewc import EWC
from dcl_lightning.agents.finetuning import FineTuning
from dcl_lightning.agents.gdumb import GDumb
from dcl_lightning.agents.gem import GEM
from dcl_lightning.agents.icarl import ICaRL
from dcl_lightning.agents.lwf import LwF
from dcl_lightning.agents.nil import NIL
from dcl_lightning.agents.replay import DarkReplay, RehearsingAgent
from dcl_lightning.agents.si import SI

__all__ = [
    "AGEM",
    "DER",
    "ER",
    "ERACE",
    "EWC",
    "GEM",
    "NIL",
    "SI",
    "BiC",
    "ContinualAgent",
    "DERpp",
    "DarkReplay",
    "FineTuning",
    "GDumb",
    "ICaRL",
    "LwF",
    "RehearsingAgent",
]
