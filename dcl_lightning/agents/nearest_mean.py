"""Nearest-mean classification: means of the features of each class in the place of the head.

Rebuffi, Kolesnikov, Sperl and Lampert, "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017,
arXiv 1611.07725, algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dcl_lightning._lightning import datamodule_of
from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.functional.herding import class_means, nearest_mean_scores, normalise
from dcl_lightning.types import Batch

__all__ = ["NearestMean", "NearestMeanReplay"]


class NearestMean(ContinualAgent):
    """A learner that predicts the class whose mean is nearest, once there are means; arguments of ``ContinualAgent``.

    Attributes:
        means: ``(K, feature_dim)``, the mean of each class.
        has_mean: ``(K,)`` bool, the classes that have one.
    """

    # Whether features and means are divided by their Euclidean norms.
    unit_norm: ClassVar[bool] = True

    means: Tensor
    has_mean: Tensor

    def build(self) -> None:
        """Make room for the means."""
        super().build()
        self.register_buffer("means", torch.zeros(self.num_classes, self.head.in_features))
        self.register_buffer("has_mean", torch.zeros(self.num_classes, dtype=torch.bool))

    def evaluate(self, batch: Batch) -> Tensor:
        """Return scores ``(B, K)``: negative distances to the class means; before any mean, the head's."""
        if not bool(self.has_mean.any()):
            return super().evaluate(batch)
        return self.mean_scores(batch.inputs, self.has_mean)

    def mean_scores(self, inputs: Tensor, known: Tensor) -> Tensor:
        """Return negative distances ``(B, K)`` to the means, -inf for classes that are not known ``(K,)`` bool."""
        return nearest_mean_scores(self._scaled(self.features(inputs)), self.means, known)

    def features_of(self, ids: Tensor, mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """Return the features of training samples, or of their mirror images; every worker calls it.

        Args:
            ids: sample ids ``(n,)`` int64, the same on all workers.
            mirrored: whether the inputs are mirrored.

        Returns:
            The ids, ascending, and the features ``(n, feature_dim)`` float64 in their order, on the host.
        """

        def features(inputs: Tensor) -> Tensor:
            return self.features(inputs.flip(-1) if mirrored else inputs)

        return self.training_outputs(ids, features, self.head.in_features)

    def means_of(self, ids: Tensor, mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """Return the class means of training samples; every worker calls it and gets the same.

        Args:
            ids: sample ids ``(n,)`` int64, all different, the same on all workers.
            mirrored: whether the means are also over mirror images.

        Returns:
            ``(K, feature_dim)`` float64 on the host, and ``(K,)`` bool, the classes that have one.
        """
        targets, parts = datamodule_of(self.trainer).train_targets, []
        for flip in (False, True)[: 1 + mirrored]:
            found, features = self.features_of(ids, flip)
            part, known = class_means(self._scaled(features), targets[found], self.num_classes)
            parts.append(part)
        return self._scaled(torch.stack(parts).mean(0)), known

    def set_means(self, means: Tensor, known: Tensor) -> None:
        """Classify by other means from now on, see ``means_of``."""
        self.means.copy_(means)
        self.has_mean.copy_(known)

    def _scaled(self, features: Tensor) -> Tensor:
        # Half precision cannot divide by the smallest norms.
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return normalise(features) if self.unit_norm else features


class NearestMeanReplay(NearestMean, RehearsingAgent):
    """A rehearsing learner whose class means are those of all that is stored, on all workers.

    They are renewed before each evaluation within a fit, from the samples as evaluation sees them, of which each worker
    computes a share. A checkpoint has the means of the evaluation before it. Arguments of ``RehearsingAgent``.
    """

    def before_evaluation(self) -> None:
        """Renew the means."""
        if self.rehearsal.replay is not None:  # else validation is tried out before training
            self.set_means(*self.means_of(self.stored_ids()))
