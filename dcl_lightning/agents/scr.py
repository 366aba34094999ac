"""SCR, supervised contrastive replay.

Mai, Li, Kim and Sanner, "Supervised Contrastive Replay: Revisiting the Nearest Class Mean Classifier in Online
Class-Incremental Continual Learning", CVPR Workshops 2021, arXiv 2103.13885, algorithm 1; with the loss of
Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu and Krishnan, "Supervised Contrastive Learning",
NeurIPS 2020, arXiv 2004.11362, equation 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcl_lightning.agents.nearest_mean import NearestMeanReplay
from dcl_lightning.backbones import ProjectionHead
from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.comm import gather_rows
from dcl_lightning.errors import ConfigurationError, check_number, whole_number
from dcl_lightning.functional.contrastive import supervised_contrastive_losses
from dcl_lightning.functional.herding import class_means, nearest_mean_scores
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["SCR"]


class SCR(NearestMeanReplay):
    """Draws the samples of each class together in feature space, and predicts the class with the nearest mean.

    A step's new and rehearsed samples each come in two views: as evaluation sees them, and as training does, with what
    ``data.augment`` or ``data.transform`` does to them. The views go through the network one after the other. Each
    projected view of each sample is contrasted with all others of the step on all workers, so that N workers learn what
    one process with the N-fold batch would. For this, projections travel between workers, and gradients back. Of image
    files and of a scenario's transformations, both views have the random crop that the loader has made.

    Without ``lr`` and ``optimizer`` the rate is the paper's, 0.1. The paper's program does not train while nothing is
    stored; here the first batch is contrasted with itself. ``train/acc`` is that of the augmented views by the nearest
    mean of the other views' projections. The loss of validation is that of the negative distances to the class means as
    logits, which for a class that is not stored is the distance to 0.

    Args:
        *args: arguments of ``RehearsingAgent``, by place.
        projection_dim: outputs of the projection, a perceptron with one hidden layer whose output has the norm 1; at
            least 1. It is for training alone: means are of the backbone's features.
        temperature: what similarities are divided by, above 0.
        **kwargs: arguments of ``RehearsingAgent``, by name.

    Raises:
        ConfigurationError: a number is out of range, or the memory stores no sample as it came.
    """

    boundaries = ("known", "hidden")
    short_name = "scr"
    papers = ("mai2021", "khosla2020")
    fixed_arguments = ("head", "head_scale", "train_classes")  # there are no outputs of classes
    memory = RehearsalConfig(num_samples=100)
    two_views = True
    sgd_lr = 0.1

    def __init__(self, *args: Any, projection_dim: int = 128, temperature: float = 0.07, **kwargs: Any) -> None:
        self.projection_dim = whole_number("model.projection_dim", projection_dim, 1)
        check_number("model.temperature", temperature, above=0)
        self.temperature = temperature
        super().__init__(*args, head="linear", head_scale=None, train_classes="all", **kwargs)

    def build(self) -> None:
        """Make the projection in the place of the head."""
        super().build()
        self.head = ProjectionHead(self.head.in_features, self.projection_dim)

    def _complete(self, rehearsal: Rehearsal) -> None:
        super()._complete(rehearsal)
        if rehearsal.config.row_format == "augmented":
            raise ConfigurationError(
                f"rehearsal.row_format=augmented stores no sample as it came, of which agent {type(self).__name__} "
                "takes both views: give row_format=inputs or index"
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return negative distances ``(B, K)`` to the class means; for a class without a mean, to 0."""
        return self.mean_scores(inputs, torch.ones_like(self.has_mean))

    def project(self, inputs: Tensor) -> Tensor:
        """Return projections ``(B, projection_dim)`` of Euclidean norm 1."""
        return self.head(self.backbone(inputs))

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean loss over both views of the samples of all workers, and scores of the augmented views."""
        assert batch.plain is not None
        plain = self.outputs(batch._replace(inputs=batch.plain), self.project)
        augmented = self.outputs(batch, self.project)
        labels = torch.where(batch.weights > 0, batch.targets, -1)
        features, own = gather_rows(torch.cat([plain, augmented]), self.comm)
        labels = torch.cat(self.comm.allgather(labels.repeat(2)))
        losses = supervised_contrastive_losses(features, labels, self.temperature, own)
        loss = (batch.weights.repeat(2) * losses).sum() / (2 * batch.normalizer)
        means = class_means(plain.detach(), batch.targets, self.num_classes)
        return loss, nearest_mean_scores(augmented.detach(), *means)
