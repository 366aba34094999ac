"""Classifiers in closed form on a network that is not trained: SimpleCIL, streaming LDA, RanPAC.

Zhou, Cai, Ye, Zhan and Liu, "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and
Adaptivity are All You Need", IJCV 2024, arXiv 2303.07338 (SimpleCIL).

Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR Workshops 2020,
arXiv 1909.01520.

McDonnell, Gong, Parvaneh, Abbasnejad and van den Hengel, "RanPAC: Random Projections and Pre-trained Models for
Continual Learning", NeurIPS 2023, arXiv 2307.02251, algorithm 1.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dcl_lightning._lightning import datamodule_of
from dcl_lightning.agents.base import ContinualAgent
from dcl_lightning.agents.optimization import idle_loss
from dcl_lightning.backbones.short_names import Network
from dcl_lightning.callbacks.evaluation import evaluation_batches, limited_ids
from dcl_lightning.errors import check_number, whole_number
from dcl_lightning.functional.closed_form import best_ridge, class_sums, lda_classifier, ridge_classifier
from dcl_lightning.functional.herding import normalise
from dcl_lightning.functional.scores import held_out
from dcl_lightning.types import Batch, InputSpec, StateDict, Task

__all__ = ["SLDA", "ClosedForm", "RanPAC", "SimpleCIL"]

Sums = dict[str, Tensor]
Classifier = tuple[Tensor, Tensor, Tensor]

_RIDGES = tuple(10.0**power for power in range(-8, 9))
_HELD_OUT = 0.2  # of a task's samples, to choose lambda by


class ClosedForm(ContinualAgent):
    """A learner that computes its classifier from sums over features; a subclass defines the sums and the solution.

    At the end of a task all its samples go through the network once, as evaluation sees them, and the sums, in float64,
    are added up over the workers and to those of earlier tasks. So the classifier is that of all samples so far at
    once, whatever the order of the tasks and the number of workers. Steps train nothing and pass nothing through the
    network; one epoch a task is enough, and arguments of the optimizer have no effect. The network is frozen.

    Args:
        backbone: module that makes features, or its name; for it and for all that is not named here see
            ``ContinualAgent``.
        num_classes: classes of the whole stream, K; the data module's if None.
        input_spec: shape of one input, for a backbone that leaves it open.
        **kwargs: arguments of ``ContinualAgent``, by name.

    Attributes:
        statistics: the sums over all tasks so far, by name, float64.
        coefficients: ``(K, D)`` float64, the classifier's weights of a representation.
        offsets: ``(K,)`` float64, its biases.
        known: ``(K,)`` bool, the classes that it knows.
    """

    fixed_arguments = ("head", "head_scale", "train_classes", "reset_state_dict")  # the head is the classifier
    needs_whole_weights = "passes nothing through the network in a step, for which the workers' parts would wait"
    coefficients: Tensor
    offsets: Tensor
    known: Tensor

    def __init__(
        self, backbone: Network, num_classes: int | None = None, input_spec: InputSpec | None = None, **kwargs: Any
    ) -> None:
        self.statistics: Sums = {}
        super().__init__(
            backbone, num_classes, input_spec, head="linear", head_scale=None, train_classes="seen",
            reset_state_dict=False, **kwargs,
        )  # fmt: skip

    # -- what a subclass defines -------------------------------------------------------------------

    @abstractmethod
    def no_sums(self) -> Sums:
        """Return the sums over no sample, float64."""

    @abstractmethod
    def add(self, sums: Sums, features: Tensor, targets: Tensor, ids: Tensor) -> None:
        """Add samples to sums in place.

        Args:
            sums: as of ``no_sums``.
            features: ``(n, feature_dim)`` float64.
            targets: ``(n,)`` int64.
            ids: ``(n,)`` int64, of the samples.
        """

    @abstractmethod
    def solve(self) -> Classifier:
        """Return coefficients ``(K, D)``, offsets ``(K,)`` and known classes ``(K,)`` bool of the statistics."""

    def absorb(self, sums: Sums) -> None:
        """Add the sums over a task, of all workers, to the statistics."""
        for name, value in sums.items():
            self.statistics[name] = self.statistics[name].to(value) + value if name in self.statistics else value

    def represent(self, features: Tensor) -> Tensor:
        """Return representations ``(B, D)`` float64, which the classifier takes, of features ``(B, d)`` float64."""
        return features

    @property
    def width(self) -> int:
        """D, the length of a representation."""
        return self.head.in_features

    @property
    def adapts(self) -> bool:
        """Whether gradients train the network in some task."""
        return False

    @property
    def learns(self) -> bool:
        """Whether they do so in the present task."""
        return False

    # -- learning ----------------------------------------------------------------------------------

    def build(self) -> None:
        """Make room for the classifier, and freeze the network if it never trains."""
        super().build()
        self.register_buffer("coefficients", torch.zeros(self.num_classes, self.width, dtype=torch.float64))
        self.register_buffer("offsets", torch.zeros(self.num_classes, dtype=torch.float64))
        self.register_buffer("known", torch.zeros(self.num_classes, dtype=torch.bool))
        if not self.adapts:
            self.backbone.requires_grad_(False)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return 0, with a gradient of 0, and the logits of no row; where the network learns, its cross entropy."""
        if not self.learns:
            return idle_loss(self), batch.inputs.new_zeros(0, self.num_classes)
        logits = self.head(self.backbone(batch.inputs))
        return self.cross_entropy(logits, batch), logits

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients; those of 0 are taken away: without one, neither momentum nor decay moves a weight."""
        if self.learns:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for parameter in self.parameters():
            parameter.grad = None

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes; at the start of a stream forget an earlier one."""
        super().on_task_start(task)
        if task.index == 0:
            self.statistics = {}
            self.known.zero_()

    def on_task_end(self, task: Task) -> None:
        """Add the task's samples, of all workers, and compute the classifier."""
        data = datamodule_of(self.trainer)
        ids = limited_ids(self.trainer, data.train_indices(task.index))
        sums = self.no_sums()
        for batch in evaluation_batches(self, data.train_eval_loader(ids)):
            self.add(sums, self.features(batch.inputs).double(), batch.targets, batch.sample_ids)
        self.absorb({name: self.comm.allreduce(value) for name, value in sums.items()})
        coefficients, offsets, known = self.solve()
        self.coefficients.copy_(coefficients)
        self.offsets.copy_(offsets)
        self.known.copy_(known)

    # -- evaluation --------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the classifier's scores ``(B, K)``; before the end of the first task, the head's."""
        features = self.features(inputs)
        if not bool(self.known.any()):
            return self.head(features)
        representations = self.represent(features.double())
        scores = representations @ self.coefficients.double().T + self.offsets.double()
        return scores.to(torch.promote_types(features.dtype, torch.float32))

    def mask_unseen(self, scores: Tensor) -> Tensor:
        """Return scores with -inf for classes that the classifier does not know, or that were not seen before it is."""
        masked = scores.masked_fill(~self.known, -float("inf"))
        return torch.where(self.known.any(), masked, super().mask_unseen(scores))

    def on_save_checkpoint(self, checkpoint: StateDict) -> None:
        """Add the statistics."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["statistics"] = self.statistics

    def on_load_checkpoint(self, checkpoint: StateDict) -> None:
        """Restore the statistics."""
        super().on_load_checkpoint(checkpoint)
        self.statistics = dict(checkpoint["statistics"])

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.known.device)


class SimpleCIL(ClosedForm):
    """Predicts the class whose prototype, the mean of its features, has the largest cosine with a sample's features.

    Arguments as in ``ClosedForm``.
    """

    short_name = "simplecil"
    papers = ("zhou2024",)

    def no_sums(self) -> Sums:
        """Return zeros: sums of the features of each class, and counts."""
        return {"sums": self._zeros(self.num_classes, self.head.in_features), "counts": self._zeros(self.num_classes)}

    def add(self, sums: Sums, features: Tensor, targets: Tensor, ids: Tensor) -> None:
        """Add samples to their classes."""
        of_classes, counts = class_sums(features, targets, self.num_classes)
        sums["sums"] += of_classes
        sums["counts"] += counts

    def solve(self) -> Classifier:
        """Return the directions of the prototypes, which are those of the sums."""
        found = self.statistics["sums"]
        return normalise(found), torch.zeros_like(found[:, 0]), self.statistics["counts"] > 0

    def represent(self, features: Tensor) -> Tensor:
        """Return the features with norm 1."""
        return normalise(features)


class SLDA(SimpleCIL):
    """Linear discriminant analysis: Gaussian classes of one covariance, which all samples so far tell.

    The paper updates the covariance with each sample, by the class mean of then. Here it is that about the present
    means, so that it does not depend on the order of the samples.

    Args:
        *args: arguments of ``ContinualAgent``, by place.
        shrinkage: epsilon, by which the covariance is drawn to the identity, in (0, 1].
        **kwargs: arguments of ``ContinualAgent``, by name.

    Raises:
        ConfigurationError: the shrinkage is out of range.
    """

    short_name = "slda"
    papers = ("hayes2020",)

    def __init__(self, *args: Any, shrinkage: float = 1e-4, **kwargs: Any) -> None:
        check_number("model.shrinkage", shrinkage, above=0, at_most=1)
        self.shrinkage = shrinkage
        super().__init__(*args, **kwargs)

    def no_sums(self) -> Sums:
        """Return zeros: sums of the features of each class, counts, and sums of products of features."""
        dim = self.head.in_features
        return super().no_sums() | {"moments": self._zeros(dim, dim)}

    def add(self, sums: Sums, features: Tensor, targets: Tensor, ids: Tensor) -> None:
        """Add samples to their classes, and the products of their features."""
        super().add(sums, features, targets, ids)
        sums["moments"] += features.T @ features

    def solve(self) -> Classifier:
        """Return the discriminants."""
        sums, counts, moments = (self.statistics[name] for name in ("sums", "counts", "moments"))
        return *lda_classifier(sums, counts, moments, self.shrinkage), counts > 0

    def represent(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features


class RanPAC(ClosedForm):
    """Ridge regression from randomly projected features, rectified, to the labels.

    At the end of a task lambda is chosen as in the paper: from the powers of ten from -8 to 8, the one with the least
    squared error on a fifth of the task's samples after a fit to the others. That fifth is a fixed one, by the samples'
    ids, so that it does not depend on the number of workers.

    Args:
        *args: arguments of ``ContinualAgent``, by place.
        projection_dim: M, outputs of the random projection, at least 1; the paper takes 10,000. Statistics have 8 M²
            bytes, and a task's end takes a time that grows with M³.
        ridge: lambda, above 0, in place of that choice.
        first_session: whether gradients train the network in the first task, with a linear head and cross entropy. The
            paper adapts a few weights; here it is all that the backbone does not freeze, as with ``freeze:
            all_but_norm`` of ``timm``. Afterwards it stays as it is.
        **kwargs: arguments of ``ContinualAgent``, by name.

    Raises:
        ConfigurationError: one of the numbers is out of range.

    Attributes:
        projection: ``(feature_dim, M)`` float64, standard normal.
    """

    short_name = "ranpac"
    papers = ("mcdonnell2023",)
    projection: Tensor

    def __init__(
        self,
        *args: Any,
        projection_dim: int = 2000,
        ridge: float | None = None,
        first_session: bool = False,
        **kwargs: Any,
    ) -> None:
        self.projection_dim = whole_number("model.projection_dim", projection_dim, 1)
        if ridge is not None:
            check_number("model.ridge", ridge, above=0)
        self.ridge, self.first_session = ridge, first_session
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        """Draw the projection."""
        super().build()
        drawn = torch.randn(self.head.in_features, self.projection_dim, dtype=torch.float64)
        self.register_buffer("projection", drawn)

    @property
    def width(self) -> int:
        """M."""
        return self.projection_dim

    @property
    def adapts(self) -> bool:
        """Whether gradients train the network in the first task."""
        return self.first_session

    @property
    def learns(self) -> bool:
        """Whether that is the present one."""
        return self.first_session and self.clock.task_at(self.current_epoch) == 0

    def represent(self, features: Tensor) -> Tensor:
        """Return the rectified projections."""
        return (features @ self.projection.double()).relu()

    def no_sums(self) -> Sums:
        """Return zeros: Gram matrix, correlations with the labels and counts, of samples to fit and held-out ones."""
        m, k = self.projection_dim, self.num_classes
        return {
            name: self._zeros(*shape)
            for part in ("", "held_")
            for name, shape in ((f"{part}gram", (m, m)), (f"{part}correlations", (m, k)), (f"{part}counts", (k,)))
        }

    def add(self, sums: Sums, features: Tensor, targets: Tensor, ids: Tensor) -> None:
        """Add samples to those that are fitted, or to those that are held out."""
        representations, held = self.represent(features), held_out(ids, _HELD_OUT)
        for part, rows in (("", ~held), ("held_", held)):
            found = representations[rows]
            of_classes, counts = class_sums(found, targets[rows], self.num_classes)
            sums[f"{part}gram"].addmm_(found.T, found)
            sums[f"{part}correlations"] += of_classes.T
            sums[f"{part}counts"] += counts

    def absorb(self, sums: Sums) -> None:
        """Choose lambda by the task's samples, and add both parts of them to the statistics."""
        names = ("gram", "correlations", "counts")
        held = {name: sums[f"held_{name}"] for name in names}
        ridge = self.ridge
        if ridge is None:
            fitted, rest = ((part["gram"], part["correlations"]) for part in (sums, held))
            ridge = best_ridge(fitted, rest, float(held["counts"].sum()), _RIDGES)
        super().absorb({name: sums[name] + held[name] for name in names})
        self.statistics["ridge"] = torch.tensor(ridge, dtype=torch.float64)

    def solve(self) -> Classifier:
        """Return the weights of the ridge regression."""
        gram, correlations, counts = (self.statistics[name] for name in ("gram", "correlations", "counts"))
        weights = ridge_classifier(gram, correlations, float(self.statistics["ridge"]))
        return weights, torch.zeros_like(counts), counts > 0
