"""SLURM's own daemons on hosts of ``tests.distributed.hosts``: a controller on the first, one node on each."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.hosts import ADMIN, NETWORK, Host

DAEMONS = ("munged", "slurmctld", "slurmd")
missing = [name for name in DAEMONS if shutil.which(name, path=ADMIN["PATH"]) is None]
needs_slurm = pytest.mark.skipif(bool(missing), reason="no SLURM here: `apt-get install slurm-wlm munge`")

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
KillWait=30
# A job that is requeued starts again at once, not after two minutes.
SchedulerParameters=sched_interval=2,bf_interval=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """What a user of the cluster does, logged in on its first host.

    Args:
        hosts: the nodes.
        folder: for configuration, logs and state.
    """

    def __init__(self, hosts: Sequence[Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder

    def call(self, command: str, cwd: Path | None = None) -> str:
        """Run a command of SLURM's and return what it prints."""
        done = self.hosts[0].run(f"export SLURM_CONF={self.folder}/slurm.conf; {command}", cwd or self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def submit(self, script: Path, cwd: Path, options: str = "") -> str:
        """Submit a batch script; return the number of the job."""
        return self.call(f"sbatch --parsable --open-mode=append --output={cwd}/said-%j {options} {script}", cwd)

    def state(self, job: str) -> str:
        """Return a job's state in SLURM's word, such as ``RUNNING``."""
        fields = dict(word.partition("=")[::2] for word in self.call(f"scontrol show job {job}").split())
        return fields["JobState"]

    def wait_for(self, job: str, *states: str, seconds: float = 300) -> str:
        """Wait until a job has one of some states, and return it."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, f"job {job} is {state}"
            time.sleep(0.5)
        return state


@contextmanager
def cluster_of(hosts: Sequence[Host], folder: Path) -> Iterator[Cluster]:
    """Start the daemons; they end with the hosts.

    Args:
        hosts: the nodes.
        folder: an empty one.
    """
    (folder / "state").mkdir()
    nodes = [f"NodeName={host.name} NodeAddr={NETWORK}.{host.number} CPUs=2 RealMemory=1000" for host in hosts]
    text = CONFIGURATION.format(first=f"{hosts[0].name}({NETWORK}.{hosts[0].number})", folder=folder)
    head, _, partition = text.strip().rpartition("\n")
    (folder / "slurm.conf").write_text("\n".join([head, *nodes, partition, ""]))
    (folder / "munge.key").write_bytes(bytes(range(256)) * 4)
    (folder / "munge.key").chmod(0o600)
    cluster = Cluster(hosts, folder)
    munge = (
        f"mkdir -m 755 /run/munge; munged --force --key-file {folder}/munge.key --log-file {folder}/munged.$(hostname)"
    )
    munge += " --seed-file /run/munge/seed"
    with (folder / "daemons.log").open("a") as log:
        for host in hosts:
            first = f"slurmctld -f {folder}/slurm.conf; " if host is hosts[0] else ""
            node = f"mkdir -p {folder}/spool.{host.name}; slurmd -f {folder}/slurm.conf -N {host.name}"
            host.popen(f"{munge}; {first}{node}", cwd=folder, stdout=log, stderr=log).wait(timeout=60)
    end = time.monotonic() + 60
    while cluster.call("sinfo --noheader --format %T%D") != f"idle{len(hosts)}":
        assert time.monotonic() < end, cluster.call("sinfo -N -l") + (folder / "daemons.log").read_text()
        time.sleep(0.5)
    yield cluster
