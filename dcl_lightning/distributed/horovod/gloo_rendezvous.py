"""Workers of this machine: where they meet, what tells each its place, and their common end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dcl_lightning.distributed.horovod.rendezvous import RendezvousServer

__all__ = ["open_rendezvous", "started_workers"]


def open_rendezvous(num_workers: int, threads: int) -> tuple[RendezvousServer, list[dict[str, str]]]:
    """Start the server at which workers of this machine meet.

    Args:
        num_workers: number of workers.
        threads: threads of each, unless OMP_NUM_THREADS says otherwise.

    Returns:
        The server, which is to be stopped, and the environment variables of each worker, by rank.
    """
    server = RendezvousServer()
    common = {
        **server.variables,
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_SIZE": str(num_workers),
        "HOROVOD_LOCAL_SIZE": str(num_workers),
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONUNBUFFERED": "1",
    }
    return server, [
        {**common, "HOROVOD_RANK": str(rank), "HOROVOD_LOCAL_RANK": str(rank)} for rank in range(num_workers)
    ]


@contextmanager
def started_workers(
    num_workers: int, threads: int, start: Callable[[int, dict[str, str]], subprocess.Popen[Any]]
) -> Iterator[list[subprocess.Popen[Any]]]:
    """Start workers of this machine; whatever happens within the block, none outlives it.

    Args:
        num_workers: number of workers.
        threads: threads of each, unless OMP_NUM_THREADS says otherwise.
        start: starts one, given its rank and the environment variables that tell it its place.

    Yields:
        Their processes, by rank.
    """
    server, places = open_rendezvous(num_workers, threads)
    workers: list[subprocess.Popen[Any]] = []
    try:
        for rank, variables in enumerate(places):
            workers.append(start(rank, variables))
        yield workers
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        server.stop()
