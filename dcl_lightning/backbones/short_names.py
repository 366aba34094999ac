"""Short names of the backbones on the command line and in configuration files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from dcl_lightning.backbones.base import Backbone
from dcl_lightning.backbones.resnet import ResNet
from dcl_lightning.backbones.small import MLP, CandleNet, MNISTNet
from dcl_lightning.backbones.timm_models import TimmModel
from dcl_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    Network: TypeAlias = nn.Module | str
else:  # the command line makes a module of a name itself
    Network = nn.Module

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


def network_of(network: Network) -> nn.Module:
    """Return a network that is given as itself or by its name.

    Args:
        network: a module; or ``candlenet``, ``mlp``, ``mnistnet``, ``resnet`` with or without a depth as in
            ``resnet18``, or the name of a network of timm.

    Raises:
        ConfigurationError: an unknown name.
    """
    if not isinstance(network, str):
        return network
    known: dict[str, type[Backbone]] = {"candlenet": CandleNet, "mlp": MLP, "mnistnet": MNISTNet, "resnet": ResNet}
    if network in known:
        return known[network]()
    if depth := re.fullmatch(r"resnet(\d+)", network):
        return ResNet(int(depth[1]))
    try:
        return TimmModel(network)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"backbone={network!r}: give a module, {', '.join(known)}, resnet18 or another depth, or a name of timm "
            f"({error})"
        ) from error
