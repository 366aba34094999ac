"""The rank of this process, from its launcher's environment variables; imports neither Lightning nor Horovod."""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["launched_by_horovod", "mpi_runs", "place", "running_horovod", "set_rank_from_environment", "worker_threads"]

_NAMES = {
    "rank": ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"),
    "size": ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"),
    "local_rank": ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "local_size": ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "cross_rank": ("HOROVOD_CROSS_RANK",),
    "cross_size": ("HOROVOD_CROSS_SIZE",),
}


def launched_by_horovod() -> bool:
    """Return whether ``horovodrun``, ``mpirun`` or our own launcher started this process."""
    return any(name in os.environ for name in _NAMES["rank"])


def running_horovod() -> Any:
    """Return ``horovod.torch`` if it is imported and runs, else None."""
    hvd = sys.modules.get("horovod.torch")
    return hvd if hvd is not None and hvd.is_initialized() else None


def mpi_runs() -> bool:
    """Return whether Horovod runs in this process and uses MPI, which does not allow processes to be forked."""
    hvd = running_horovod()
    return hvd is not None and bool(hvd.mpi_enabled())


def place(what: str) -> int:
    """Return one number of this worker's place: Horovod's own once it runs, the launcher's before.

    Args:
        what: ``rank``, ``size``, ``local_rank``, ``local_size``, or ``cross_rank`` and ``cross_size``,
            the number of this host and of all hosts.
    """
    hvd = running_horovod()
    if hvd is not None:
        return int(getattr(hvd, what)())
    for name in _NAMES[what]:
        if name in os.environ:
            return int(os.environ[name])
    # Open MPI does not tell the host's number: exact for equally filled hosts, until Horovod runs.
    if what == "cross_rank":
        return place("rank") // place("local_size") if place("size") > place("local_size") else 0
    if what == "cross_size":
        return -(-place("size") // place("local_size"))
    return 1 if what.endswith("size") else 0


def set_rank_from_environment() -> None:
    """Let Lightning's rank-zero helpers know this worker's rank, also before Horovod runs."""
    if not launched_by_horovod():
        return
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from lightning_utilities.core.rank_zero import rank_zero_only as shared_rank_zero_only

    rank_zero_only.rank = shared_rank_zero_only.rank = place("rank")  # type: ignore[attr-defined]


def worker_threads(local_workers: int) -> int:
    """Return how many threads a worker may use: the cores of its affinity mask, shared fairly.

    Args:
        local_workers: number of workers on this host.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // max(1, local_workers))
