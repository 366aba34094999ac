"""Binds each worker of a host to its share of the CPU cores, and derives its number of threads."""

from __future__ import annotations

import contextlib
import os
import socket
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info

from dcl_lightning.comm import Comm
from dcl_lightning.distributed.ranks import available_cores

__all__ = ["bind_worker", "divide_cores", "numa_nodes"]

_SYSTEM = Path("/sys/devices/system")


def bind_worker(bind: str, comm: Comm) -> int:
    """Bind this worker to its cores, and return the number of threads that it may use.

    If the launcher has already bound the workers to different cores, as ``mpirun`` does, that binding stays. Nothing
    is bound where the operating system cannot.

    Args:
        bind: ``none``; ``core``: each worker gets its share of the host's cores; ``numa``: each worker gets the cores
            of one NUMA node, or of several if the host has more nodes than workers.
        comm: the cluster; every worker calls this.
    """
    mine = available_cores()
    host = zlib.crc32(socket.gethostname().encode())
    rows = [row.tolist() for row in comm.allgather(torch.tensor([host, *sorted(mine)]))]
    masks = [set(row[1:]) for row in rows if row[0] == host]
    if bind != "none" and hasattr(os, "sched_setaffinity"):
        if any(mask != mine for mask in masks):
            rank_zero_info(f"horovod: bind={bind} is ignored, because the launcher has already bound the workers")
        else:
            masks = divide_cores(bind, mine, len(masks), numa_nodes())
            mine = masks[sum(row[0] == host for row in rows[: comm.rank])]
            _bind_all_threads(mine)
    sharing = sum(bool(mask & mine) for mask in masks)
    return max(1, len(mine) // max(1, sharing))


def divide_cores(bind: str, cores: set[int], workers: int, nodes: Sequence[set[int]]) -> list[set[int]]:
    """Return the cores of each worker of a host, at least one each.

    Args:
        bind: ``core`` or ``numa``.
        cores: the available ones.
        workers: number of workers on the host.
        nodes: the cores of each NUMA node; empty if unknown.
    """
    if bind == "core":
        # Neighbors in this order share caches.
        units = [{core} for core in sorted(cores, key=_location)]
    else:
        units = [node & cores for node in nodes if node & cores] or [cores]
    count = len(units)
    if workers >= count:
        return [units[k * count // workers] for k in range(workers)]
    return [set().union(*units[k * count // workers : (k + 1) * count // workers]) for k in range(workers)]


def numa_nodes(system: Path = _SYSTEM) -> list[set[int]]:
    """Return the cores of each NUMA node, read from the ``system`` folder; an empty list if it does not list them."""
    folders = sorted(system.glob("node/node[0-9]*"), key=lambda folder: int(folder.name.removeprefix("node")))
    with contextlib.suppress(OSError, ValueError):
        return [_parse_cores((folder / "cpulist").read_text()) for folder in folders]
    return []


def _parse_cores(text: str) -> set[int]:
    """Parse a list of cores such as ``0-3,8``."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
    return cores


def _location(core: int, system: Path = _SYSTEM) -> tuple[int, int, int]:
    """Return a sort key (package, physical core, core) by which hyperthreads of one core are neighbors."""
    folder = system / f"cpu/cpu{core}/topology"
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text()), core
    return 0, core, core


def _bind_all_threads(cores: set[int]) -> None:
    """Bind all threads of this process; threads and processes started later inherit the mask."""
    try:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        threads = [0]
    for thread in threads:
        # A thread may have ended meanwhile, and a container may forbid binding.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(thread, cores)
