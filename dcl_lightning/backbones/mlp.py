"""A perceptron for vectors and small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from dcl_lightning.backbones.base import Backbone
from dcl_lightning.errors import ConfigurationError, check_number
from dcl_lightning.types import InputSpec

__all__ = ["MLP"]


class MLP(Backbone):
    """Linear layers, each followed by a ReLU, on the flattened input.

    Args:
        hidden: width of each layer, each at least 1; the last is ``feature_dim``.
        in_channels: channels of an input; taken from the data if None.
        input_size: height and width in pixels, one number for squares; taken from the data if None.

    Raises:
        ConfigurationError: if ``hidden`` is empty or holds a number below 1.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (100, 100),
        in_channels: int | None = None,
        input_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(in_channels, input_size)
        if not hidden:
            raise ConfigurationError("backbone.hidden=[]: give at least one width")
        for width in hidden:
            check_number("backbone.hidden", width, at_least=1)
        self.hidden = list(hidden)
        self._build_if_known()

    def build(self, spec: InputSpec) -> int:
        """Make the layers and return the last width."""
        widths = [spec.channels * spec.height * spec.width, *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        return widths[-1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features ``(B, hidden[-1])`` of inputs ``(B, ...)``, float."""
        return self.layers(inputs)
