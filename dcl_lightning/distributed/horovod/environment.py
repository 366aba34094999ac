"""Horovod's cluster as a Lightning ``ClusterEnvironment``, also inside a SLURM allocation."""

from __future__ import annotations

import os
import signal

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from dcl_lightning.distributed import ranks
from dcl_lightning.distributed.ranks import launched_by_horovod
from dcl_lightning.errors import ConfigurationError

__all__ = ["HorovodEnvironment", "HorovodSLURMEnvironment", "check_srun", "horovod_environment"]


class HorovodEnvironment(ClusterEnvironment):
    """The cluster as described by Horovod, or by its launcher's variables before Horovod runs."""

    @property
    def creates_processes_externally(self) -> bool:
        """Always True: an external launcher started this process, or the strategy's launcher starts the others."""
        return True

    @property
    def main_address(self) -> str:
        """Unused: Horovod has its own rendezvous."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Unused: Horovod has its own rendezvous."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Return whether a launcher started this process."""
        return launched_by_horovod()

    def world_size(self) -> int:
        """Return the number of workers."""
        return ranks.world_size()

    def set_world_size(self, size: int) -> None:
        """Do nothing: the launcher decides."""

    def global_rank(self) -> int:
        """Return the 0-based rank of this worker."""
        return ranks.rank()

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the launcher decides."""

    def local_rank(self) -> int:
        """Return the 0-based rank of this worker on its host."""
        return ranks.local_rank()

    def local_size(self) -> int:
        """Return the number of workers on this host."""
        return ranks.local_size()

    def node_rank(self) -> int:
        """Return the 0-based rank of this host."""
        return ranks.host_rank()

    def num_nodes(self) -> int:
        """Return the number of hosts."""
        return ranks.num_hosts()


class HorovodSLURMEnvironment(HorovodEnvironment, SLURMEnvironment):
    """Takes the ranks from Horovod; being a ``SLURMEnvironment``, it lets Lightning save and requeue the job.

    SLURM's number of tasks is not compared with ``devices``: it counts what ``srun`` would start, which may differ from
    the workers that ``horovodrun`` or ``mpirun`` start within the allocation.

    Args:
        auto_requeue: whether Lightning saves and requeues the job when SLURM sends ``requeue_signal``.
        requeue_signal: the signal of ``sbatch --signal``; SIGUSR1 if None.
    """

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        # Not SLURMEnvironment's constructor, which refuses allocations of several tasks without --ntasks-per-node.
        ClusterEnvironment.__init__(self)
        self.auto_requeue = auto_requeue
        self.requeue_signal = requeue_signal or signal.SIGUSR1

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Accept any numbers: the launcher has decided."""


def horovod_environment() -> HorovodEnvironment:
    """Return the environment that fits this process: SLURM's in a batch job."""
    # As SLURMEnvironment.detect, by which Lightning decides at resume, but without its advice to use srun.
    batch = "SLURM_NTASKS" in os.environ and SLURMEnvironment.job_name() not in ("bash", "interactive")
    return HorovodSLURMEnvironment() if batch else HorovodEnvironment()


def check_srun() -> None:
    """Refuse to run as one of several unconnected tasks of ``srun``.

    Raises:
        ConfigurationError: ``srun`` has started several tasks without one of Horovod's launchers.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and not launched_by_horovod():
        raise ConfigurationError(
            f"srun started {tasks} tasks, and with strategy=horovod each of them would train alone: start the job with "
            "horovodrun or mpirun in the batch script, without srun"
        )
