"""The network as it was at the end of a task, for methods that learn from it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dcl_lightning.comm import whole

__all__ = ["Teacher"]


class Teacher(nn.Sequential):
    """A copy of a network that is neither trained nor put into training mode.

    Args:
        parts: modules that a batch goes through one after the other.
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*copy.deepcopy(parts))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        return super().train(False)

    def renew(self, *parts: nn.Module) -> None:
        """Take over the present weights and statistics; every worker calls it.

        Args:
            parts: the modules that were given at the start.
        """
        for copied, part in zip(self, parts, strict=True):
            copied.load_state_dict({name: whole(value) for name, value in part.state_dict().items()})

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``(B, K)`` of inputs ``(B, ...)``, without a gradient."""
        return super().forward(inputs)
