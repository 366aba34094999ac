"""Projections of a gradient onto those that do no harm to earlier tasks, to first order."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["agem_projection", "gem_projection"]


def agem_projection(gradient: Tensor, reference: Tensor) -> Tensor:
    r"""Return the gradient, without the part that would raise the loss on the memory.

    .. math:: \tilde g = g - \frac{g^\top r}{r^\top r} r \quad \text{if } g^\top r < 0, \text{ else } g

    Chaudhry, Ranzato, Rohrbach and Elhoseiny, "Efficient Lifelong Learning with A-GEM", ICLR 2019, arXiv 1812.00420,
    equation 11.

    Args:
        gradient: ``(P,)`` g, floating.
        reference: ``(P,)`` r, gradient of the loss on the memory; all zeros where there is none.

    Returns:
        ``(P,)``.
    """
    product = gradient @ reference
    # A reference of zeros has the product 0. No branch: on a GPU the host would wait for the product.
    factor = torch.where(product < 0, product / (reference @ reference), torch.zeros_like(product))
    return gradient - factor * reference


def gem_projection(gradient: Tensor, references: Tensor, margin: float = 0.0, ridge: float = 1e-3) -> Tensor:
    r"""Return the gradient nearest to this one that raises the loss on no earlier task.

    .. math:: \tilde g = g + G^\top v, \quad
        v = \arg\min_{v \ge m} \tfrac12 v^\top (G G^\top + \epsilon I) v + (G g)^\top v

    if some product in ``G g`` is negative, else g. Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual
    Learning", NeurIPS 2017, arXiv 1706.08840, equations 11 and 12, with the paper's program's ridge. With
    ``v = m + u`` and the Cholesky factor L of the matrix this is least squares over ``u >= 0``, which SciPy solves.

    Args:
        gradient: ``(P,)`` g, floating.
        references: ``(T, P)`` G, the gradient of the loss on the memory of each of T earlier tasks; T may be 0.
        margin: m, at least 0; more favours earlier tasks.
        ridge: epsilon, above 0, in units of the largest squared length among the references.

    Returns:
        ``(P,)``.
    """
    from scipy.linalg import solve_triangular
    from scipy.optimize import nnls

    products = (references @ gradient).double().cpu().numpy()
    if not (products < 0).any():
        return gradient
    gram = (references @ references.T).double().cpu()
    gram = gram + ridge * gram.diagonal().max() * torch.eye(len(gram), dtype=gram.dtype)
    factor = torch.linalg.cholesky(gram).numpy()
    linear = gram.numpy().sum(1) * margin + products
    shifted, _ = nnls(factor.T, -solve_triangular(factor, linear, lower=True))
    return gradient + torch.from_numpy(shifted + margin).to(gradient) @ references
