"""BiC's bias correction: Wu et al., "Large Scale Incremental Learning", CVPR 2019, arXiv 1905.13260."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SMALLEST_SCALE", "distillation_share", "fitted_bias"]

SMALLEST_SCALE = 0.01


def distillation_share(num_old: int, num_new: int) -> float:
    """Return n / (n + m), the weight of distillation beside the classification loss (section 3).

    Args:
        num_old: n, classes of earlier tasks.
        num_new: m, classes of the present task, at least 1.
    """
    return num_old / (num_old + num_new)


def fitted_bias(logits: Tensor, targets: Tensor, new: Tensor, iterations: int = 100) -> tuple[float, float]:
    r"""Return alpha and beta that give new classes the logits :math:`\alpha z + \beta` (equations 4 and 5).

    They minimise the cross entropy of held-out samples, each class counting the same; it is convex in the two. The
    paper does not bound alpha. Here it is above ``SMALLEST_SCALE``: the correction weighs new classes against old ones,
    and a negative scale, which few held-out samples can ask for, would reverse the order of the new classes instead.

    Args:
        logits: ``(B, C)`` of the classes seen so far.
        targets: ``(B,)`` int64 in ``[0, C)``.
        new: ``(C,)`` bool, classes of the present task.
        iterations: of L-BFGS, at most.

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
        # Held-out samples are few and may be told apart without error: the ridge keeps the two finite.
        ridge = 1e-3 * ((alpha - 1).square() + beta.square())
        loss = (weights * F.cross_entropy(corrected, targets, reduction="none")).sum() / weights.sum() + ridge
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    log_alpha, beta = values.detach().tolist()
    return SMALLEST_SCALE + math.exp(log_alpha), beta
