"""Where workers ask each other directly, without Horovod: who waits where, who has ended, whose host is silent."""

from __future__ import annotations

import atexit
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

from dcl_lightning.comm import Comm, allgather_text
from dcl_lightning.distributed import ranks
from dcl_lightning.distributed.horovod.rendezvous import Rendezvous, RendezvousServer

__all__ = ["SILENT", "Answer", "Peers", "addresses_here", "host_name", "meet_peers"]

_CONNECT_S = 3.0
_AT_ONCE = 32
_REPORTERS = 4  # the lowest ranks, of which the first that has not ended reports
_ENDED = "its script is over, while others still wait for it"
Kind: TypeAlias = Literal["answers", "frozen", "gone", "unreachable"]
SILENT: dict[Kind, str] = {
    "frozen": "its host accepts connections, but the process is frozen",
    "gone": "its host answers that the process is gone",
    "unreachable": "its host does not answer; the host or its network is down",
}


class Answer(NamedTuple):
    """What came of asking a worker.

    Args:
        kind: ``answers``; ``frozen``, its process is there, but no thread of it runs; ``gone``, its host answers that
            the process has ended; ``unreachable``, its host does not answer.
        value: what it has stored under the key that was asked for, or None.
    """

    kind: Kind
    value: Any = None


class _Place(TypedDict):
    host: str
    addresses: list[str]
    port: int
    root: str


class Peers:
    """The workers of a job, each of which listens at a port of its own for the others' questions.

    Needs Horovod only when it is made. A listener serves those who know its secret; within one host it listens on
    127.0.0.1, else on every address, because which one reaches another host is not known under MPI.

    Args:
        comm: the cluster; every worker makes its ``Peers`` at the same time.
    """

    def __init__(self, comm: Comm) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._server = RendezvousServer("127.0.0.1" if ranks.local_size() == comm.size else "0.0.0.0")
        place: _Place = {
            "host": host_name(),
            "addresses": list(addresses_here().values()),
            "port": self._server.port,
            "root": self._server.root,
        }
        self._places: list[_Place] = [json.loads(text) for text in allgather_text(comm, json.dumps(place))]
        atexit.register(self._leave)
        self._several_hosts = len({place["host"] for place in self._places}) > 1

    def name(self, rank: int) -> str:
        """Return ``worker 1``, and its host if there are several."""
        return f"worker {rank} on {self._places[rank]['host']}" if self._several_hosts else f"worker {rank}"

    def put(self, key: str, value: object) -> None:
        """Store a value for those who ask this worker."""
        self._server.put(key, value)

    def get(self, key: str) -> Any:
        """Return what this worker or another has stored here, or None."""
        return self._server.get(key)

    def ask(self, key: str) -> dict[int, Answer]:
        """Ask all other workers for a value; takes some seconds at most, whoever is silent."""
        return self._each(key, None)

    def tell(self, key: str, value: object) -> None:
        """Store a value at every other worker that answers."""
        self._each(key, value)

    def part(self, word: str) -> None:
        """Tell every other worker why this one ends: a cause, or an empty text if another worker is the cause."""
        atexit.unregister(self._leave)
        self.tell(f"end.{self.rank}", word)

    def word_of(self, rank: int) -> str | None:
        """Return what another worker has told by ``part``, or None: who is killed tells nothing."""
        return self.get(f"end.{rank}")

    def stop(self) -> None:
        """Close the listener."""
        atexit.unregister(self._leave)
        self._server.stop()

    def _leave(self) -> None:
        """At the end of the process, tell those who would report that it has ended by itself; starts no thread."""
        for k in [k for k in range(min(self.size, _REPORTERS)) if k != self.rank]:
            self._request(self._places[k], f"end.{self.rank}", _ENDED)

    def _each(self, key: str, value: object) -> dict[int, Answer]:
        others = [k for k in range(self.size) if k != self.rank]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = pool.map(lambda k: self._request(self._places[k], key, value), others)
            return dict(zip(others, answers, strict=True))

    def _request(self, place: _Place, key: str, value: object) -> Answer:
        """Put a value, or get one if it is None."""
        # Addresses that this host has, too, lead nowhere else: they are those of its own bridges, or it is this host.
        mine = self._places[self.rank]["addresses"]
        answer = Answer("unreachable")
        for address in [a for a in place["addresses"] if a not in mine] or ["127.0.0.1"]:
            try:
                socket.create_connection((address, place["port"]), _CONNECT_S).close()
            except ConnectionRefusedError:
                answer = Answer("gone")
                continue
            except OSError:
                continue
            there = Rendezvous(address, place["port"], place["root"])
            try:
                if value is None:
                    return Answer("answers", there.get(key))
                there.put(key, value)
                return Answer("answers")
            except TimeoutError:
                return Answer("frozen")
            except OSError:  # it ended while it was asked
                answer = Answer("gone")
        return answer


_peers: Peers | None = None


def meet_peers(comm: Comm, anew: bool) -> Peers:
    """Return this process's ``Peers``; every worker calls this.

    Args:
        comm: the cluster.
        anew: whether Horovod has been started since the last call, so that the workers may be others.
    """
    global _peers
    if _peers is None or anew:
        if _peers is not None:
            _peers.stop()
        _peers = Peers(comm)
    return _peers


def host_name() -> str:
    """Return the name of this host, as ``horovodrun`` was given it."""
    return os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()


def addresses_here() -> dict[str, str]:
    """Return the IPv4 address of each network interface of this host that is up, without the loopback."""
    import psutil  # a requirement of Horovod

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name in up and address.family == socket.AF_INET and not address.address.startswith("127.")
    }
