"""Warns of loader processes that are forked although MPI or CUDA has started."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from dcl_lightning.distributed.ranks import mpi_runs

__all__ = ["fork_hazard", "warn_of_fork"]


def fork_hazard(loader: Any) -> str:
    """Return in words why this loader's worker processes should not be forked, or nothing.

    Args:
        loader: any loader; those without worker processes, or that start them otherwise, are safe.
    """
    if not getattr(loader, "num_workers", 0):
        return ""
    context = getattr(loader, "multiprocessing_context", None)
    if (context or multiprocessing).get_start_method() != "fork":
        return ""
    if mpi_runs():
        return "MPI runs in this process, and MPI does not allow processes to be forked: they may hang or crash"
    if torch.cuda.is_initialized():
        return "CUDA runs in this process, and does not work in forked ones: they must not touch it"
    return ""


def warn_of_fork(loader: Any) -> None:
    """Warn, on worker 0, of worker processes that should not be forked.

    Args:
        loader: any loader.
    """
    hazard = fork_hazard(loader)
    if hazard:
        rank_zero_warn(
            f"a loader forks {loader.num_workers} worker processes. {hazard}. "
            "Give the DataLoader multiprocessing_context='forkserver'"
        )
