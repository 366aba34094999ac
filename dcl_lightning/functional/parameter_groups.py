"""Which parameters weight decay acts on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["parameter_groups"]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], decay_biases_and_norms: bool) -> list[dict[str, Any]]:
    """Return an optimizer's groups of the parameters that are trained.

    Biases, and whatever has one number for each channel (scales and shifts of normalisation layers,
    layer scales), are told by name and shape, as timm does, so that any kind of normalisation counts.

    Args:
        named: parameters by name, as ``module.named_parameters()`` gives them.
        decay_biases_and_norms: whether weight decay acts on them too; if not, they are a second group
            with ``weight_decay`` 0, and the first group's is left to the optimizer.

    Returns:
        One group, or two of which the second is spared; a group without parameters is left out.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            one_a_channel = parameter.ndim <= 1 or name.endswith(".bias")
            (spared if one_a_channel and not decay_biases_and_norms else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
