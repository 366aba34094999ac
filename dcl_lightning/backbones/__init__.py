"""Networks that make features, and the heads on top."""

from dcl_lightning.backbones.base import Backbone, CosineHead, LinearHead, ProjectionHead
from dcl_lightning.backbones.resnet import ResNet
from dcl_lightning.backbones.small import MLP, CandleNet, MNISTNet
from dcl_lightning.backbones.timm_models import TimmModel

__all__ = [
    "MLP", "Backbone", "CandleNet", "CosineHead", "LinearHead", "MNISTNet", "ProjectionHead", "ResNet", "TimmModel",
]  # fmt: skip
