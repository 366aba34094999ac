"""Binds a worker to cores, and sets its number of threads."""

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
from dcl_lightning.errors import ConfigurationError

__all__ = ["BINDINGS", "bind_worker", "check_binding", "divide_cores", "numa_nodes"]

BINDINGS = ("none", "core", "numa")
_SYSTEM = Path("/sys/devices/system")


def check_binding(bind: str) -> None:
    """Refuse an unknown way.

    Args:
        bind: name of the way.

    Raises:
        ConfigurationError: it is none of ``none``, ``core`` and ``numa``.
    """
    if bind not in BINDINGS:
        raise ConfigurationError(f"bind={bind!r}: give {', '.join(BINDINGS[:-1])} or {BINDINGS[-1]}")


def bind_worker(bind: str, comm: Comm) -> int:
    """Bind this worker to its cores and return how many threads it may use there.

    A launcher that has given each worker cores of its own, as ``mpirun`` does, has decided: they are kept.
    Where the system cannot bind, nothing is bound.

    Args:
        bind: ``none``; ``core``: each worker its share of the host's cores; ``numa``: each worker the cores
            of one NUMA node, or of several where there are more nodes than workers.
        comm: all workers.
    """
    mine = _own_cores()
    host = zlib.crc32(socket.gethostname().encode())
    rows = [row.tolist() for row in comm.allgather(torch.tensor([host, *sorted(mine)]))]
    masks = [set(row[1:]) for row in rows if row[0] == host]
    if bind != "none" and hasattr(os, "sched_setaffinity"):
        if any(mask != mine for mask in masks):
            rank_zero_info(f"horovod: bind={bind} is left out, the launcher has bound the workers already")
        else:
            masks = divide_cores(bind, mine, len(masks), numa_nodes())
            mine = masks[sum(row[0] == host for row in rows[: comm.rank])]
            _bind_all_threads(mine)
    sharing = sum(bool(mask & mine) for mask in masks)
    return max(1, len(mine) // max(1, sharing))


def divide_cores(bind: str, cores: set[int], workers: int, nodes: Sequence[set[int]]) -> list[set[int]]:
    """Return the cores of each of a host's workers; never none.

    Args:
        bind: ``core`` or ``numa``.
        cores: those that may be used.
        workers: number of workers on the host.
        nodes: the cores of each NUMA node; none if unknown.
    """
    if bind == "core":
        # Neighbours in this order share caches, so a share of them is close together.
        units = [{core} for core in sorted(cores, key=_location)]
    else:
        units = [node & cores for node in nodes if node & cores] or [cores]
    count = len(units)
    if workers >= count:
        return [units[k * count // workers] for k in range(workers)]
    return [set().union(*units[k * count // workers : (k + 1) * count // workers]) for k in range(workers)]


def numa_nodes(system: Path = _SYSTEM) -> list[set[int]]:
    """Return the cores of each NUMA node; an empty list where the system does not tell.

    Args:
        system: folder of the system's devices.
    """
    folders = sorted(system.glob("node/node[0-9]*"), key=lambda folder: int(folder.name.removeprefix("node")))
    with contextlib.suppress(OSError, ValueError):
        return [_parse_cores((folder / "cpulist").read_text()) for folder in folders]
    return []


def _parse_cores(text: str) -> set[int]:
    """Return the numbers of a list as ``0-3,8``."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
    return cores


def _location(core: int, system: Path = _SYSTEM) -> tuple[int, int, int]:
    """Return package, physical core and number of a core: hyperthreads of one core become neighbours."""
    folder = system / f"cpu/cpu{core}/topology"
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text()), core
    return 0, core, core


def _own_cores() -> set[int]:
    affinity = getattr(os, "sched_getaffinity", None)
    return set(affinity(0)) if affinity else set(range(os.cpu_count() or 1))


def _bind_all_threads(cores: set[int]) -> None:
    """Bind every thread there is; those that they start, and processes, inherit it."""
    try:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        threads = [0]
    for thread in threads:
        # A thread may have ended, and a container may forbid it.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(thread, cores)
