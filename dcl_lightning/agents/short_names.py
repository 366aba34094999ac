"""Short names of the agents, as they stand on the command line and in configuration files."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from dcl_lightning._lightning import datamodule_of
from dcl_lightning.agents.agem import AGEM
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
from dcl_lightning.agents.si import SI
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import RehearsalConfig

__all__ = [
    "agem",
    "base",
    "bic",
    "cumulative",
    "der",
    "derpp",
    "derpp_task_end",
    "er",
    "er_ace",
    "ewc",
    "gdumb",
    "gem",
    "icarl",
    "icarl_v1",
    "joint",
    "lwf",
    "nil",
    "nil_global",
    "nil_v1",
    "nil_v2",
    "nil_v3",
    "nil_v4",
    "si",
]


class base(FineTuning):
    """Short name of ``FineTuning``."""


class joint(FineTuning):
    """Upper bound: all data at once, with ``data.scenario: none``."""

    scenarios = ("none",)


class cumulative(FineTuning):
    """Upper bound: each task trains on the data of all tasks so far, with ``data.concatenate_tasksets: true``."""

    def setup(self, stage: str) -> None:
        """Refuse to train on each task's own data.

        Raises:
            ConfigurationError: with the remedy.
        """
        super().setup(stage)
        if stage == "fit" and not datamodule_of(self.trainer).concatenate_tasksets:
            raise ConfigurationError(
                "agent cumulative trains on the data of all tasks so far: give data.concatenate_tasksets=true, or take "
                "--model base"
            )


class er(ER):
    """Short name of ``ER``."""


class er_ace(ERACE):
    """Short name of ``ERACE``."""


class der(DER):
    """Short name of ``DER``."""


class derpp(DERpp):
    """Short name of ``DERpp``: the paper's memory, a reservoir filled at each step with samples and their logits."""


class derpp_task_end(DERpp):
    """DER++ whose memory is filled at the ends of tasks, class by class, with the logits of then."""

    memory = RehearsalConfig(policy="class_balanced", quota="adaptive", update="task_end", draw_from="past")


class agem(AGEM):
    """Short name of ``AGEM``."""


class gem(GEM):
    """Short name of ``GEM``."""


class lwf(LwF):
    """Short name of ``LwF``."""


class ewc(EWC):
    """Short name of ``EWC``."""


class si(SI):
    """Short name of ``SI``."""


class gdumb(GDumb):
    """Short name of ``GDumb``."""


class bic(BiC):
    """Short name of ``BiC``."""


class icarl(ICaRL):
    """Short name of ``ICaRL``."""


class icarl_v1(ICaRL):
    """iCaRL whose batches are prepared one ahead in the background. Equals ``icarl``."""

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        execution: Literal["inline", "blocking"] = "blocking",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, execution=execution, **kwargs)


class nil(NIL):
    """Short name of ``NIL``: the memory is managed on the training thread, after each step."""


class nil_v1(NIL):
    """NIL, managed one step ahead in the background; both sides wait for each other. Equals ``nil``."""

    memory = RehearsalConfig(execution="blocking")
    required = {"execution": "blocking", "prefetch": "draw"}


class nil_v2(NIL):
    """NIL in the background; the step never waits and may meet the last representatives again."""

    memory = RehearsalConfig(execution="nonblocking")
    required = {"execution": "nonblocking"}


class nil_v3(NIL):
    """NIL in the background, which also brings the representatives to the device. Equals ``nil``."""

    memory = RehearsalConfig(execution="blocking", prefetch="device")
    required = {"execution": "blocking", "prefetch": "device"}


class nil_v4(NIL):
    """NIL in the background, which also draws the next batch of the loader. Equals ``nil``."""

    memory = RehearsalConfig(execution="blocking", prefetch="batch")
    required = {"execution": "blocking", "prefetch": "batch"}


class nil_global(NIL):
    """NIL over the memories of all workers."""

    memory = RehearsalConfig(execution="blocking", scope="global")
    required = {"scope": "global"}
