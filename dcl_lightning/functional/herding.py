"""Selection of exemplars, and nearest-mean classification (Rebuffi et al. 2017, algorithms 1 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dcl_lightning.functional.closed_form import class_sums

__all__ = ["class_means", "herd", "nearest_mean_scores", "nearest_to_mean", "normalise"]


def normalise(features: Tensor) -> Tensor:
    """Return the features with Euclidean norm 1; zero vectors stay zero.

    Args:
        features: ``(n, d)`` of a floating dtype, which is kept.
    """
    return F.normalize(features, dim=-1)


def herd(features: Tensor, m: int) -> Tensor:
    r"""Return indices of m exemplars in order of priority: any first k of them approximate the mean.

    With unit-norm features phi and their mean mu, the k-th exemplar is

    .. math:: p_k = \arg\min_x \Bigl\| \mu - \frac{1}{k} \Bigl(\phi(x) + \sum_{i<k} \phi(p_i)\Bigr) \Bigr\|

    over the samples not chosen yet, the lowest index of several minima (Rebuffi et al. 2017, algorithm 4).

    Args:
        features: ``(n, d)`` features of one class, of any norm; converted to float64.
        m: number of exemplars; n if larger.

    Returns:
        ``(min(m, n),)`` int64 indices into ``features``, distinct.
    """
    unit = normalise(features.detach().double())
    wanted = unit.mean(0)
    total = torch.zeros_like(wanted)
    free = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    chosen: list[int] = []
    for k in range(1, min(m, len(unit)) + 1):
        distance = (wanted - (unit + total) / k).norm(dim=1).masked_fill(~free, float("inf"))
        best = int(torch.nonzero(distance == distance.min())[0])  # argmin may return any of several minima
        chosen.append(best)
        free[best] = False
        total = total + unit[best]
    return torch.tensor(chosen, dtype=torch.int64, device=features.device)


def nearest_to_mean(features: Tensor, m: int) -> Tensor:
    """Return indices of the m samples nearest to the mean, nearest first, ties to the lowest index.

    The variant of the program distributed-continual-learning: Euclidean, features as they are.

    Args:
        features: ``(n, d)`` features of one class; converted to float64.
        m: number of exemplars; n if larger.

    Returns:
        ``(min(m, n),)`` int64 indices into ``features``, distinct.
    """
    features = features.detach().double()
    return (features - features.mean(0)).norm(dim=1).argsort(stable=True)[:m]


def class_means(features: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean of the features of each class, and which classes have any.

    Args:
        features: ``(n, d)`` of a floating dtype, which is kept.
        targets: ``(n,)`` int64, in ``[0, K)``.
        num_classes: K.

    Returns:
        ``(K, d)``, 0 for a class without features, and ``(K,)`` bool.
    """
    sums, counts = class_sums(features, targets, num_classes)
    return sums / counts.clamp(min=1)[:, None], counts > 0


def nearest_mean_scores(features: Tensor, means: Tensor, known: Tensor) -> Tensor:
    """Return negative Euclidean distances to the class means (Rebuffi et al. 2017, algorithm 1).

    Args:
        features: ``(B, d)`` features, normalised if the means are.
        means: ``(K, d)`` class means.
        known: ``(K,)`` bool, the classes that have a mean.

    Returns:
        ``(B, K)`` scores in the means' dtype, at least float32, highest for the nearest class; -inf for unknown
        classes.
    """
    # cdist's expansion of the square loses digits where two means are close.
    means = means.to(torch.promote_types(means.dtype, torch.float32))
    distances = torch.cdist(features.to(means), means, compute_mode="donot_use_mm_for_euclid_dist")
    return (-distances).masked_fill(~known, -float("inf"))
