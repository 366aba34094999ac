"""What is right by scores ``(B, K)``, highest for the predicted class."""

from __future__ import annotations

from torch import Tensor

__all__ = ["restricted", "top_k_hits"]


def top_k_hits(scores: Tensor, targets: Tensor, k: int) -> Tensor:
    """Return whether each sample's class is among the k highest scores.

    Args:
        scores: ``(B, K)`` floating.
        targets: ``(B,)`` int64.
        k: at least 1; with k of K or more everything is right.

    Returns:
        ``(B,)`` bool.

    Example:
        >>> import torch
        >>> top_k_hits(torch.tensor([[3.0, 2.0, 1.0]]).repeat(3, 1), torch.tensor([0, 1, 2]), k=2)
        tensor([ True,  True, False])
    """
    if k == 1:
        return scores.argmax(1) == targets
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == targets[:, None]).any(1)


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
