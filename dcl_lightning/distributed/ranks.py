"""The rank of this process, from its launcher's environment variables; imports neither Lightning nor Horovod."""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = [
    "host_rank", "launched_by_horovod", "local_rank", "local_size", "mpi_runs", "num_hosts", "rank", "running_horovod",
    "set_rank_from_environment", "worker_threads", "world_size",
]  # fmt: skip

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


def rank() -> int:
    """Return the 0-based number of this worker: Horovod's own once it runs, the launcher's before."""
    return _number("rank", 0)


def world_size() -> int:
    """Return the number of workers."""
    return _number("size", 1)


def local_rank() -> int:
    """Return the 0-based number of this worker on its host."""
    return _number("local_rank", 0)


def local_size() -> int:
    """Return the number of workers on this host."""
    return _number("local_size", 1)


def host_rank() -> int:
    """Return the 0-based number of this host."""
    # Open MPI does not tell it: exact for equally filled hosts, until Horovod runs.
    return _number("cross_rank", rank() // local_size() if world_size() > local_size() else 0)


def num_hosts() -> int:
    """Return the number of hosts."""
    return _number("cross_size", -(-world_size() // local_size()))


def _number(name: str, default: int) -> int:
    hvd = running_horovod()
    if hvd is not None:
        return int(getattr(hvd, name)())
    return next((int(os.environ[variable]) for variable in _NAMES[name] if variable in os.environ), default)


def set_rank_from_environment() -> None:
    """Let Lightning's rank-zero helpers know this worker's rank, also before Horovod runs."""
    if not launched_by_horovod():
        return
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from lightning_utilities.core.rank_zero import rank_zero_only as shared_rank_zero_only

    # Functions, whose attribute the libraries set themselves and declare nowhere.
    rank_zero_only.rank = shared_rank_zero_only.rank = rank()  # type: ignore[attr-defined]


def worker_threads(local_workers: int) -> int:
    """Return how many threads a worker may use: the cores of its affinity mask, shared fairly.

    Args:
        local_workers: number of workers on this host.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // max(1, local_workers))
