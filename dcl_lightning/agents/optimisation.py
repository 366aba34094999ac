"""What agents do to an optimizer and its schedule beside stepping them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["KeepUnseenRows", "write_rates"]


def write_rates(scheduler: LambdaLR) -> None:
    """Write a schedule's present rates into its optimizer, whose schedule was reset between two steps.

    Args:
        scheduler: schedule of one optimizer.
    """
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)


class _HasHead(Protocol):
    """An agent, as far as it matters here."""

    @property
    def head(self) -> nn.Linear:
        """The one layer of outputs."""
        ...

    @property
    def seen(self) -> Tensor:
        """Mask of the classes seen so far ``(K,)`` bool."""
        ...


class KeepUnseenRows:
    """Undoes what momentum and weight decay do to rows of the head that no loss has touched.

    Args:
        agent: has the head and the mask ``seen`` of its rows ``(K,)``.
    """

    def __init__(self, agent: _HasHead) -> None:
        self.agent = agent
        self.kept: list[Tensor] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the two hooks around each step of an optimizer."""
        optimizer.register_step_pre_hook(self.keep)
        optimizer.register_step_post_hook(self.restore)

    def keep(self, *_: Any) -> None:
        """Keep the rows before a step."""
        self.kept = [p.detach()[~self.agent.seen] for p in self.agent.head.parameters()]

    def restore(self, *_: Any) -> None:
        """Put them back after it."""
        for parameter, rows in zip(self.agent.head.parameters(), self.kept, strict=True):
            parameter.data[~self.agent.seen] = rows
