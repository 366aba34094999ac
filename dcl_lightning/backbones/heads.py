"""Classifiers on top of a backbone."""

from __future__ import annotations

from torch import nn

from dcl_lightning.errors import ConfigurationError

__all__ = ["LinearHead"]


class LinearHead(nn.Linear):
    """One linear layer from features ``(B, feature_dim)`` to logits ``(B, num_classes)``.

    It has the outputs of the whole stream from the start, with torch's default initialisation.

    Args:
        feature_dim: length of a feature vector, at least 1.
        num_classes: number of classes, at least 1.

    Raises:
        ConfigurationError: if one of them is below 1.
    """

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        if feature_dim < 1 or num_classes < 1:
            raise ConfigurationError(f"feature_dim={feature_dim} and num_classes={num_classes} must be at least 1")
        super().__init__(feature_dim, num_classes)
