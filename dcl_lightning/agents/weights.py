"""The weights of a network as one vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "fit_vectors",
    "flat_gradient",
    "flat_gradients_of",
    "flat_weights",
    "sum_dtype",
    "trained_parameters",
    "trained_part",
    "write_gradient",
]  # fmt: skip


def fit_vectors(module: nn.Module, *names: str) -> None:
    """Give buffers of a module one number for each of its weights, frozen ones included, which may thaw; 0 at first.

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
    """Return what a vector ``(P,)`` over all weights of a module says of those that are trained, in the same order."""
    parameters = list(module.parameters())
    if all(p.requires_grad for p in parameters):
        return vector
    parts = vector.split([p.numel() for p in parameters])
    return torch.cat([part for part, p in zip(parts, parameters, strict=True) if p.requires_grad])


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, in the module's order."""
    return [p for p in module.parameters() if p.requires_grad]


def sum_dtype(parameters: Sequence[nn.Parameter]) -> torch.dtype:
    """Return the dtype in which gradients are summed over samples and workers: the parameters', at least float32."""
    return torch.promote_types(parameters[0].dtype, torch.float32)


def flat_weights(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return all weights ``(P,)``, with a gradient to each."""
    return torch.cat([p.reshape(-1) for p in parameters])


def flat_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return all gradients ``(P,)``, 0 where there is none; a copy."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad.detach()).reshape(-1) for p in parameters])


def flat_gradients_of(loss: Tensor, parameters: list[nn.Parameter], keep_graph: bool = False) -> Tensor:
    """Return the gradients ``(P,)`` of a loss, 0 where it does not depend; the parameters' own stay as they are.

    Args:
        loss: 0-dim.
        parameters: those that count.
        keep_graph: whether other gradients of the same graph are still to come.
    """
    parts = torch.autograd.grad(loss, parameters, retain_graph=keep_graph, allow_unused=True, materialize_grads=True)
    return torch.cat([part.detach().reshape(-1) for part in parts])


def write_gradient(parameters: list[nn.Parameter], gradient: Tensor) -> None:
    """Write a vector ``(P,)`` into the parameters' gradients, but for those that have none."""
    for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        if parameter.grad is not None:
            parameter.grad.copy_(part.view_as(parameter))
