"""Top-k hits, and scores restricted to some classes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["restricted", "top_k_hits"]


def top_k_hits(scores: Tensor, targets: Tensor, k: int) -> Tensor:
    """Return whether each sample's class is among the k highest scores.

    Only finite scores count: a class that was not learnt yet has the score -inf and is never a hit, however few classes
    are scored; neither is a class whose score is NaN or infinite, as after training has diverged. Of equal scores the
    class with the smaller number comes first, so that ``k=1`` is ``argmax`` and a hit for k is one for every larger k.

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
    own = scores.gather(1, targets[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < targets[:, None]
    ahead = (scores > own) | ((scores == own) & earlier) | scores.isnan()
    return (ahead.sum(1) < k) & own[:, 0].isfinite()


def restricted(scores: Tensor, classes: Tensor) -> Tensor:
    """Return scores with -inf for all but a task's classes: what an agent says that is told the task (task-IL).

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
