"""Penalties on changing weights that mattered to earlier tasks, and the importance of each weight."""

from __future__ import annotations

from torch import Tensor

__all__ = ["merged_fisher", "quadratic_penalty", "quadratic_penalty_gradient", "si_importance", "si_path"]


def quadratic_penalty(weights: Tensor, anchor: Tensor, importance: Tensor) -> Tensor:
    r"""Return :math:`\sum_k \Omega_k (\theta_k - \theta^*_k)^2`, 0-dim.

    Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796,
    equation 3, which has it times lambda / 2; Zenke, Poole and Ganguli, "Continual Learning Through Synaptic
    Intelligence", ICML 2017, arXiv 1703.04200, equation 4, times c.

    Args:
        weights: ``(P,)`` theta.
        anchor: ``(P,)`` theta*, the weights at the end of the task before.
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
        fisher: ``(P,)`` F, of the tasks before.
        of_task: ``(P,)`` F_t, the mean square of the gradients of single samples' log-likelihoods.
        decay: gamma, in [0, 1].
    """
    return decay * fisher + of_task


def si_path(path: Tensor, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
    r"""Return the path integral after one more step: :math:`\omega_k - g_k \Delta\theta_k`.

    Zenke et al. 2017, section 3: the part of the fall of the loss that weight k is to thank for.

    Args:
        path: ``(P,)`` omega.
        gradient: ``(P,)`` g, of the loss without the penalty.
        before: ``(P,)`` weights before the step.
        after: ``(P,)`` weights after it.
    """
    return path - gradient * (after - before)


def si_importance(importance: Tensor, path: Tensor, weights: Tensor, anchor: Tensor, damping: float) -> Tensor:
    r"""Return :math:`\Omega_k + \max(\omega_k, 0) / ((\theta_k - \theta^*_k)^2 + \xi)`.

    Zenke et al. 2017, equation 5. A negative path, of a weight that moved against its gradient, counts as 0 as in
    the paper's program, so that the penalty stays one.

    Args:
        importance: ``(P,)`` Omega of the tasks before.
        path: ``(P,)`` omega of the ended task.
        weights: ``(P,)`` theta at its end.
        anchor: ``(P,)`` theta* at its start.
        damping: xi, above 0.
    """
    return importance + path.clamp(min=0) / ((weights - anchor).square() + damping)
