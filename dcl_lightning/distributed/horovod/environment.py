"""Horovod's cluster in the form that Lightning asks for."""

from __future__ import annotations

from lightning.fabric.plugins import ClusterEnvironment

from dcl_lightning.distributed import ranks
from dcl_lightning.distributed.ranks import launched_by_horovod, set_rank_from_environment

__all__ = ["HorovodEnvironment", "launched_by_horovod", "set_rank_from_environment"]


class HorovodEnvironment(ClusterEnvironment):
    """The cluster as Horovod, or before it runs its launchers, describe it."""

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
        return ranks.world_size()

    def set_world_size(self, size: int) -> None:
        """Ignore: the launcher decides."""

    def global_rank(self) -> int:
        """Return the 0-based number of this worker."""
        return ranks.rank()

    def set_global_rank(self, rank: int) -> None:
        """Ignore: the launcher decides."""

    def local_rank(self) -> int:
        """Return the 0-based number of this worker on its host."""
        return ranks.local_rank()

    def local_size(self) -> int:
        """Return the number of workers on this host."""
        return ranks.local_size()

    def node_rank(self) -> int:
        """Return the 0-based number of this host."""
        return ranks.host_rank()

    def num_nodes(self) -> int:
        """Return the number of hosts."""
        return ranks.num_hosts()
