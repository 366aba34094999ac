"""Workers of this machine: where they meet, what tells each its place, and their common end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["open_rendezvous", "started_workers"]


def open_rendezvous(num_workers: int, threads: int) -> tuple[Any, list[dict[str, str]]]:
    """Start the server at which workers of this machine meet.

    Args:
        num_workers: number of workers.
        threads: threads of each, unless OMP_NUM_THREADS says otherwise.

    Returns:
        The server, which is to be stopped, and the environment variables of each worker, by rank.
    """
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer(verbose=0)
    port = server.start(_handler())
    slots = get_host_assignments(parse_hosts(f"localhost:{num_workers}"), num_workers)
    server.init(slots)
    return server, [_variables(slot, port, threads) for slot in slots]


def _handler() -> type[Any]:
    """Return Horovod's handler of requests, mended.

    Its own forgets, when one group of workers has met, how far all others have come. So addresses stay where they
    should be cleared, and workers that meet again, as after a failure, may call at ports that are closed.
    """
    from horovod.runner.http.http_server import RendezvousHandler

    class Handler(RendezvousHandler):
        def do_DELETE(self) -> None:
            scope, key = self.path.split("/")[1:3]
            server = self.server
            if scope not in server.scope_size:
                super().do_DELETE()
                return
            with server.finished_list_lock:
                server.finished_list[scope].append(key)
                if len(server.finished_list[scope]) == server.scope_size[scope]:
                    with server.cache_lock:
                        server.cache.get(scope, {}).clear()
                    del server.finished_list[scope]
            self.send_status_code(200)

    return Handler


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


def _variables(slot: Any, port: int, threads: int) -> dict[str, str]:
    values = {
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_RANK": slot.rank,
        "HOROVOD_SIZE": slot.size,
        "HOROVOD_LOCAL_RANK": slot.local_rank,
        "HOROVOD_LOCAL_SIZE": slot.local_size,
        "HOROVOD_CROSS_RANK": slot.cross_rank,
        "HOROVOD_CROSS_SIZE": slot.cross_size,
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "PYTHONUNBUFFERED": 1,
    }
    return {name: str(value) for name, value in values.items()}
