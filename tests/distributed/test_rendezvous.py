"""The rendezvous of workers before Horovod runs, and worker processes that end with their parent."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from dcl_lightning.distributed import HorovodStrategy
from dcl_lightning.distributed.horovod.rendezvous import Rendezvous, RendezvousServer, open_rendezvous, wait_for_workers
from dcl_lightning.distributed.horovod.worker_process import WorkerProcess
from dcl_lightning.errors import ConfigurationError, WorkerError


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """Environment variables that name a server."""
    server = RendezvousServer()
    yield server.variables
    server.stop()


@pytest.fixture
def meeting(server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Rendezvous:
    monkeypatch.setattr("dcl_lightning.distributed.horovod.rendezvous._SCOPE", request.node.name)
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    meeting = Rendezvous.of_job()
    assert meeting is not None
    return meeting


def request_of(variables: dict[str, str], method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Ask as Horovod does, which puts address and port before the path."""
    url = f"{variables['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{variables['HOROVOD_GLOO_RENDEZVOUS_PORT']}{path}"
    host, _, path = url.partition("/")
    connection = HTTPConnection(host, timeout=5)
    connection.request(method, f"/{path}", body)
    answer = connection.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


def test_the_server_is_reached_at_one_address_of_this_machine_only(server: dict[str, str]) -> None:
    port = int(server["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)  # as any other address of a server that listens on all
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_the_server_serves_those_who_know_the_secret(server: dict[str, str]) -> None:
    port = server["HOROVOD_GLOO_RENDEZVOUS_PORT"]
    for start in ("127.0.0.1", f"127.0.0.1:{port}/{'0' * 32}", f"127.0.0.1:{port}/"):
        foreign = {**server, "HOROVOD_GLOO_RENDEZVOUS_ADDR": start}
        assert request_of(foreign, "PUT", "/dcl_lightning/verdict", b"{}") == (403, b"")
        assert request_of(foreign, "GET", "/dcl_lightning/verdict") == (403, b"")
        assert request_of(foreign, "DELETE", "/dcl_lightning/verdict") == (403, b"")
    assert request_of(server, "GET", "/dcl_lightning/verdict") == (404, b""), "somebody else's value was kept"
    assert request_of(server, "PUT", "/dcl_lightning/verdict", b"{}")[0] == 200
    assert request_of(server, "GET", "/dcl_lightning/verdict") == (200, b"{}")


def test_the_server_shows_no_files(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/etc")
    for method in ("HEAD", "POST", "OPTIONS"):
        assert request_of(server, method, "/passwd")[0] == 501
    assert request_of(server, "GET", "/passwd")[0] == 400
    assert request_of(server, "GET", "/../etc/passwd")[0] == 400
    assert request_of(server, "GET", "/etc/passwd") == (404, b"")


def test_two_jobs_have_two_secrets() -> None:
    one, two = RendezvousServer(), RendezvousServer()
    secrets = {server.variables["HOROVOD_GLOO_RENDEZVOUS_ADDR"].partition("/")[2] for server in (one, two)}
    one.stop()
    two.stop()
    assert len(secrets) == 2
    assert all(len(secret) == 32 for secret in secrets)


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
        return request_of(places[0], method, path, body)[0]

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
    child = WorkerProcess(3, [sys.executable, "-c", code], {})
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
    child = WorkerProcess(1, [sys.executable, "-c", "import time; time.sleep(60)"], {})
    child.kill(9)
    child.process.wait(20)
    assert child.how_it_ended() == "ended with code -9 (SIGKILL: killed from outside, or out of memory)"
    child.kill(9)  # nothing left to kill
