"""Agents: a ``LightningModule`` for each method. An agent in ``__all__`` with a ``short_name`` has one everywhere."""

from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.bic import BiC
from dcl_lightning.agents.closed_form import SLDA, ClosedForm, RanPAC, SimpleCIL
from dcl_lightning.agents.der import DER, DarkReplay, DERpp
from dcl_lightning.agents.er import ER, ERACE
from dcl_lightning.agents.ewc import EWC
from dcl_lightning.agents.finetuning import FineTuning
from dcl_lightning.agents.gdumb import GDumb
from dcl_lightning.agents.gem import AGEM, GEM
from dcl_lightning.agents.icarl import ICaRL
from dcl_lightning.agents.icarl_online import OnlineICaRL
from dcl_lightning.agents.lwf import LwF
from dcl_lightning.agents.mir import MIR
from dcl_lightning.agents.nearest_mean import NearestMean, NearestMeanReplay
from dcl_lightning.agents.nil import NIL
from dcl_lightning.agents.pcr import PCR
from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.agents.scr import SCR
from dcl_lightning.agents.si import SI

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
    "BiC",
    "ClosedForm",
    "ContinualAgent",
    "DERpp",
    "DarkReplay",
    "FineTuning",
    "GDumb",
    "ICaRL",
    "LwF",
    "NearestMean",
    "NearestMeanReplay",
    "OnlineICaRL",
    "RanPAC",
    "RehearsingAgent",
    "SimpleCIL",
]

# Lightning loads a checkpoint's class only if it is imported, and those of the command line have short names.
from dcl_lightning.agents import short_names as short_names
