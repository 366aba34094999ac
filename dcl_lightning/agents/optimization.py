"""Optimizers with a rate, the head's rows of unseen classes, and weights and gradients as vectors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from lightning.pytorch.cli import ReduceLROnPlateau as WatchingReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dcl_lightning.comm import own_part, part_of
from dcl_lightning.errors import ConfigurationError

__all__ = [
    "KeepUnseenRows", "build_optimizer", "epoch_schedule", "fit_vectors", "flat_gradient", "flat_gradients_of",
    "flat_weights", "idle_loss", "rate_of", "sum_dtype", "trained_parameters", "trained_part", "write_gradient",
]  # fmt: skip


def rate_of(factory: object) -> float | None:
    """Return the learning rate that ``functools.partial`` of an optimizer's class chooses; None without one.

    Args:
        factory: the partial function, or anything else.
    """
    rate: float | None = factory.keywords.get("lr") if isinstance(factory, partial) else None
    return rate


def build_optimizer(
    factory: Callable[..., Optimizer], parameters: Iterable[dict[str, Any]], lr: float | None
) -> Optimizer:
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
    if isinstance(factory, type) or rate_of(factory) is not None:
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


def epoch_schedule(scheduler: LRScheduler) -> LRSchedulerConfigType:
    """Return a schedule as Lightning takes it, with a step after each epoch.

    Args:
        scheduler: of torch's, or Lightning's ``ReduceLROnPlateau``, which says what it watches.

    Raises:
        ConfigurationError: torch's ``ReduceLROnPlateau``, which does not say.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "epoch"}
    if not isinstance(scheduler, WatchingReduceLROnPlateau):
        raise ConfigurationError(
            "model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau does not say what it watches: give "
            "lightning.pytorch.cli.ReduceLROnPlateau with monitor"
        )
    return {"scheduler": scheduler, "interval": "epoch", "monitor": scheduler.monitor}


class _HasHead(Protocol):
    @property
    def head(self) -> nn.Linear:
        """The layer of outputs."""
        ...

    def trained_columns(self) -> Tensor | None:
        """Return the mask ``(K,)`` bool of the outputs that are trained, None for all."""
        ...


class KeepUnseenRows:
    """Undoes what momentum and weight decay do to rows of the head that are not trained.

    Args:
        agent: the owner of the head.
    """

    def __init__(self, agent: _HasHead) -> None:
        self.agent = agent
        self.kept: list[tuple[Tensor, Tensor]] = []  # for each of the head's tensors the mask of rows, and those

    def attach(self, optimizer: Optimizer) -> None:
        """Keep the rows over each step of an optimizer."""
        optimizer.register_step_pre_hook(self.keep)
        optimizer.register_step_post_hook(self.restore)

    def keep(self, *_: object) -> None:
        """Keep the rows before a step."""
        trained, self.kept = self.agent.trained_columns(), []
        if trained is not None:
            for parameter in self.agent.head.parameters():
                untouched = own_part(part_of(~trained, parameter))
                self.kept.append((untouched, own_part(parameter.detach())[untouched]))

    def restore(self, *_: object) -> None:
        """Put the rows back after a step."""
        for parameter, (untouched, rows) in zip(self.agent.head.parameters(), self.kept, strict=bool(self.kept)):
            own_part(parameter.data)[untouched] = rows


# -- weights and gradients as vectors ----------------------------------------------------------------------------------


def fit_vectors(module: nn.Module, *names: str) -> None:
    """Give buffers of a module one number for each of its weights, including frozen ones, which may thaw; 0 at first.

    Args:
        module: the network and the buffers. Its weights are in the order of ``module.parameters()``.
        names: of the buffers; those that have the right length stay as they are.
    """
    parameters = list(module.parameters())
    size = sum(p.numel() for p in parameters)
    for name in names:
        if getattr(module, name).numel() != size:
            setattr(module, name, torch.zeros(size, device=parameters[0].device if parameters else None))


def trained_part(vector: Tensor, module: nn.Module) -> Tensor:
    """Return the part of a vector ``(P,)`` over all weights of a module that belongs to trained ones, in its order."""
    parameters = list(module.parameters())
    if all(p.requires_grad for p in parameters):
        return vector
    parts = vector.split([p.numel() for p in parameters])
    return torch.cat([part for part, p in zip(parts, parameters, strict=True) if p.requires_grad])


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, in the module's order."""
    return [p for p in module.parameters() if p.requires_grad]


def sum_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which gradients are summed over samples and workers: the parameters', at least float32."""
    return torch.promote_types(parameters[0].dtype, torch.float32)


def flat_weights(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return all weights ``(P,)``, with a gradient to each."""
    return torch.cat([p.reshape(-1) for p in parameters])


def flat_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return a copy of all gradients ``(P,)``, 0 for weights without one."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad.detach()).reshape(-1) for p in parameters])


def flat_gradients_of(loss: Tensor, parameters: Sequence[Tensor], keep_graph: bool = False) -> Tensor:
    """Return the gradients ``(P,)`` of a loss, 0 for weights that it does not depend on; ``p.grad`` stays as it is.

    Args:
        loss: 0-dim.
        parameters: those that count.
        keep_graph: whether other gradients of the same graph are still to come.
    """
    parts = torch.autograd.grad(loss, parameters, retain_graph=keep_graph, allow_unused=True, materialize_grads=True)
    return torch.cat([part.detach().reshape(-1) for part in parts])


def idle_loss(module: nn.Module) -> Tensor:
    """Return a loss of 0 whose gradient is 0 for each trained weight: of a step in which nothing is to learn."""
    return 0.0 * flat_weights(trained_parameters(module)).sum()


def write_gradient(parameters: list[nn.Parameter], gradient: Tensor) -> None:
    """Write a vector ``(P,)`` into the gradients of those parameters that have one."""
    for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        if parameter.grad is not None:
            parameter.grad.copy_(part.view_as(parameter))
