"""NVTX ranges of the memory's work."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["stage"]


def stage(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context whose work stands as ``rehearsal.<name>`` in a profile of Nsight Systems (an NVTX range).

    Args:
        name: of the stage: ``insert``, ``draw``, ``exchange``, ``move`` or ``join``.
        device: the worker's; on any but a GPU there is no range.
    """
    return torch.cuda.nvtx.range(f"rehearsal.{name}") if device.type == "cuda" else nullcontext()
