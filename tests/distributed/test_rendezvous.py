"""Workers that meet before Horovod runs, and children that end with their parent."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from dcl_lightning.distributed import HorovodStrategy
from dcl_lightning.distributed.child import Child
from dcl_lightning.distributed.rendezvous import Rendezvous, wait_for_workers
from dcl_lightning.distributed.workers import open_rendezvous
from dcl_lightning.errors import ConfigurationError, WorkerError


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    http_server = pytest.importorskip("horovod.runner.http.http_server")
    server = http_server.RendezvousServer(verbose=0)
    port = server.start()
    yield port
    server.stop()


@pytest.fixture
def meeting(server: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Rendezvous:
    monkeypatch.setattr("dcl_lightning.distributed.rendezvous._SCOPE", request.node.name)
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(server))
    meeting = Rendezvous.of_job()
    assert meeting is not None
    return meeting


def test_what_one_worker_puts_another_gets(meeting: Rendezvous) -> None:
    assert meeting.get("verdict") is None
    meeting.put("verdict", {"late": [1], "text": "ä\n"})
    assert meeting.get("verdict") == {"late": [1], "text": "ä\n"}


def test_without_a_server_there_is_no_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOROVOD_GLOO_RENDEZVOUS_PORT", raising=False)
    assert Rendezvous.of_job() is None


def test_addresses_of_one_meeting_are_gone_before_the_next() -> None:
    """Worker 0 is done with its own group before worker 1 is done with that of both."""
    server, places = open_rendezvous(2, 1)
    host = places[0]["HOROVOD_HOSTNAME"]

    def ask(method: str, path: str, body: bytes | None = None) -> int:
        connection = HTTPConnection("127.0.0.1", int(places[0]["HOROVOD_GLOO_RENDEZVOUS_PORT"]), timeout=5)
        connection.request(method, path, body)
        status = connection.getresponse().status
        connection.close()
        return status

    try:
        for rank in (0, 1):
            ask("PUT", f"/local_{host}/{rank}", b"an address")
        ask("DELETE", f"/local_{host}/0")
        ask("PUT", "/cross_0/0", b"an address")
        ask("DELETE", "/cross_0/0")
        assert ask("GET", f"/local_{host}/1") == 200, "worker 1 has not finished"
        ask("DELETE", f"/local_{host}/1")
        assert ask("GET", f"/local_{host}/1") == ask("GET", "/cross_0/0") == 404
    finally:
        server.stop()


def test_all_go_on_once_the_last_has_come(meeting: Rendezvous) -> None:
    came: list[int] = []

    def come(rank: int) -> None:
        time.sleep(0.1 * rank)
        wait_for_workers(meeting, rank, 3, 20)
        came.append(rank)

    threads = [threading.Thread(target=come, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(came) == [0, 1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_named(rank: int, meeting: Rendezvous) -> None:
    with pytest.raises(WorkerError, match=rf"^workers {1 - rank}, 2 of 3 did not come within 0.1 s of worker {rank}"):
        wait_for_workers(meeting, rank, 3, 0.1)


def test_who_has_ended_is_not_waited_for(meeting: Rendezvous) -> None:
    with pytest.raises(WorkerError, match="worker 1 ended before the job began"):
        wait_for_workers(meeting, 0, 2, 60, lambda: [1])


def test_a_server_that_is_gone_is_told(meeting: Rendezvous) -> None:
    with pytest.raises(WorkerError, match=r"worker 1 of 2 cannot reach the rendezvous at 127\.0\.0\.1:1 "):
        wait_for_workers(Rendezvous("127.0.0.1", 1), 1, 2, 5)


def test_times_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="start_timeout=0 must be at least 1"):
        HorovodStrategy(start_timeout=0)
    with pytest.raises(ConfigurationError, match="collective_timeout=-1 at least 0"):
        HorovodStrategy(collective_timeout=-1)


def test_a_childs_lines_are_shown_and_logged_from_the_first_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import sys, time; print('one', flush=True); time.sleep(1); print('two', file=sys.stderr)"
    child = Child(3, [sys.executable, "-c", code], {})
    while "one" not in capfd.readouterr().out:
        time.sleep(0.01)
    child.log_to(tmp_path / "logs")
    child.process.wait(20)
    child.drain()
    assert (tmp_path / "logs" / "rank_3.log").read_text() == "one\ntwo\n"
    assert capfd.readouterr().err == "[rank 3] two\n"
    assert list(child.tail) == ["two\n"]
    assert not child.failed


def test_a_child_says_how_it_ended() -> None:
    child = Child(1, [sys.executable, "-c", "import time; time.sleep(60)"], {})
    child.kill(9)
    child.process.wait(20)
    assert child.how_it_ended() == "ended with code -9 (SIGKILL: killed from outside, or for want of memory)"
    child.kill(9)  # nothing left to kill
