"""Small networks: a perceptron, MNISTNet for small images, CandleNet for gene expression."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from dcl_lightning.backbones.base import Backbone
from dcl_lightning.errors import ConfigurationError, check_number
from dcl_lightning.types import InputSpec

__all__ = ["MLP", "CandleNet", "MNISTNet"]

_CANDLE_KERNELS = (20, 10)
_CANDLE_POOL = 10
_CANDLE_SHORTEST = sum(_CANDLE_KERNELS) - len(_CANDLE_KERNELS) + _CANDLE_POOL


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


class MNISTNet(Backbone):
    """Two convolutions and a linear layer of 50, from the program distributed-continual-learning.

    conv 3x3 to 32, max pooling 2, ReLU; conv 3x3 to 64, dropout of channels 0.5, max pooling 2, ReLU; flatten, linear
    50, ReLU, dropout 0.5: 99,376 parameters on 28 x 28 with a head of ten. The features are the outputs of the last
    dropout. (The original program's feature vector is before the ReLU.)

    Args:
        in_channels: channels of an input; taken from the data if None.
        input_size: height and width in pixels, at least 10 each, one number for squares; taken from the data if None.

    Raises:
        ConfigurationError: if the input is smaller than 10 pixels, there or in ``adapt``.
    """

    def __init__(self, in_channels: int | None = None, input_size: int | tuple[int, int] | None = None) -> None:
        super().__init__(in_channels, input_size)
        self._build_if_known()

    def build(self, spec: InputSpec) -> int:
        """Make the layers and return 50."""
        height, width = (((side - 2) // 2 - 2) // 2 for side in (spec.height, spec.width))
        if height < 1 or width < 1:
            raise ConfigurationError(
                f"mnistnet needs inputs of at least 10 x 10 pixels, got {spec.height} x {spec.width}: use mlp or resnet"
            )
        self.layers = nn.Sequential(
            nn.Conv2d(spec.channels, 32, 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.Dropout2d(0.5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * height * width, 50),
            nn.ReLU(),
            nn.Dropout(0.5),
        )
        return 50

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features ``(B, 50)``, at least 0, of inputs ``(B, C, H, W)``, float."""
        return self.layers(inputs)


class CandleNet(Backbone):
    """Two convolutions over a sequence and linear layers of 200 and 20, for CANDLE's NT3 benchmark.

    ECP-CANDLE, Pilot 1, "NT3: normal/tumor pair tissue classification", https://github.com/ECP-CANDLE/Benchmarks, with
    the sizes of the program distributed-continual-learning: conv 20 to 128, ReLU; conv 10 to 128, ReLU, max pooling 10;
    flatten, linear 200, ReLU, dropout 0.1, linear 20, ReLU. The first linear layer grows with the input: 154,922,918
    parameters in all with a head of two on NT3's 60,483 genes, 620 MB in float32. An image becomes one sequence for
    each channel, row after row. (The original program's feature vector is before the last ReLU.)

    Args:
        filters: channels of both convolutions, at least 1.
        hidden: width of the first linear layer, at least 1.
        features: width of the second, ``feature_dim``, at least 1.
        in_channels: channels of an input; taken from the data if None.
        input_size: see ``Backbone``; ``(1, L)`` for vectors of length L, with height x width at least 38.

    Raises:
        ConfigurationError: if a width is below 1, or the input shorter than 38 values, there or in ``adapt``.
    """

    def __init__(
        self,
        filters: int = 128,
        hidden: int = 200,
        features: int = 20,
        in_channels: int | None = None,
        input_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(in_channels, input_size)
        if min(filters, hidden, features) < 1:
            raise ConfigurationError(f"candlenet: filters={filters}, hidden={hidden}, features={features}: at least 1")
        self.filters, self.hidden, self.features = filters, hidden, features
        self._build_if_known()

    def build(self, spec: InputSpec) -> int:
        """Make the layers and return ``features``."""
        length = spec.height * spec.width
        if length < _CANDLE_SHORTEST:
            raise ConfigurationError(
                f"candlenet needs inputs of at least {_CANDLE_SHORTEST} values a channel, got {length}: use mlp"
            )
        pooled = (length - (_CANDLE_SHORTEST - _CANDLE_POOL)) // _CANDLE_POOL
        self.layers = nn.Sequential(
            nn.Flatten(2),
            nn.Conv1d(spec.channels, self.filters, _CANDLE_KERNELS[0]),
            nn.ReLU(),
            nn.Conv1d(self.filters, self.filters, _CANDLE_KERNELS[1]),
            nn.ReLU(),
            nn.MaxPool1d(_CANDLE_POOL),
            nn.Flatten(),
            nn.Linear(self.filters * pooled, self.hidden),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(self.hidden, self.features),
            nn.ReLU(),
        )
        return self.features

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features ``(B, features)``, at least 0, of inputs ``(B, C, H, W)``, float."""
        return self.layers(inputs)
