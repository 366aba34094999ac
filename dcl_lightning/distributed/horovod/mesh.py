"""Direct connections between the workers, for messages that a step need not wait for.

Horovod executes one operation after another, and each takes several round trips, so whatever else travels in a step
would delay its gradients. Here a message takes half a round trip, and messages of different names pass each other.
"""

from __future__ import annotations

import hmac
import json
import secrets
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dcl_lightning.comm import Comm, allgather_text
from dcl_lightning.distributed.horovod.rendezvous import Rendezvous

__all__ = ["Mesh", "connect_workers", "disconnect_workers"]

_HEAD = struct.Struct("<IQ")  # of a message: bytes of its name, bytes of its content
_HELLO = struct.Struct("<32sI")  # of a connection: the listener's token, the caller's rank
_HELLO_S = 5.0  # for what a caller says first


class Mesh:
    """A connection to every other worker; one thread serves all of them.

    Every worker calls the same methods with the same names, those of one name in the same order.

    Args:
        rank: 0-based rank of this worker.
        lines: a connected socket for each other worker, by rank.

    Attributes:
        fit: number of the fit, part of every name: what an earlier fit has left unread is none of this one's.
    """

    def __init__(self, rank: int, lines: dict[int, socket.socket]) -> None:
        self.rank, self.size, self.fit = rank, len(lines) + 1, 0
        self._links = {peer: _Link(line) for peer, line in lines.items()}
        self._arrived: dict[tuple[int, str], deque[Tensor]] = {}
        self._changed = threading.Condition()  # guards what has arrived, what is to be sent, and who has left
        self._left: set[int] = set()
        self._waits = 0
        self._bell, self._ear = socket.socketpair()
        for end in (self._bell, self._ear):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._ear, selectors.EVENT_READ)
        for peer, link in self._links.items():
            self._selector.register(link.line, selectors.EVENT_READ, peer)
        threading.Thread(target=self._serve, name="horovod-mesh", daemon=True).start()

    def send(self, name: str, parts: Sequence[Tensor]) -> None:
        """Send ``parts[k]`` to worker k, without waiting: contiguous uint8 on the CPU, unchanged from now on."""
        name = f"{self.fit}.{name}"
        with self._changed:
            for peer, part in enumerate(parts):
                if peer == self.rank:
                    self._put(peer, name, part.view(-1))
                else:
                    self._links[peer].outgoing += _message(name, part)
        self._ring()

    def receive(self, name: str) -> list[Tensor]:
        """Wait for the message of every worker, and return their bytes by rank.

        Raises:
            HorovodInternalError: a worker has left, or the mesh is closed.
        """
        from horovod.common.exceptions import HorovodInternalError

        with self._changed:
            self._waits += 1
            handle = self._waits  # by which the watchdog tells waits apart
            boxes = [self._arrived.setdefault((peer, f"{self.fit}.{name}"), deque()) for peer in range(self.size)]
            while missing := [peer for peer, box in enumerate(boxes) if not box]:
                if gone := self._left.intersection(missing):
                    raise HorovodInternalError(f"worker {min(gone)} has left the job, before message {handle} ({name})")
                self._changed.wait()
            return [box.popleft() for box in boxes]

    def begin_fit(self) -> None:
        """Forget what earlier fits have left unread; every worker calls it equally often."""
        with self._changed:
            self.fit += 1
            self._arrived = {k: v for k, v in self._arrived.items() if int(k[1].partition(".")[0]) >= self.fit}

    def close(self) -> None:
        """Leave the other workers, so that all waits for this one end; safe to repeat."""
        with self._changed:
            self._left.update(range(self.size))
            self._changed.notify_all()
        self._ring()

    def _put(self, peer: int, name: str, content: Tensor) -> None:
        self._arrived.setdefault((peer, name), deque()).append(content)
        self._changed.notify_all()

    def _ring(self) -> None:
        with suppress(OSError):  # the thread has ended, or has enough to read
            self._bell.send(b"x")

    def _serve(self) -> None:
        while self.rank not in self._left:
            events = {key.data: event for key, event in self._selector.select()}
            if events.pop(None, 0):
                self._ear.recv(4096)
            for peer, link in self._links.items():
                if peer not in self._left:
                    self._exchange(peer, link, bool(events.get(peer, 0) & selectors.EVENT_READ))
        for link in self._links.values():
            with suppress(OSError):
                link.line.shutdown(socket.SHUT_RDWR)  # also where a forked process has it open
            link.line.close()

    def _exchange(self, peer: int, link: _Link, readable: bool) -> None:
        """Read what has come, if anything, and write what the line takes."""
        try:
            for name, content in link.read() if readable else ():
                with self._changed:
                    self._put(peer, name, content)
            writes = link.write(self._changed)
            self._selector.modify(link.line, selectors.EVENT_READ | (selectors.EVENT_WRITE if writes else 0), peer)
        except OSError:
            self._selector.unregister(link.line)
            with self._changed:
                self._left.add(peer)
                self._changed.notify_all()


class _Link:
    """One connection, and what is on its way."""

    def __init__(self, line: socket.socket) -> None:
        line.setblocking(False)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.line = line
        self.outgoing: deque[memoryview] = deque()
        self._name_length: int | None = None  # of the message that arrives, once its head has
        self._begin(_HEAD.size)

    def _begin(self, length: int) -> None:
        self._buffer, self._filled = bytearray(length), 0

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and content of each message that has arrived whole.

        Raises:
            OSError: the other end has closed the connection.
        """
        while True:
            try:
                count = self.line.recv_into(memoryview(self._buffer)[self._filled :])
            except BlockingIOError:
                return
            if not count:
                raise ConnectionError("closed by the other end")
            self._filled += count
            if self._filled < len(self._buffer):
                continue
            if self._name_length is None:
                self._name_length, content = _HEAD.unpack(self._buffer)
                self._begin(self._name_length + content)
            else:
                start, self._name_length = self._name_length, None
                yield self._buffer[:start].decode(), torch.frombuffer(self._buffer, dtype=torch.uint8)[start:]
                self._begin(_HEAD.size)

    def write(self, lock: threading.Condition) -> bool:
        """Write what the line takes, and return whether more is left."""
        while True:
            with lock:
                if not self.outgoing:
                    return False
                first = self.outgoing[0]
            try:
                count = self.line.send(first)
            except BlockingIOError:
                return True
            with lock:
                self.outgoing.popleft()
                if count < len(first):
                    self.outgoing.appendleft(first[count:])


def _message(name: str, part: Tensor) -> Iterator[memoryview]:
    head = name.encode()
    yield memoryview(_HEAD.pack(len(head), part.numel()) + head)
    if part.numel():
        yield part.numpy().data.cast("B")


_mesh: Mesh | None = None


def connect_workers(comm: Comm, anew: bool, timeout: float) -> Mesh | None:
    """Return this process's mesh for the next fit; None under MPI, which names no network, or if it cannot be made.

    Args:
        comm: the cluster; every worker calls this.
        anew: whether Horovod has been started since the last call.
        timeout: seconds until all workers are connected.
    """
    global _mesh
    if anew:
        disconnect_workers()
    meeting = Rendezvous.of_job()
    if _mesh is None and meeting is not None:
        _mesh = _connected(comm, meeting.host, timeout)
    if _mesh is not None:
        _mesh.begin_fit()
    return _mesh


def disconnect_workers() -> None:
    """Close this process's mesh, after a failure."""
    global _mesh
    if _mesh is not None:
        _mesh.close()
        _mesh = None


def _connected(comm: Comm, toward: str, timeout: float) -> Mesh | None:
    """Return a mesh over the network by which a host is reached, if all workers can connect there."""
    lines: dict[int, socket.socket] = {}
    problem = ""
    token = secrets.token_hex(16)
    family, kind, _, _, there = socket.getaddrinfo(toward, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(there)  # sends nothing
        own = probe.getsockname()[0]
    with socket.create_server((own, 0), family=family, backlog=comm.size) as listener:
        mine = json.dumps([own, listener.getsockname()[1], token])
        places = [json.loads(text) for text in allgather_text(comm, mine)]
        try:
            end = time.monotonic() + timeout
            for peer, (host, port, others) in enumerate(places[: comm.rank]):
                lines[peer] = socket.create_connection((host, port), max(1.0, end - time.monotonic()))
                lines[peer].sendall(_HELLO.pack(others.encode(), comm.rank))
            while len(lines) < comm.size - 1:
                listener.settimeout(max(1.0, end - time.monotonic()))
                line, _ = listener.accept()
                line.settimeout(_HELLO_S)
                with suppress(OSError, struct.error):  # whoever calls that is no worker
                    said, peer = _HELLO.unpack(line.recv(_HELLO.size, socket.MSG_WAITALL))
                    if hmac.compare_digest(said, token.encode()):
                        lines[peer] = line
                        continue
                line.close()
        except OSError as error:
            problem = f"worker {comm.rank}: {error}"
    problems = [text for text in allgather_text(comm, problem) if text]
    if not problems:
        return Mesh(comm.rank, lines)
    for line in lines.values():
        line.close()
    rank_zero_warn(
        f"the workers cannot reach each other besides Horovod ({problems[0]}), so the memory's messages wait in line "
        "with the gradients: open the ports of the hosts to each other"
    )
    return None
