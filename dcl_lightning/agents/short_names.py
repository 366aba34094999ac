"""Short names of the agents, as they stand on the command line and in configuration files.

An agent's ``short_name`` is here a class of that name, with the agent's own values; the others below have other values.
"""

from __future__ import annotations

from typing import Any, Literal

from dcl_lightning import agents
from dcl_lightning._lightning import datamodule_of
from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.der import DERpp
from dcl_lightning.agents.finetuning import FineTuning
from dcl_lightning.agents.icarl import ICaRL
from dcl_lightning.agents.nil import NIL
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import RehearsalConfig


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


class derpp_task_end(DERpp):
    """DER++ whose memory is filled at the ends of tasks, class by class, with the logits of then."""

    memory = RehearsalConfig(policy="class_balanced", quota="adaptive", update="task_end", draw_from="past")


class icarl_v1(ICaRL):
    """iCaRL whose batches are prepared one ahead in the background. Equals ``icarl``."""

    def __init__(
        self,
        *args: Any,
        execution: Literal["inline", "blocking"] = "blocking",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, execution=execution, **kwargs)


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


def _short_names() -> dict[str, type[ContinualAgent]]:
    kinds = [vars(agents)[name] for name in agents.__all__]
    return {
        kind.short_name: type(
            kind.short_name, (kind,), {"__doc__": f"Short name of ``{kind.__name__}``.", "__module__": __name__}
        )
        for kind in kinds
        if "short_name" in vars(kind)
    }


def __getattr__(name: str) -> Any:  # which tells type checkers that a module has further names
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


globals().update(_short_names())
__all__ = sorted(name for name, kind in globals().items() if isinstance(kind, type) and kind.__module__ == __name__)
