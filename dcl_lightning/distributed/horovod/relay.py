"""Signals that the supervisor of a job receives, passed on to worker 0, on whichever host it runs.

A launcher does not pass them on as needed: ``horovodrun`` dies of SIGUSR1, and kills its workers after SIGTERM; so does
``mpirun`` one second later. One worker is enough, because all workers stop after the same step. Imports the standard
library only.
"""

from __future__ import annotations

import hmac
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import cast

__all__ = ["SignalListener", "SignalRelay", "own_address"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Where the relay is: secret, port, addresses. horovodrun and srun pass the whole environment on to other hosts, and
# Open MPI those variables whose names begin like this.
_PLACE = "OMPI_DCL_LIGHTNING_SUPERVISOR"
_GREETING = b"\n"
_CONNECT_S = 5.0
_PAUSE_S = 1.0  # before the next attempt to reach the supervisor
# An idle connection is probed before a firewall forgets it, and a peer that is gone is noticed.
_PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


class SignalRelay:
    """The supervisor's end: sends signals to the worker that listens.

    It listens on every network address, and answers only who sends the job's secret.
    """

    def __init__(self) -> None:
        self._server = _Server(("", 0), _Handler)
        threading.Thread(target=self._serve, name="signal-relay", daemon=True).start()

    def variables(self, hosts: Iterable[str]) -> dict[str, str]:
        """Return the environment variables by which workers find this relay.

        Args:
            hosts: names of the job's hosts, as far as they are known.
        """
        names = (*hosts, socket.gethostname(), "10.255.255.255", "127.0.0.1")  # the third one: by the default route
        addresses = dict.fromkeys(filter(None, map(own_address, names)))
        return {_PLACE: f"{self._server.secret} {self._server.server_address[1]} {' '.join(addresses)}"}

    def send(self, signum: int, hold: bool = False) -> bool:
        """Send a signal to the worker that listens.

        Args:
            signum: SIGINT, SIGTERM, SIGUSR1 or SIGUSR2; others are not sent.
            hold: if no worker listens yet, send it to the first one that does.

        Returns:
            Whether it was sent, or is held.
        """
        return signum in _SIGNALS and self._server.send(signum, hold)

    def _serve(self) -> None:
        # A signal is to interrupt what the main thread waits for. Threads for the connections inherit this.
        signal.pthread_sigmask(signal.SIG_BLOCK, (*_SIGNALS, signal.SIGHUP))
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[StreamRequestHandler]) -> None:
        super().__init__(address, handler)
        self.secret = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []
        self._held: list[int] = []

    def send(self, signum: int, hold: bool) -> bool:
        with self._lock:
            sent = [_send(listener, signum) for listener in self._listeners]
            if hold and not any(sent):
                self._held.append(signum)
            return hold or any(sent)

    @contextmanager
    def listening(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._listeners.append(connection)
            while self._held and _send(connection, self._held[0]):
                self._held.pop(0)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(connection)

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: a worker that is gone is no failure of the supervisor."""


class _Handler(StreamRequestHandler):
    timeout = _CONNECT_S

    def handle(self) -> None:
        server = cast(_Server, self.server)
        if not hmac.compare_digest(self.rfile.readline(100).strip(), server.secret.encode()):
            return
        _probe(self.connection)
        self.connection.sendall(_GREETING)
        with server.listening(self.connection):
            self.connection.recv(1)  # until the worker leaves


class SignalListener:
    """Worker 0's end: raises what the supervisor sends in this process, from ``start`` to ``stop``."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._ended.set()
        self._connection: socket.socket | None = None

    def start(self) -> None:
        """Listen, in a thread, if a supervisor started this job; safe to repeat."""
        place = os.environ.get(_PLACE, "").split()
        if place and self._ended.is_set():
            self._ended = threading.Event()
            args = (place[0], int(place[1]), place[2:], self._ended)
            threading.Thread(target=self._listen, args=args, name="signals-of-supervisor", daemon=True).start()

    def stop(self) -> None:
        """Leave, so that the supervisor signals the launcher again; safe to repeat."""
        self._ended.set()
        connection = self._connection
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self, secret: str, port: int, addresses: list[str], ended: threading.Event) -> None:
        while not ended.is_set():
            for address in addresses:
                if ended.is_set():  # else the next address would be a listener for a moment, and lose what it is sent
                    return
                with suppress(OSError), socket.create_connection((address, port), _CONNECT_S) as connection:
                    if not ended.is_set():
                        self._connection = connection
                        self._raise_what_comes(connection, secret, ended)
            ended.wait(_PAUSE_S)

    def _raise_what_comes(self, connection: socket.socket, secret: str, ended: threading.Event) -> None:
        connection.sendall(f"{secret}\n".encode())
        if connection.recv(1) != _GREETING:
            return
        _probe(connection)
        main = threading.main_thread().ident or 0
        while not ended.is_set() and (received := connection.recv(1)):
            # A signal that nothing here acts on would kill the worker.
            if received[0] in _SIGNALS and signal.getsignal(received[0]) is not signal.SIG_DFL:
                signal.pthread_kill(main, received[0])


def own_address(host: str) -> str:
    """Return this machine's IPv4 address from which it reaches a host; an empty string if the host is unknown."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.connect((host, 9))  # sends nothing
        return str(connection.getsockname()[0])
    return ""


def _send(listener: socket.socket, signum: int) -> bool:
    try:
        listener.sendall(bytes([signum]))
    except OSError:
        return False
    return True


def _probe(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):  # not on macOS
            connection.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
