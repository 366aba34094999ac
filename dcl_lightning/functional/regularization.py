"""Regularization by earlier tasks: penalties on changed weights, and projections of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "agem_projection",
    "gem_projection",
    "merged_fisher",
    "quadratic_penalty",
    "quadratic_penalty_gradient",
    "si_importance",
    "si_path",
]


def quadratic_penalty(weights: Tensor, anchor: Tensor, importance: Tensor) -> Tensor:
    r"""Return :math:`\sum_k \Omega_k (\theta_k - \theta^*_k)^2`, 0-dim.

    Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796,
    equation 3, without lambda / 2; Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence", ICML
    2017, arXiv 1703.04200, equation 4, without c.

    Args:
        weights: ``(P,)`` theta.
        anchor: ``(P,)`` theta*, the weights at the end of the previous task.
        importance: ``(P,)`` Omega, at least 0.
    """
    return (importance * (weights - anchor).square()).sum()


def quadratic_penalty_gradient(weights: Tensor, anchor: Tensor, importance: Tensor) -> Tensor:
    """Return the gradient ``(P,)`` of ``quadratic_penalty`` by the weights; arguments as there."""
    return 2 * importance * (weights - anchor)


def merged_fisher(fisher: Tensor, of_task: Tensor, decay: float) -> Tensor:
    r"""Return :math:`\gamma F + F_t`, the running Fisher information of online EWC.

    Schwarz et al., "Progress & Compress", ICML 2018, arXiv 1805.06370, equation 9.

    Args:
        fisher: ``(P,)`` F, of the previous tasks.
        of_task: ``(P,)`` F_t, the mean square of the gradients of single samples' log-likelihoods.
        decay: gamma, in [0, 1].
    """
    return decay * fisher + of_task


def si_path(path: Tensor, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
    r"""Return the path integral after one more step: :math:`\omega_k - g_k \Delta\theta_k`.

    Zenke et al. 2017, section 3: the decrease of the loss that is due to weight k.

    Args:
        path: ``(P,)`` omega.
        gradient: ``(P,)`` g, of the loss without the penalty.
        before: ``(P,)`` weights before the step.
        after: ``(P,)`` weights after it.
    """
    return path - gradient * (after - before)


def si_importance(importance: Tensor, path: Tensor, weights: Tensor, anchor: Tensor, damping: float) -> Tensor:
    r"""Return :math:`\Omega_k + \max(\omega_k, 0) / ((\theta_k - \theta^*_k)^2 + \xi)`.

    Zenke et al. 2017, equation 5. A negative path counts as 0, as in the paper's program, so that the penalty stays
    positive.

    Args:
        importance: ``(P,)`` Omega of the previous tasks.
        path: ``(P,)`` omega of the ended task.
        weights: ``(P,)`` theta at its end.
        anchor: ``(P,)`` theta* at its start.
        damping: xi, above 0.
    """
    return importance + path.clamp(min=0) / ((weights - anchor).square() + damping)


def agem_projection(gradient: Tensor, reference: Tensor) -> Tensor:
    r"""Return the gradient without the component that increases the loss on the memory.

    .. math:: \tilde g = g - \frac{g^\top r}{r^\top r} r \quad \text{if } g^\top r < 0, \text{ else } g

    Chaudhry, Ranzato, Rohrbach and Elhoseiny, "Efficient Lifelong Learning with A-GEM", ICLR 2019, arXiv 1812.00420,
    equation 11.

    Args:
        gradient: ``(P,)`` g, floating.
        reference: ``(P,)`` r, gradient of the loss on the memory; zeros without a memory.

    Returns:
        ``(P,)``.
    """
    product = gradient @ reference
    # torch.where in place of a branch, for which the host would wait. With r = 0 the product is 0.
    factor = torch.where(product < 0, product / (reference @ reference), torch.zeros_like(product))
    return gradient - factor * reference


def gem_projection(gradient: Tensor, references: Tensor, margin: float = 0.0, ridge: float = 1e-3) -> Tensor:
    r"""Return the nearest gradient that increases the loss on no earlier task.

    .. math:: \tilde g = g + G^\top v, \quad
        v = \arg\min_{v \ge m} \tfrac12 v^\top (G G^\top + \epsilon I) v + (G g)^\top v

    if some product in ``G g`` is negative, else g. Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual
    Learning", NeurIPS 2017, arXiv 1706.08840, equations 11 and 12, with the ridge of the paper's program. With
    ``v = m + u`` and the matrix's Cholesky factor it is a least-squares problem over ``u >= 0``, solved by SciPy.

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
