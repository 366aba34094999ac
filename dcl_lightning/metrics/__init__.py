"""Metrics of continual learning as torchmetrics classes.

What torchmetrics has is used as it is: the confusion matrix over a stream is its ``MulticlassConfusionMatrix``.
"""

from dcl_lightning.metrics.accuracy_matrix import AccuracyMatrix
from dcl_lightning.metrics.class_accuracy import ClassAccuracy
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
