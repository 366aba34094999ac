"""The small convolutional network for MNIST of the program distributed-continual-learning."""

from __future__ import annotations

from torch import Tensor, nn

from dcl_lightning.backbones.base import Backbone
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import InputSpec

__all__ = ["MNISTNet"]


class MNISTNet(Backbone):
    """Two convolutions and a linear layer of 50; 99,376 parameters on 28 x 28 with a head of ten.

    conv 3x3 to 32, max pooling 2, ReLU; conv 3x3 to 64, dropout of channels 0.5, max pooling 2, ReLU;
    flatten, linear 50, ReLU, dropout 0.5. The features are what a linear head uses: those 50 after the
    ReLU and, in training mode, the dropout. (The original program's feature vector is before the ReLU.)

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
