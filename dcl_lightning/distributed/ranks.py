"""Rank and world size of this process: Horovod's own once it runs, before that from the launcher's environment."""

from __future__ import annotations

import os
import sys
from types import ModuleType

__all__ = [
    "available_cores", "host_rank", "launched_by_horovod", "local_rank", "local_size", "mpi_runs", "num_hosts", "rank",
    "running_horovod", "set_rank_from_environment", "worker_threads", "world_size",
]  # fmt: skip

_VARIABLES = {
    "rank": ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"),
    "size": ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"),
    "local_rank": ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "local_size": ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "cross_rank": ("HOROVOD_CROSS_RANK",),
    "cross_size": ("HOROVOD_CROSS_SIZE",),
}


def launched_by_horovod() -> bool:
    """Return whether ``horovodrun``, ``mpirun`` or the local launcher started this process."""
    return any(name in os.environ for name in _VARIABLES["rank"])


def running_horovod() -> ModuleType | None:
    """Return ``horovod.torch`` if it is imported and initialized, else None."""
    hvd = sys.modules.get("horovod.torch")
    return hvd if hvd is not None and hvd.is_initialized() else None


def mpi_runs() -> bool:
    """Return whether Horovod runs in this process over MPI, which does not allow the process to fork."""
    hvd = running_horovod()
    return hvd is not None and bool(hvd.mpi_enabled())


def rank() -> int:
    """Return the 0-based rank of this worker."""
    return _number("rank", 0)


def world_size() -> int:
    """Return the number of workers."""
    return _number("size", 1)


def local_rank() -> int:
    """Return the 0-based rank of this worker on its host."""
    return _number("local_rank", 0)


def local_size() -> int:
    """Return the number of workers on this host."""
    return _number("local_size", 1)


def host_rank() -> int:
    """Return the 0-based rank of this host; under Open MPI exact only for equally filled hosts until Horovod runs."""
    return _number("cross_rank", rank() // local_size() if world_size() > local_size() else 0)


def num_hosts() -> int:
    """Return the number of hosts."""
    return _number("cross_size", -(-world_size() // local_size()))


def _number(name: str, default: int) -> int:
    hvd = running_horovod()
    if hvd is not None:
        return int(getattr(hvd, name)())
    return next((int(os.environ[variable]) for variable in _VARIABLES[name] if variable in os.environ), default)


def set_rank_from_environment() -> None:
    """Set the rank of Lightning's rank-zero helpers, also before Horovod runs."""
    if not launched_by_horovod():
        return
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from lightning_utilities.core.rank_zero import rank_zero_only as shared_rank_zero_only

    # Both libraries keep the rank as an undeclared attribute of this function.
    rank_zero_only.rank = shared_rank_zero_only.rank = rank()  # type: ignore[attr-defined]


def available_cores() -> set[int]:
    """Return the CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def worker_threads(local_workers: int) -> int:
    """Return how many threads a worker may use if the workers of this host share its available cores evenly.

    Args:
        local_workers: number of workers on this host.
    """
    return max(1, len(available_cores()) // max(1, local_workers))
