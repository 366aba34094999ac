"""Metrics of continual learning as torchmetrics classes."""

from dcl_lightning.metrics.accuracy import AccuracyMatrix, ClassAccuracy
from dcl_lightning.metrics.stream_metrics import (
    AverageAccuracy,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    LearningAccuracy,
)

__all__ = [
    "AccuracyMatrix",
    "AverageAccuracy",
    "AverageIncrementalAccuracy",
    "BackwardTransfer",
    "ClassAccuracy",
    "Forgetting",
    "ForwardTransfer",
    "LearningAccuracy",
]
