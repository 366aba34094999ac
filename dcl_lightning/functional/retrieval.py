"""Which stored samples a step rehearses: those with which it would interfere most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["highest_of_parts", "interference"]


def interference(before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
    r"""Return how much a step raises the loss of each sample (Aljundi et al. 2019, arXiv 1908.04742, section 3.1).

    .. math:: s_i = \mathrm{CE}(z'_i, y_i) - \mathrm{CE}(z_i, y_i)

    Args:
        before: ``(n, C)`` logits z with the weights before the step, floating.
        after: ``(n, C)`` logits z' with the weights after it.
        targets: ``(n,)`` int64 y, in ``[0, C)``.

    Returns:
        ``(n,)`` s in the logits' dtype, at least float32; below 0 where the step lowers the loss.
    """
    dtype = torch.promote_types(before.dtype, torch.float32)
    first, second = (F.cross_entropy(z.to(dtype), targets, reduction="none") for z in (before, after))
    return second - first


def highest_of_parts(parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return which scores of each part are among the highest of all parts together.

    Of equal scores the first one counts as higher, so that whoever has the same parts finds the same; NaN is highest.

    Args:
        parts: scores ``(n_k,)`` each.
        count: scores that are chosen, at least 0; all where there are fewer.

    Returns:
        ``(n_k,)`` bool for each part.

    Example:
        >>> import torch
        >>> highest_of_parts([torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0, 2.0])], 3)
        [tensor([False,  True]), tensor([ True, False,  True])]
    """
    scores = torch.cat([*parts])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:count]] = True
    return [*chosen.split([len(part) for part in parts])]
