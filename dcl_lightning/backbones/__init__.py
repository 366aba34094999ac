"""Networks that make features, and the head on top."""

from dcl_lightning.backbones.base import Backbone, LinearHead
from dcl_lightning.backbones.candlenet import CandleNet
from dcl_lightning.backbones.mlp import MLP
from dcl_lightning.backbones.mnistnet import MNISTNet
from dcl_lightning.backbones.resnet import ResNet
from dcl_lightning.backbones.timm_models import TimmModel

__all__ = ["MLP", "Backbone", "CandleNet", "LinearHead", "MNISTNet", "ResNet", "TimmModel"]
