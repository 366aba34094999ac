"""Scores of classes: top-k hits, restriction to some classes, and BiC's bias correction."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SMALLEST_SCALE", "class_ranks", "fitted_bias", "held_out", "restricted", "top_k_hits"]

SMALLEST_SCALE = 0.01


def class_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Return how many classes come before each sample's own by score, ``(B,)`` int64; see ``top_k_hits`` for the order.

    Args:
        scores: ``(B, K)`` floating.
        targets: ``(B,)`` int64 in ``[0, K)``; a class whose score is not finite has the largest rank there is.
    """
    own = scores.gather(1, targets[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < targets[:, None]
    ahead = (scores > own) | ((scores == own) & earlier) | scores.isnan()
    return ahead.sum(1).masked_fill(~own[:, 0].isfinite(), torch.iinfo(torch.int64).max)


def top_k_hits(scores: Tensor, targets: Tensor, k: int) -> Tensor:
    """Return whether each sample's class is among the k highest scores.

    Only finite scores count: a class that was not learnt yet has the score -inf and is never a hit, however few classes
    are scored; the same holds for NaN and infinity, after training has diverged. Of equal scores the class with the
    smaller number comes first, so that ``k=1`` is ``argmax`` and a hit for k is one for every larger k.

    Args:
        scores: ``(B, K)`` floating.
        targets: ``(B,)`` int64 in ``[0, K)``.
        k: at least 1.

    Returns:
        ``(B,)`` bool.

    Example:
        >>> import torch
        >>> top_k_hits(torch.tensor([[3.0, 2.0, 1.0]]).repeat(3, 1), torch.tensor([0, 1, 2]), k=2)
        tensor([ True,  True, False])
        >>> top_k_hits(torch.tensor([[3.0, 2.0, -torch.inf]]).repeat(3, 1), torch.tensor([0, 1, 2]), k=3)
        tensor([ True,  True, False])
    """
    return class_ranks(scores, targets) < k


def restricted(scores: Tensor, classes: Tensor) -> Tensor:
    """Return scores with -inf for all but a task's classes, as for evaluation with known tasks (task-IL).

    van de Ven and Tolias 2019, "Three scenarios for continual learning", arXiv 1904.07734.

    Args:
        scores: ``(B, K)`` floating.
        classes: ``(K,)`` bool, those of the task.

    Example:
        >>> import torch
        >>> restricted(torch.tensor([[0.5, 0.25, 2.0]]), torch.tensor([True, True, False]))
        tensor([[0.5000, 0.2500,   -inf]])
    """
    return scores.masked_fill(~classes, -float("inf"))


def held_out(ids: Tensor, share: float) -> Tensor:
    """Return which samples are held out, ``(n,)`` bool: by a hash of their ids, so that all workers find the same.

    Args:
        ids: ``(n,)`` int64.
        share: of all ids, in [0, 1].
    """
    return (ids * 2654435761) % 2**32 < share * 2**32


def fitted_bias(logits: Tensor, targets: Tensor, new: Tensor, iterations: int = 100) -> tuple[float, float]:
    r"""Return alpha and beta that give new classes the logits :math:`\alpha z + \beta` (equations 4 and 5).

    Wu et al., "Large Scale Incremental Learning", CVPR 2019, arXiv 1905.13260. Both minimize the cross entropy of
    held-out samples, in which all classes have the same weight; it is convex in the two. Unlike in the paper alpha is
    above ``SMALLEST_SCALE``: few held-out samples can give a negative scale, which reverses the order of new classes.

    Args:
        logits: ``(B, C)`` of the classes seen so far.
        targets: ``(B,)`` int64 in ``[0, C)``.
        new: ``(C,)`` bool, classes of the current task.
        iterations: largest number of L-BFGS iterations.

    Returns:
        alpha and beta; 1 and 0 if there are no samples of new classes, or none of old ones.
    """
    is_new = new[targets]
    if not bool(is_new.any()) or bool(is_new.all()):
        return 1.0, 0.0
    logits = logits.double()
    counts = torch.bincount(targets, minlength=logits.shape[1]).clamp(min=1)
    weights = 1.0 / counts[targets]
    start = [math.log(1 - SMALLEST_SCALE), 0.0]  # the identity
    values = torch.tensor(start, dtype=torch.float64, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([values], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        alpha, beta = SMALLEST_SCALE + values[0].exp(), values[1]
        corrected = torch.where(new, alpha * logits + beta, logits)
        # The held-out samples are few and may be separable: the ridge keeps both values finite.
        ridge = 1e-3 * ((alpha - 1).square() + beta.square())
        loss = (weights * F.cross_entropy(corrected, targets, reduction="none")).sum() / weights.sum() + ridge
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    log_alpha, beta = values.detach().tolist()
    return SMALLEST_SCALE + math.exp(log_alpha), beta
