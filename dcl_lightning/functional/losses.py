"""Losses over a worker's share of a batch.

``weights`` is 0 for rows that only pad a shard; ``normalizer`` is the sum of the step's weights over all workers,
divided by their number. So the mean of the workers' losses, and of their gradients, is that of one process on the
concatenated batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "asymmetric_cross_entropy",
    "distillation",
    "distillation_share",
    "icarl_loss",
    "icarl_targets",
    "logit_matching",
    "nil_weights",
    "proxy_contrastive",
    "tempered_distillation",
    "weighted_cross_entropy",
]


def distillation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return ``KL(softmax(teacher) || softmax(logits))``, the mean over rows, at temperature 1.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.

    Args:
        logits: ``(B, K)``, at least one row.
        teacher_logits: ``(B, K)``.
    """
    return F.kl_div(logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="batchmean", log_target=True)


def distillation_share(num_old: int, num_new: int) -> float:
    """Return n / (n + m), BiC's weight of distillation relative to classification (Wu et al. 2019, section 3).

    Args:
        num_old: n, classes of earlier tasks.
        num_new: m, classes of the current task, at least 1.
    """
    return num_old / (num_old + num_new)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, normalizer: Tensor | float) -> Tensor:
    r"""Return the weighted cross entropy, 0-dim.

    .. math:: \frac{1}{n} \sum_i w_i \, \mathrm{CE}(z_i, y_i)

    Args:
        logits: ``(B, K)`` z, floating.
        targets: ``(B,)`` y, int64.
        weights: ``(B,)`` w, float32.
        normalizer: n, 0-dim float32.
    """
    return (weights * F.cross_entropy(logits, targets, reduction="none")).sum() / normalizer


def tempered_distillation(
    logits: Tensor, teacher_logits: Tensor, weights: Tensor, normalizer: Tensor | float, temperature: float
) -> Tensor:
    r"""Return the distillation loss, 0-dim (Li and Hoiem 2016, arXiv 1606.09282, equations 2 to 4).

    .. math:: -\frac{1}{n} \sum_i w_i \sum_k p_{ik} \log q_{ik}, \quad
        p_i = \mathrm{softmax}(t_i / T), \ q_i = \mathrm{softmax}(z_i / T)

    Equation 3 raises probabilities to the power 1 / T, which is the softmax of the logits over T.

    Args:
        logits: ``(B, C)`` z of the classes that the teacher knows, floating.
        teacher_logits: ``(B, C)`` t.
        weights: ``(B,)`` w, float32.
        normalizer: n, 0-dim float32.
        temperature: T, above 0.
    """
    taught = (teacher_logits.detach() / temperature).softmax(1)
    return (weights * F.cross_entropy(logits / temperature, taught, reduction="none")).sum() / normalizer


def asymmetric_cross_entropy(
    logits: Tensor, targets: Tensor, classes: Tensor, weights: Tensor, normalizer: Tensor | float
) -> Tensor:
    r"""Return the cross entropy among some classes alone, 0-dim (Caccia et al. 2022, arXiv 2104.05025, equation 5).

    .. math:: -\frac{1}{n} \sum_i w_i \log \frac{e^{z_{i y_i}}}{\sum_{c \in C} e^{z_{ic}}}

    Args:
        logits: ``(B, K)`` z, floating.
        targets: ``(B,)`` y int64, in C except for rows of weight 0.
        classes: ``(K,)`` bool, C.
        weights: ``(B,)`` w, float32.
        normalizer: n, 0-dim float32.
    """
    # A row of weight 0 needs its own class for a finite loss: 0 times infinity is NaN.
    scored = classes | F.one_hot(targets, logits.shape[1]).bool()
    return weighted_cross_entropy(logits.masked_fill(~scored, -float("inf")), targets, weights, normalizer)


def proxy_contrastive(
    logits: Tensor, targets: Tensor, counts: Tensor, weights: Tensor, normalizer: Tensor | float
) -> Tensor:
    r"""Return PCR's loss, 0-dim: each sample is drawn to the vector of its class, its proxy, among those of the batch.

    .. math:: -\frac{1}{n} \sum_i w_i \log \frac{e^{z_{i y_i}}}{\sum_k m_k e^{z_{ik}}}

    Lin, Zhang, Feng, Li and Ye, CVPR 2023, arXiv 2304.04408, as their program computes it: the denominator has the
    proxy of each sample of the batch, that of the anchor too, and so the proxy of a class as often as it has samples.
    Classes without samples are not pushed down.

    Args:
        logits: ``(B, K)`` z, floating: cosines between the features and the proxies, over the temperature.
        targets: ``(B,)`` y, int64.
        counts: ``(K,)`` m, samples of each class in the batch, over all workers.
        weights: ``(B,)`` w, float32.
        normalizer: n, 0-dim float32.
    """
    # A row of weight 0 is not counted: it needs its own class for a finite loss, as 0 times infinity is NaN.
    scored = torch.maximum(counts, F.one_hot(targets, logits.shape[1]))
    shares = scored.to(torch.promote_types(logits.dtype, torch.float32)).log()
    # The cross entropy of the logits and shares has the share of a sample's own class in its numerator, too.
    constant = (weights * shares.gather(1, targets[:, None])[:, 0]).sum() / normalizer
    return weighted_cross_entropy(logits + shares, targets, weights, normalizer) + constant


def logit_matching(logits: Tensor, stored: Tensor, weights: Tensor, normalizer: Tensor | float) -> Tensor:
    r"""Return the squared distance to stored logits, 0-dim (Buzzega et al. 2020, arXiv 2004.07211, equation 5).

    .. math:: \frac{1}{n K} \sum_i w_i \sum_k (z_{ik} - s_{ik})^2

    The mean over classes is that of the paper's program, with which its factors alpha were chosen.

    Args:
        logits: ``(B, K)`` z, floating.
        stored: ``(B, K)`` s, of the same samples.
        weights: ``(B,)`` w, float32.
        normalizer: n, 0-dim float32.
    """
    return (weights * (logits - stored).square().mean(1)).sum() / normalizer


def icarl_targets(
    targets: Tensor, num_classes: int, current: Tensor, remembered: Tensor, teacher_logits: Tensor | None
) -> Tensor:
    """Return the training targets of the sigmoid outputs (Rebuffi et al. 2017, algorithm 3).

    The target of a class of the current taskset is its label, 0 or 1, even if an earlier task had it: otherwise a
    stream that repeats its classes could not be learnt. The target of a class that is only remembered is the teacher's
    sigmoid, or 0 without a teacher; that of all others is 0.

    Args:
        targets: ``(B,)`` int64 labels.
        num_classes: K.
        current: ``(K,)`` bool, classes of the current taskset.
        remembered: ``(K,)`` bool, classes in memory.
        teacher_logits: ``(B, K)`` outputs of the network as it was after the previous task, or None.

    Returns:
        ``(B, K)`` in [0, 1]; float32, or the teacher's dtype.
    """
    labels = F.one_hot(targets, num_classes)
    if teacher_logits is None:
        return (labels * current).to(torch.float32)
    taught = teacher_logits.detach().sigmoid()
    return torch.where(current, labels.to(taught), taught * (remembered & ~current))


def icarl_loss(
    logits: Tensor,
    soft_targets: Tensor,
    weights: Tensor,
    normalizer: Tensor | float,
    divisor: float,
    columns: Tensor | None = None,
) -> Tensor:
    r"""Return iCaRL's loss, 0-dim: binary cross entropy of all outputs (Rebuffi et al. 2017, algorithm 3).

    .. math:: \frac{1}{n D} \sum_i w_i \sum_{k \in C} \mathrm{BCE}(\sigma(z_{ik}), q_{ik})

    Args:
        logits: ``(B, K)`` z, floating.
        soft_targets: ``(B, K)`` q, in [0, 1].
        weights: ``(B,)`` w, float32.
        normalizer: n, 0-dim float32.
        divisor: D; K for the mean over all classes, 1 for the sum.
        columns: ``(K,)`` bool, the classes C that are trained; all if None.
    """
    losses = F.binary_cross_entropy_with_logits(logits, soft_targets.to(logits.dtype), reduction="none")
    if columns is not None:
        losses = losses.masked_fill(~columns, 0.0)
    return (weights * losses.sum(1)).sum() / (normalizer * divisor)


def nil_weights(
    offered: Tensor,
    labels: Tensor,
    stored: int,
    batch_size: int,
    num_candidates: int,
) -> Tensor:
    """Return ``max(ln(n_y b / (c |S|)), 1)`` for each representative, as in the original program.

    Muñoz et al., "Incremental learning model inspired in Rehearsal for deep convolutional networks", Knowledge-Based
    Systems 208, 2020.

    Args:
        offered: ``(K,)`` int64, n_y: candidates of each class offered so far.
        labels: ``(r,)`` int64, classes of the representatives.
        stored: |S|, rows stored.
        batch_size: b, new samples a step and worker.
        num_candidates: c, candidates a step and worker.

    Returns:
        ``(r,)`` float32.
    """
    ratio = offered.numpy()[labels.cpu().numpy()] * (batch_size / (num_candidates * max(stored, 1)))
    # ln(x) is above 1 for x above e; n_y is 0 for a class that was never offered.
    return torch.from_numpy(np.log(np.maximum(ratio, math.e)).astype(np.float32))
