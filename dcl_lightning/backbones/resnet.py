"""Residual networks: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from dcl_lightning.backbones.base import Backbone
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import InputSpec

__all__ = ["ResNet"]

_CIFAR_DEPTHS = (20, 32, 44, 56, 110)
_IMAGENET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_CIFAR_STEM_UP_TO = 32  # pixels: the ImageNet stem would leave a map of 8 x 8 for four stages


class ResNet(Backbone):
    """ResNet of the CIFAR family (depth 6n + 2) or of the ImageNet family, by depth.

    20, 32, 44, 56 and 110 are the networks of the paper's section 4.2: three stages of widths 16, 32 and 64 whose
    shortcuts have no parameters (option A); ResNet-32 with a head of ten has 464,154 parameters. 18, 34, 50, 101 and
    152 are torchvision's, with the same names of parameters. The features are the last map, averaged over its pixels.

    Args:
        depth: number of layers.
        stem: first layers of the ImageNet family: ``imagenet`` is a 7x7 convolution of stride 2 and max pooling,
            ``cifar`` a 3x3 convolution of stride 1; ``auto`` is ``cifar`` for inputs of at most 32 pixels. The CIFAR
            family has only ``cifar``.
        width: channels of the first stage; 16 (CIFAR family) or 64 if None.
        in_channels: channels of an input; taken from the data if None.
        input_size: height and width in pixels, one number for squares; taken from the data if None.
        init: of the convolutions: ``he`` draws from a normal distribution with variance 2 / (k² · output channels) of
            a k x k convolution (He et al., "Delving Deep into Rectifiers", ICCV 2015, equation 14); ``torch`` is
            PyTorch's default, uniform with variance 1 / (3 · k² · input channels). The normalisation layers make the
            outputs depend on the direction of the weights only; of smaller weights a step changes it more.

    Raises:
        ConfigurationError: if depth, stem or init is unknown, depth and stem exclude each other, or width is below 1.
    """

    takes_any_size = True

    def __init__(
        self,
        depth: int = 50,
        stem: Literal["auto", "cifar", "imagenet"] = "auto",
        width: int | None = None,
        in_channels: int | None = None,
        input_size: int | tuple[int, int] | None = None,
        init: Literal["he", "torch"] = "he",
    ) -> None:
        super().__init__(in_channels, input_size)
        allowed = sorted((*_CIFAR_DEPTHS, *_IMAGENET_BLOCKS))
        if depth not in allowed:
            raise ConfigurationError(f"resnet of depth={depth}: give one of {', '.join(map(str, allowed))}")
        if stem not in ("auto", "cifar", "imagenet"):
            raise ConfigurationError(f"stem={stem!r}: give auto, cifar or imagenet")
        if stem == "imagenet" and depth in _CIFAR_DEPTHS:
            raise ConfigurationError(
                f"resnet of depth={depth} has stem=cifar only: for stem=imagenet give depth "
                f"{', '.join(map(str, _IMAGENET_BLOCKS))}"
            )
        if init not in ("he", "torch"):
            raise ConfigurationError(f"init={init!r}: give he or torch")
        if width is not None and width < 1:
            raise ConfigurationError(f"width={width}: give at least 1, or leave it out")
        self.depth, self.stem, self.width, self.init = depth, stem, width, init
        self._build_if_known()

    def build(self, spec: InputSpec) -> int:
        """Make the layers and return the channels of the last map."""
        if self.depth in _CIFAR_DEPTHS:
            features = self._build_cifar(spec.channels, self.width or 16)
        else:
            small = self.stem == "cifar" or (self.stem == "auto" and max(spec.height, spec.width) <= _CIFAR_STEM_UP_TO)
            features = self._build_imagenet(spec.channels, self.width or 64, small)
        for module in self.modules():
            if self.init == "he" and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return features

    def _build_cifar(self, channels: int, width: int) -> int:
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool: nn.Module = nn.Identity()
        before, self.num_stages = width, 3
        for stage in range(3):
            blocks = []
            for index in range((self.depth - 2) // 6):
                after = width << stage
                blocks.append(_PlainShortcutBlock(before, after, 2 if stage and not index else 1))
                before = after
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        return before

    def _build_imagenet(self, channels: int, width: int, small: bool) -> int:
        if small:
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        block = BasicBlock if self.depth < 50 else Bottleneck
        before, self.num_stages = width, 4
        for stage, count in enumerate(_IMAGENET_BLOCKS[self.depth]):
            planes, blocks = width << stage, []
            after = planes * block.expansion
            for index in range(count):
                stride = 2 if stage and not index else 1
                shortcut = None
                if stride != 1 or before != after:
                    shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
                blocks.append(block(before, planes, stride, shortcut))
                before = after
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        return before

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features ``(B, feature_dim)`` of inputs ``(B, C, H, W)``, float."""
        maps = self.maxpool(F.relu(self.bn1(self.conv1(inputs))))
        for stage in range(1, self.num_stages + 1):
            maps = self.get_submodule(f"layer{stage}")(maps)
        return maps.mean((2, 3))


class _PlainShortcutBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut is subsampled and padded with zeros.

    Args:
        before: channels of the input.
        after: channels of the output, at least ``before``.
        stride: stride of the first convolution and of the shortcut.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.padding = stride, after - before

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps ``(B, after, H / stride, W / stride)``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        shortcut = maps[:, :, :: self.stride, :: self.stride]
        if self.padding:
            # Half of the zero channels in front, half behind.
            front = self.padding // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, front, self.padding - front))
        return F.relu(out + shortcut)
