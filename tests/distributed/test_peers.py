"""Workers that ask each other: who answers, is frozen, is gone, or is on a host that does not answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from dcl_lightning.comm import SingleProcessComm
from dcl_lightning.distributed.horovod import peers
from dcl_lightning.distributed.horovod.peers import Answer, Peers
from dcl_lightning.distributed.horovod.shutdown import StoppedBySignal, report_end

SIZE, NOWHERE = 4, "192.0.2.1"  # an address for documents
HorovodInternalError = type("HorovodInternalError", (RuntimeError,), {})


class Threads(SingleProcessComm):
    """Gathers from threads, each of which is a worker."""

    given: dict[int, Tensor]

    def __init__(self, rank: int, given: dict[int, Tensor], all_here: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.size, self.given, self.all_here = rank, SIZE, given, all_here

    def allgather(self, tensor: Tensor) -> list[Tensor]:
        self.given[self.rank] = tensor
        self.all_here.wait(20)
        return [self.given[k] for k in range(SIZE)]


@pytest.fixture
def workers() -> Iterator[list[Peers]]:
    given: dict[int, Tensor] = {}
    made: dict[int, Peers] = {}
    all_here = threading.Barrier(SIZE)

    def make(rank: int) -> None:
        made[rank] = Peers(Threads(rank, given, all_here))

    threads = [threading.Thread(target=make, args=(k,)) for k in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    yield [made[k] for k in range(SIZE)]
    for one in made.values():
        one.stop()


@pytest.fixture(autouse=True)
def no_route(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.create_connection

    def create_connection(address: tuple[str, int], *more: Any) -> socket.socket:
        if address[0].startswith(NOWHERE):
            raise TimeoutError
        return connect(address, *more)

    monkeypatch.setattr("dcl_lightning.distributed.horovod.peers.socket.create_connection", create_connection)


def move(workers: list[Peers], rank: int, address: str, port: int) -> None:
    """Let the others look for a worker elsewhere."""
    for one in workers:
        one._places[rank] = {**one._places[rank], "addresses": [address], "port": port}


def test_workers_say_what_they_are_asked_for_and_keep_what_they_are_told(workers: list[Peers]) -> None:
    workers[1].put("state", {"waited": 2.5})
    waits, idle = Answer("answers", {"waited": 2.5}), Answer("answers")
    assert workers[0].ask("state") == {1: waits, 2: idle, 3: idle}
    workers[3].tell("verdict", "ä")
    assert [one.get("verdict") for one in workers] == ["ä", "ä", "ä", None]


def test_who_does_not_answer_is_told_apart(workers: list[Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcl_lightning.distributed.horovod.rendezvous._ANSWER_S", 0.3)
    workers[1].stop()
    move(workers, 2, NOWHERE, 9)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        move(workers, 3, "127.0.0.1", silent.getsockname()[1])
        assert workers[0].ask("state") == {1: Answer("gone"), 2: Answer("unreachable"), 3: Answer("frozen")}


def test_an_address_that_both_hosts_have_is_not_the_others(workers: list[Peers]) -> None:
    """As docker0 has, on every host: it would lead to a port of this host."""
    for rank, place in enumerate(workers[0]._places):
        place["addresses"] = ["127.0.0.1", f"{NOWHERE}{rank}"]
    assert {answer.kind for answer in workers[0].ask("state").values()} == {"unreachable"}


def test_hosts_are_named_if_there_are_several(workers: list[Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers[0].name(1) == "worker 1"
    monkeypatch.setattr(workers[0], "_several_hosts", True)
    workers[0]._places[1]["host"] = "node7"
    assert workers[0].name(1) == "worker 1 on node7"


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("killed", "horovod: worker 1 was killed (SIGKILL: from outside, or out of memory); its host answers that the"),
        ("raised", "horovod: worker 1 ended: ValueError: no such luck\n"),
        ("interrupted", "horovod: worker 1 ended: SIGINT\n"),
        ("left", "horovod: worker 1 ended: its script is over, while others still wait for it\n"),
        ("host", "horovod: worker 1 does not answer; its host does not answer; the host or its network is down\n"),
    ],
)
def test_one_worker_says_which_ended_and_why(
    cause: str, said: str, workers: list[Peers], capfd: pytest.CaptureFixture[str]
) -> None:
    if cause == "raised":
        report_end(workers[1], ValueError("no such luck\nat all"))
    elif cause == "interrupted":
        report_end(workers[1], KeyboardInterrupt())
    elif cause == "left":
        workers[1]._leave()
    elif cause == "host":
        move(workers, 1, NOWHERE, 9)
    if cause != "host":
        workers[1].stop()
    own = {
        "raised": "horovod: worker 1 ends: ValueError: no such luck\n",
        "interrupted": "horovod: worker 1 ends: SIGINT\n",
    }
    assert capfd.readouterr().err == own.get(cause, "")
    report_end(workers[2], HorovodInternalError("Horovod has been shut down"))
    workers[2].stop()
    assert not capfd.readouterr().err, "a lower rank speaks"
    report_end(workers[0], HorovodInternalError("Horovod has been shut down"))
    error = capfd.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1, "not of worker 2, which ended because of worker 1"


def test_a_stop_of_all_workers_is_no_failure_to_tell(workers: list[Peers]) -> None:
    report_end(workers[1], StoppedBySignal(15))
    assert workers[0].word_of(1) is None


def test_peers_meet_anew_only_if_horovod_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_peers", None)
    first = peers.meet_peers(SingleProcessComm(), anew=True)
    assert peers.meet_peers(SingleProcessComm(), anew=False) is first
    second = peers.meet_peers(SingleProcessComm(), anew=True)
    assert second is not first
    second.stop()
