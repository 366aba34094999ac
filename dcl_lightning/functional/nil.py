"""Weight of a representative in NIL.

Muñoz et al., "Incremental learning model inspired in Rehearsal for deep convolutional networks",
Knowledge-Based Systems 208, 2020, as the original program has it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["nil_weights"]


def nil_weights(
    offered: Tensor,
    labels: Tensor,
    stored: int,
    batch_size: int,
    num_candidates: int,
) -> Tensor:
    """Return ``max(ln(n_y b / (c |S|)), 1)`` for each representative.

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
    # ln(x) is above 1 for x above e; a class that was never offered has 0.
    return torch.from_numpy(np.log(np.maximum(ratio, math.e)).astype(np.float32))
