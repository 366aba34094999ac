"""The mathematics as pure functions: metrics, losses, scores, classifiers, herding, regularization, schedules."""

from dcl_lightning.functional.closed_form import (
    best_ridge,
    class_sums,
    lda_classifier,
    ridge_classifier,
    ridge_errors,
)
from dcl_lightning.functional.continual_metrics import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    over_tasks,
)
from dcl_lightning.functional.contrastive import supervised_contrastive_losses
from dcl_lightning.functional.herding import class_means, herd, nearest_mean_scores, nearest_to_mean, normalise
from dcl_lightning.functional.losses import (
    asymmetric_cross_entropy,
    distillation,
    distillation_share,
    icarl_loss,
    icarl_targets,
    logit_matching,
    nil_weights,
    proxy_contrastive,
    tempered_distillation,
    weighted_cross_entropy,
)
from dcl_lightning.functional.regularization import (
    agem_projection,
    gem_projection,
    merged_fisher,
    quadratic_penalty,
    quadratic_penalty_gradient,
    si_importance,
    si_path,
)
from dcl_lightning.functional.retrieval import highest_of_parts, interference
from dcl_lightning.functional.schedules import lr_factor, lr_scale, parameter_groups, warmup_divisor
from dcl_lightning.functional.scores import fitted_bias, held_out, restricted, top_k_hits

__all__ = [
    "agem_projection", "asymmetric_cross_entropy", "average_accuracy", "average_incremental_accuracy",
    "backward_transfer", "best_ridge", "class_means", "class_sums", "distillation", "distillation_share", "fitted_bias",
    "forgetting", "forward_transfer", "gem_projection", "held_out", "herd", "highest_of_parts", "icarl_loss",
    "icarl_targets", "interference", "lda_classifier", "learning_accuracy", "logit_matching", "lr_factor", "lr_scale",
    "merged_fisher", "nearest_mean_scores", "nearest_to_mean", "nil_weights", "normalise", "over_tasks",
    "parameter_groups", "proxy_contrastive", "quadratic_penalty", "quadratic_penalty_gradient", "restricted",
    "ridge_classifier", "ridge_errors", "si_importance", "si_path", "supervised_contrastive_losses",
    "tempered_distillation", "top_k_hits", "warmup_divisor", "weighted_cross_entropy",
]  # fmt: skip
