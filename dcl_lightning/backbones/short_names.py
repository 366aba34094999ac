"""Short names of the backbones on the command line and in configuration files."""

from __future__ import annotations

from dcl_lightning.backbones.resnet import ResNet
from dcl_lightning.backbones.small import MLP, CandleNet, MNISTNet
from dcl_lightning.backbones.timm_models import TimmModel

__all__ = ["candlenet", "mlp", "mnistnet", "resnet", "timm"]


class candlenet(CandleNet):
    """Short name of ``CandleNet`` on the command line."""


class mlp(MLP):
    """Short name of ``MLP`` on the command line."""


class mnistnet(MNISTNet):
    """Short name of ``MNISTNet`` on the command line."""


class resnet(ResNet):
    """Short name of ``ResNet`` on the command line."""


class timm(TimmModel):
    """Short name of ``TimmModel`` on the command line."""
