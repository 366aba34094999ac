"""Weight of a representative in NIL.

Muñoz et al., "Incremental learning model inspired in Rehearsal for deep convolutional networks",
Knowledge-Based Systems 208, 2020, as the original program has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nil_weights"]


def nil_weights(
    offered: Tensor,
    labels: Tensor,
    stored: int,
    batch_size: int,
    num_candidates: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``max(ln(n_y b / (c |S|)), 1)`` for each representative.

    Args:
        offered: ``(K,)`` int64, n_y: candidates of each class offered so far.
        labels: ``(r,)`` int64, classes of the representatives.
        stored: |S|, rows stored.
        batch_size: b, new samples a step and worker.
        num_candidates: c, candidates a step and worker.
        dtype: of the result.
    """
    ratio = offered.index_select(0, labels).double().mul_(batch_size).div_(num_candidates * max(stored, 1))
    return ratio.log_().clamp_(min=1.0).to(dtype)
