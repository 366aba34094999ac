"""The supervised contrastive loss: features of one class are drawn together, and away from those of other classes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["supervised_contrastive_losses"]


def supervised_contrastive_losses(
    features: Tensor, labels: Tensor, temperature: float, anchors: slice | None = None
) -> Tensor:
    r"""Return the supervised contrastive loss of each anchor (Khosla et al. 2020, arXiv 2004.11362, equation 2).

    .. math:: \ell_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{e^{z_i \cdot z_p / \tau}}{\sum_{a \in A(i)} e^{z_i \cdot z_a / \tau}}

    A(i) are all rows but i, P(i) those of them that have the label of i.

    Args:
        features: ``(m, d)`` z, floating, of Euclidean norm 1.
        labels: ``(m,)`` int64; a row whose label is below 0 takes no part.
        temperature: tau, above 0.
        anchors: the n rows i; all if None.

    Returns:
        ``(n,)`` in the features' dtype, at least float32; 0 for an anchor that takes no part or is alone in its class.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> supervised_contrastive_losses(z, torch.tensor([5, 5, 3]), temperature=1.0)
        tensor([0.3133, 0.3133, 0.0000])
    """
    anchors = anchors or slice(None)
    dtype = torch.promote_types(features.dtype, torch.float32)
    # Autocast would multiply in half precision, of which the temperature enlarges the errors.
    with torch.autocast(features.device.type, enabled=False):
        rows = features.to(dtype)
        similar = rows[anchors] @ rows.T / temperature
    places = torch.arange(len(rows), device=rows.device)
    others = (labels >= 0) & (places[anchors, None] != places)
    positives = others & (labels[anchors, None] == labels)
    # The lowest number in place of -inf, whose gradient would be NaN where nothing else is left.
    losses = similar.masked_fill(~others, torch.finfo(dtype).min).logsumexp(1, keepdim=True) - similar
    return losses.masked_fill(~positives, 0.0).sum(1) / positives.sum(1).clamp(min=1)
