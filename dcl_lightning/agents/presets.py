"""Short names of the agents, as they stand on the command line and in configuration files."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from dcl_lightning.agents.finetuning import FineTuning
from dcl_lightning.agents.icarl import ICaRL
from dcl_lightning.agents.nil import NIL
from dcl_lightning.memory.config import RehearsalConfig

__all__ = ["base", "icarl", "icarl_v1", "nil", "nil_global", "nil_v1", "nil_v2", "nil_v3", "nil_v4"]


class base(FineTuning):
    """Short name of ``FineTuning``."""


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

    fixed = {"execution": "blocking", "stage": "sample"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig = RehearsalConfig(execution="blocking"),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, **kwargs)


class nil_v2(NIL):
    """NIL in the background; the step never waits and may meet the last representatives again."""

    fixed = {"execution": "nonblocking"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig = RehearsalConfig(execution="nonblocking"),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, **kwargs)


class nil_v3(NIL):
    """NIL in the background, which also brings the representatives to the device. Equals ``nil``."""

    fixed = {"execution": "blocking", "stage": "assemble"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig = RehearsalConfig(execution="blocking", stage="assemble"),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, **kwargs)


class nil_v4(NIL):
    """NIL in the background, which also draws the next batch of the loader. Equals ``nil``."""

    fixed = {"execution": "blocking", "stage": "load"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig = RehearsalConfig(execution="blocking", stage="load"),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, **kwargs)


class nil_global(NIL):
    """NIL over the memories of all workers."""

    fixed = {"scope": "global"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rehearsal: RehearsalConfig = RehearsalConfig(execution="blocking", scope="global"),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, rehearsal, **kwargs)
