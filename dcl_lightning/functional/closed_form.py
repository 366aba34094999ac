"""Linear classifiers in closed form, from sums over features that add up over tasks and workers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["best_ridge", "class_sums", "lda_classifier", "ridge_classifier", "ridge_errors"]


def class_sums(features: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the features of each class, and their number.

    Args:
        features: ``(n, d)`` of a floating dtype, which is kept.
        targets: ``(n,)`` int64, in ``[0, K)``.
        num_classes: K.

    Returns:
        ``(K, d)`` and ``(K,)``.
    """
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, targets, features)
    counts = torch.zeros_like(sums[:, 0]).index_add_(0, targets, torch.ones_like(features[:, 0]))
    return sums, counts


def lda_classifier(sums: Tensor, counts: Tensor, moments: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    r"""Return weights and biases of linear discriminant analysis with one covariance for all classes.

    .. math:: w_k = \Lambda \mu_k, \quad b_k = -\frac{1}{2} \mu_k^T \Lambda \mu_k, \quad
        \Lambda = \left((1 - \varepsilon) \Sigma + \varepsilon I\right)^{-1}

    with the covariance of the features about their class means

    .. math:: \Sigma = \frac{1}{n} \Bigl(\sum_i f_i f_i^T - \sum_k n_k \mu_k \mu_k^T\Bigr)

    Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR Workshops 2020,
    arXiv 1909.01520. They update the covariance sample by sample, which makes it depend on their order; this one does
    not.

    Args:
        sums: ``(K, d)`` float64, of the features of each class.
        counts: ``(K,)``, the number of them; a class without any gets weights and bias 0.
        moments: ``(d, d)``, the sum of the products of features.
        shrinkage: epsilon, in (0, 1].

    Returns:
        ``(K, d)`` and ``(K,)``.
    """
    means = sums / counts.clamp(min=1)[:, None]
    covariance = (moments - sums.T @ means) / counts.sum().clamp(min=1)
    shrunk = (1 - shrinkage) * covariance + shrinkage * torch.eye(len(moments)).to(moments)
    weights = torch.linalg.solve(shrunk, means.T).T
    return weights, -(weights * means).sum(1) / 2


def ridge_classifier(gram: Tensor, correlations: Tensor, ridge: float) -> Tensor:
    r"""Return the weights of ridge regression from representations to one-hot labels.

    .. math:: W = (G + \lambda I)^{-1} C, \quad G = \sum_i h_i h_i^T, \quad C = \sum_i h_i y_i^T

    McDonnell, Gong, Parvaneh, Abbasnejad and van den Hengel, "RanPAC: Random Projections and Pre-trained Models for
    Continual Learning", NeurIPS 2023, arXiv 2307.02251, algorithm 1.

    Args:
        gram: G, ``(M, M)`` float64.
        correlations: C, ``(M, K)``.
        ridge: lambda, above 0.

    Returns:
        ``(K, M)``, the transpose of W.
    """
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), correlations).T


def ridge_errors(
    fitted: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], num_held: float, ridges: Sequence[float]
) -> Tensor:
    r"""Return the sum of squared errors of ridge regressions on held-out samples, by sums over both parts alone.

    .. math:: \sum_i \|W^T h_i - y_i\|^2 = \mathrm{tr}(W^T G W) - 2 \, \mathrm{tr}(W^T C) + n

    with G, C and n of the held-out samples, and W of the others.

    Args:
        fitted: G ``(M, M)`` and C ``(M, K)`` float64 of the samples that are fitted, see ``ridge_classifier``.
        held: the same of the held-out ones.
        num_held: n.
        ridges: each lambda, above 0.

    Returns:
        ``(len(ridges),)`` float64.
    """
    values, vectors = torch.linalg.eigh(fitted[0])
    values = values.clamp(min=0)  # rounding makes some slightly negative, of which a small lambda would not be enough
    gram, correlations = vectors.T @ held[0] @ vectors, vectors.T @ held[1]
    right, errors = vectors.T @ fitted[1], []
    for ridge in ridges:
        weights = right / (values + ridge)[:, None]
        errors.append((weights * (gram @ weights)).sum() - 2 * (weights * correlations).sum() + num_held)
    return torch.stack(errors)


def best_ridge(
    fitted: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], num_held: float, ridges: Sequence[float]
) -> float:
    """Return the lambda with the least error on held-out samples, the largest of several; see ``ridge_errors``."""
    errors = ridge_errors(fitted, held, num_held, ridges)
    return max(ridge for ridge, error in zip(ridges, errors.tolist(), strict=True) if error == float(errors.min()))
