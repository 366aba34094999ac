"""Pure functions: metrics over an accuracy matrix, herding, losses, learning-rate schedules, parameter groups."""

from dcl_lightning.functional.continual_metrics import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from dcl_lightning.functional.herding import herd, nearest_mean_scores, nearest_to_mean, normalise
from dcl_lightning.functional.losses import distillation, icarl_loss, icarl_targets, weighted_cross_entropy
from dcl_lightning.functional.nil import nil_weights
from dcl_lightning.functional.parameter_groups import parameter_groups
from dcl_lightning.functional.schedules import lr_factor, lr_scale, warmup_divisor

__all__ = [
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "distillation",
    "forgetting",
    "forward_transfer",
    "herd",
    "icarl_loss",
    "icarl_targets",
    "learning_accuracy",
    "lr_factor",
    "lr_scale",
    "nearest_mean_scores",
    "nearest_to_mean",
    "nil_weights",
    "normalise",
    "parameter_groups",
    "warmup_divisor",
    "weighted_cross_entropy",
]
