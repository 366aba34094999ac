"""Builds optimizers, and keeps the head's rows of unseen classes as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dcl_lightning.errors import ConfigurationError

__all__ = ["KeepUnseenRows", "build"]


def build(factory: Callable[..., Optimizer], parameters: Iterable[Any], lr: float | None) -> Optimizer:
    """Build an optimizer with a rate.

    Args:
        factory: an optimizer's class, ``functools.partial`` of one, or anything that takes parameters or groups.
        parameters: what it takes.
        lr: the agent's rate; None for that of the factory.

    Raises:
        ConfigurationError: the factory chooses another rate for a group than ``lr`` and the default of its class.
    """
    if lr is None:
        return factory(parameters)
    if isinstance(factory, type) or "lr" in getattr(factory, "keywords", {}):
        return factory(parameters, lr=lr)
    optimizer = factory(parameters)
    by_default = inspect.signature(type(optimizer)).parameters["lr"].default
    for group in optimizer.param_groups:
        if float(group["lr"]) not in (lr, by_default):
            raise ConfigurationError(
                f"model.lr={lr} and the rate {float(group['lr']):g} of model.optimizer's {type(optimizer).__name__} "
                "contradict each other: give one of them"
            )
        group["lr"] = lr
    return optimizer


class _HasHead(Protocol):
    """An agent, as far as it matters here."""

    @property
    def head(self) -> nn.Linear:
        """The one layer of outputs."""
        ...

    def trained_columns(self) -> Tensor | None:
        """Return the mask of the outputs that are trained ``(K,)`` bool, None for all."""
        ...


class KeepUnseenRows:
    """Undoes what momentum and weight decay do to rows of the head that no loss has touched.

    Args:
        agent: has the head, and says which of its rows are trained.
    """

    def __init__(self, agent: _HasHead) -> None:
        self.agent = agent
        self.untouched: Tensor | None = None
        self.kept: list[Tensor] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the two hooks around each step of an optimizer."""
        optimizer.register_step_pre_hook(self.keep)
        optimizer.register_step_post_hook(self.restore)

    def keep(self, *_: Any) -> None:
        """Keep the rows before a step."""
        trained = self.agent.trained_columns()
        self.untouched = None if trained is None else ~trained
        self.kept = [p.detach()[self.untouched] for p in self.agent.head.parameters()] if trained is not None else []

    def restore(self, *_: Any) -> None:
        """Put them back after it."""
        if self.untouched is None:
            return
        for parameter, rows in zip(self.agent.head.parameters(), self.kept, strict=True):
            parameter.data[self.untouched] = rows
