"""Metrics of continual learning as torchmetrics classes."""

from dcl_lightning.metrics.accuracy_matrix import AccuracyMatrix

__all__ = ["AccuracyMatrix"]
