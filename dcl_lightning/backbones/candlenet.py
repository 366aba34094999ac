"""The one-dimensional network for gene expression of CANDLE's NT3 benchmark.

ECP-CANDLE, Pilot 1, "NT3: normal/tumor pair tissue classification",
https://github.com/ECP-CANDLE/Benchmarks, with the sizes of the program distributed-continual-learning.
"""

from __future__ import annotations

from torch import Tensor, nn

from dcl_lightning.backbones.base import Backbone
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import InputSpec

__all__ = ["CandleNet"]

_KERNELS = (20, 10)
_POOL = 10
_SHORTEST = sum(_KERNELS) - len(_KERNELS) + _POOL


class CandleNet(Backbone):
    """Two convolutions over a sequence and linear layers of 200 and 20.

    conv 20 to 128, ReLU; conv 10 to 128, ReLU, max pooling 10; flatten, linear 200, ReLU, dropout 0.1,
    linear 20, ReLU. Almost all parameters are those of the first linear layer, which grows with the
    input: 154,922,918 with a head of two on NT3's 60,483 genes, 620 MB in float32. An image is taken row
    after row as one sequence for each channel. (The original program's feature vector is before the last
    ReLU.)

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
        if length < _SHORTEST:
            raise ConfigurationError(
                f"candlenet needs inputs of at least {_SHORTEST} values a channel, got {length}: use mlp"
            )
        pooled = (length - (_SHORTEST - _POOL)) // _POOL
        self.layers = nn.Sequential(
            nn.Flatten(2),
            nn.Conv1d(spec.channels, self.filters, _KERNELS[0]),
            nn.ReLU(),
            nn.Conv1d(self.filters, self.filters, _KERNELS[1]),
            nn.ReLU(),
            nn.MaxPool1d(_POOL),
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
