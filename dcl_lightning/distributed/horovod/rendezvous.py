"""The key-value server at which a job's workers meet, and the messages that they exchange there without Horovod."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, TypeVar, cast

from dcl_lightning.errors import WorkerError

__all__ = ["Rendezvous", "RendezvousServer", "open_rendezvous", "started_workers", "wait_for_workers"]

Process = TypeVar("Process", bound="subprocess.Popen[Any]")
_SCOPE = "dcl_lightning"
_ANSWER_S = 5.0
_ADDRESS, _PORT = "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"


class RendezvousServer:
    """The key-value server at which the Gloo workers of one machine meet, in place of Horovod's own.

    Horovod's server listens on every network address and answers any client. This one listens on 127.0.0.1, and every
    request must begin with the job's secret, which the workers find in their environment. It also deletes a worker's
    address once that worker has met the others, so workers that meet again never connect to closed ports.

    Args:
        address: at which it listens.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._server = _Server((address, 0), _Handler)
        threading.Thread(target=self._server.serve_forever, name="rendezvous", daemon=True).start()

    @property
    def port(self) -> int:
        """Its port."""
        return int(self._server.server_address[1])

    @property
    def root(self) -> str:
        """The prefix of its paths, with the secret."""
        return f"/{self._server.root}"

    def put(self, key: str, value: object) -> None:
        """Store a value, as ``Rendezvous.put`` does from elsewhere."""
        self._server.values[f"{_SCOPE}/{key}"] = json.dumps(value).encode()

    def get(self, key: str) -> Any:
        """Return a value, or None, as ``Rendezvous.get`` does from elsewhere."""
        body = self._server.values.get(f"{_SCOPE}/{key}")
        return None if body is None else json.loads(body)

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables by which Horovod and ``Rendezvous.of_job`` find the server."""
        port = self.port
        # Horovod requests http://ADDRESS:PORT/scope/key, so that what follows the slash becomes the start of the path.
        return {_ADDRESS: f"127.0.0.1:{port}/{self._server.secret}", _PORT: str(port)}

    def stop(self) -> None:
        """Close the server."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128  # all workers call at once

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.secret = secrets.token_hex(16)
        self.root = f"{self.secret}:{self.server_address[1]}"
        self.values: dict[str, bytes] = {}  # single operations on a dict are atomic

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: a client that hangs up during a request is no failure of this job."""


class _Handler(BaseHTTPRequestHandler):
    timeout = 10

    def do_GET(self) -> None:
        if key := self._key():
            value = self._values.get(key)
            self._answer(404 if value is None else 200, value or b"")

    def do_PUT(self) -> None:
        if key := self._key():
            self._values[key] = self.rfile.read(int(self.headers["Content-Length"] or 0))
            self._answer(200)

    def do_DELETE(self) -> None:
        if key := self._key():
            self._values.pop(key, None)
            self._answer(200)

    @property
    def _values(self) -> dict[str, bytes]:
        return cast(_Server, self.server).values

    def _key(self) -> str:
        """Return the requested scope and key; refuse requests without the secret, and other paths."""
        root, _, key = self.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(root.encode(), cast(_Server, self.server).root.encode()):
            self._answer(403)
        elif key.count("/") != 1:
            self._answer(400)
        else:
            return key
        return ""

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


class Rendezvous:
    """A worker's access to the key-value server at which Horovod's Gloo workers meet; MPI has none.

    Keys consist of letters, digits and dots; values are what JSON can hold. Methods raise ``OSError`` if the server
    does not answer.

    Args:
        host: address of the server.
        port: port of the server.
        root: prefix of its paths.
    """

    def __init__(self, host: str, port: int, root: str = "") -> None:
        self.host, self.port, self.root = host, port, root

    @classmethod
    def of_job(cls) -> Rendezvous | None:
        """Return the server that the launcher named in the environment, or None."""
        address, port = os.environ.get(_ADDRESS), os.environ.get(_PORT)
        if not address or not port or not port.isdigit():
            return None
        # Joined and split as Horovod does it.
        server, slash, root = f"{address}:{port}".partition("/")
        return cls(server.partition(":")[0], int(port), slash + root)

    def put(self, key: str, value: object) -> None:
        """Store a value for all workers."""
        self._request("PUT", key, json.dumps(value).encode())

    def get(self, key: str) -> Any:
        """Return a value, or None if no worker has stored it."""
        body = self._request("GET", key)
        return None if body is None else json.loads(body)

    def _request(self, method: str, key: str, body: bytes | None = None) -> bytes | None:
        # Not urllib, which would send the request through a proxy named in the environment.
        connection = HTTPConnection(self.host, self.port, timeout=_ANSWER_S)
        try:
            connection.request(method, f"{self.root}/{_SCOPE}/{key}", body)
            answer = connection.getresponse()
            return answer.read() if answer.status == 200 else None
        except HTTPException as error:
            raise ConnectionError(f"the rendezvous at {self.host}:{self.port} gave no answer") from error
        finally:
            connection.close()


def wait_for_workers(
    meeting: Rendezvous, rank: int, size: int, timeout: float, failed: Callable[[], list[int]] = list
) -> None:
    """Return once all workers have arrived; Horovod itself would abort the process if one does not.

    Worker 0 asks for each of the others, and these ask only for worker 0's answer, which keeps the requests few.

    Args:
        meeting: the job's rendezvous.
        rank: 0-based rank of this worker.
        size: number of workers.
        timeout: seconds to wait.
        failed: returns the workers that have ended already, where that is known.

    Raises:
        WorkerError: workers did not arrive in time, or ended before; the message names them.
    """
    end, pause = time.monotonic() + timeout, 0.05
    missing = [k for k in range(size) if k != rank]
    try:
        meeting.put(f"come.{rank}", True)
        while missing:
            if rank == 0:
                missing = [k for k in missing if meeting.get(f"come.{k}") is None]
            elif meeting.get("all") is not None:
                missing = []
            if missing and failed():
                raise WorkerError(f"{_workers(failed())} ended before the job began")
            if missing and time.monotonic() > end:
                missing = [k for k in missing if meeting.get(f"come.{k}") is None]
                break
            if missing:
                time.sleep(pause)
                pause = min(1.5 * pause, 1.0)
        if rank == 0 and not missing:
            meeting.put("all", True)
    except OSError as error:
        raise WorkerError(
            f"worker {rank} of {size} cannot reach the rendezvous at {meeting.host}:{meeting.port} ({error}): either "
            "the job has ended without it, or a firewall separates the hosts"
        ) from error
    if missing:
        raise WorkerError(
            f"{_workers(missing)} of {size} did not come within {timeout:g} s of worker {rank}: check what delays "
            "them, or raise start_timeout"
        )


def _workers(ranks: list[int]) -> str:
    return f"worker {ranks[0]}" if len(ranks) == 1 else f"workers {', '.join(map(str, ranks))}"


def open_rendezvous(world_size: int, threads: int) -> tuple[RendezvousServer, list[dict[str, str]]]:
    """Start the server at which workers of this machine meet.

    Args:
        world_size: number of workers.
        threads: threads of each worker, unless OMP_NUM_THREADS is set.

    Returns:
        The server, which the caller stops, and the environment variables of each worker, by rank.
    """
    server = RendezvousServer()
    common = {
        **server.variables,
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_SIZE": str(world_size),
        "HOROVOD_LOCAL_SIZE": str(world_size),
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONUNBUFFERED": "1",
    }
    return server, [
        {**common, "HOROVOD_RANK": str(rank), "HOROVOD_LOCAL_RANK": str(rank)} for rank in range(world_size)
    ]


@contextmanager
def started_workers(
    world_size: int, threads: int, start: Callable[[int, dict[str, str]], Process]
) -> Iterator[list[Process]]:
    """Start workers of this machine, and kill those that still run when the block ends, however it ends.

    Args:
        world_size: number of workers.
        threads: threads of each worker, unless OMP_NUM_THREADS is set.
        start: starts one worker, given its rank and its environment variables.

    Yields:
        Their processes, by rank.
    """
    server, places = open_rendezvous(world_size, threads)
    workers: list[Process] = []
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
