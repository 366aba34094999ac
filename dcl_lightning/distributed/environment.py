"""Who this worker is: from Horovod once it runs, before that from what the launcher set."""

from __future__ import annotations

import os

from lightning.fabric.plugins import ClusterEnvironment

__all__ = ["HorovodEnvironment", "launched_by_horovod", "set_rank_from_environment"]

_NAMES = {
    "rank": ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"),
    "size": ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"),
    "local_rank": ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "local_size": ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "cross_rank": ("HOROVOD_CROSS_RANK", "OMPI_COMM_WORLD_NODE_RANK"),
    "cross_size": ("HOROVOD_CROSS_SIZE",),
}


def launched_by_horovod() -> bool:
    """Return whether ``horovodrun``, ``mpirun`` or our own launcher started this process."""
    return any(name in os.environ for name in _NAMES["rank"])


def set_rank_from_environment() -> None:
    """Let Lightning's rank-zero helpers know this worker's rank before Horovod runs."""
    if not launched_by_horovod():
        return
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from lightning_utilities.core.rank_zero import rank_zero_only as shared_rank_zero_only

    rank_zero_only.rank = shared_rank_zero_only.rank = _read("rank")  # type: ignore[attr-defined]


def _read(what: str) -> int:
    default = 1 if what.endswith("size") else 0
    values = (os.environ.get(name) for name in _NAMES[what])
    return next((int(value) for value in values if value is not None), default)


class HorovodEnvironment(ClusterEnvironment):
    """The cluster as Horovod's launchers describe it; Lightning does not know their variables."""

    @property
    def creates_processes_externally(self) -> bool:
        """Always: either a launcher has started this process, or ours starts the others."""
        return True

    @property
    def main_address(self) -> str:
        """Unused: Horovod has its own rendezvous."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Unused, see ``main_address``."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Return whether a launcher has started this process."""
        return launched_by_horovod()

    def world_size(self) -> int:
        """Return the number of workers."""
        return _read("size")

    def set_world_size(self, size: int) -> None:
        """Ignore: the launcher decides."""

    def global_rank(self) -> int:
        """Return the 0-based number of this worker."""
        return _read("rank")

    def set_global_rank(self, rank: int) -> None:
        """Ignore: the launcher decides."""

    def local_rank(self) -> int:
        """Return the 0-based number of this worker on its host."""
        return _read("local_rank")

    def local_size(self) -> int:
        """Return the number of workers on this host."""
        return _read("local_size")

    def node_rank(self) -> int:
        """Return the 0-based number of this host."""
        return _read("cross_rank")

    def num_nodes(self) -> int:
        """Return the number of hosts."""
        return _read("cross_size")
