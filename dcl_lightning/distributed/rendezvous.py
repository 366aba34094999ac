"""What workers can tell each other before Horovod runs, and while its operations wait."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from typing import Any

from dcl_lightning.errors import WorkerError

__all__ = ["Rendezvous", "wait_for_workers"]

_SCOPE = "dcl_lightning"
_ANSWER_S = 5.0


class Rendezvous:
    """The key-value server at which Horovod's Gloo workers meet; MPI has none.

    Args:
        host: address of the server.
        port: its port.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    @classmethod
    def of_job(cls) -> Rendezvous | None:
        """Return the server that the launcher named in the environment, or None."""
        host, port = (os.environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{name}") for name in ("ADDR", "PORT"))
        return cls(host, int(port)) if host and port and port.isdigit() else None

    def put(self, key: str, value: Any) -> None:
        """Store a value for all workers.

        Args:
            key: letters, digits and dots.
            value: anything that JSON can hold.

        Raises:
            OSError: the server does not answer.
        """
        self._request("PUT", key, json.dumps(value).encode())

    def get(self, key: str) -> Any:
        """Return a value, or None if nobody has stored it.

        Args:
            key: letters, digits and dots.

        Raises:
            OSError: the server does not answer.
        """
        body = self._request("GET", key)
        return None if body is None else json.loads(body)

    def _request(self, method: str, key: str, body: bytes | None = None) -> bytes | None:
        # Not urllib: a proxy of the environment must not stand between workers.
        connection = HTTPConnection(self.host, self.port, timeout=_ANSWER_S)
        try:
            connection.request(method, f"/{_SCOPE}/{key}", body)
            answer = connection.getresponse()
            return answer.read() if answer.status == 200 else None
        except HTTPException as error:
            raise ConnectionError(f"the rendezvous at {self.host}:{self.port} gave no answer") from error
        finally:
            connection.close()


def wait_for_workers(
    meeting: Rendezvous, rank: int, size: int, timeout: float, failed: Callable[[], list[int]] = list
) -> None:
    """Return once all workers have come; Horovod itself aborts the process if one does not.

    Worker 0 asks for each of the others, which ask only for its word: few requests for many workers.

    Args:
        meeting: where they meet.
        rank: this worker.
        size: number of workers.
        timeout: seconds to wait.
        failed: says which workers have ended already, where that is known.

    Raises:
        WorkerError: workers did not come in time, or ended before; they are named.
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
            "the job has ended without it, or a firewall stands between the hosts"
        ) from error
    if missing:
        raise WorkerError(
            f"{_workers(missing)} of {size} did not come within {timeout:g} s of worker {rank}: see what keeps "
            "them, or raise start_timeout"
        )


def _workers(ranks: list[int]) -> str:
    return f"worker {ranks[0]}" if len(ranks) == 1 else f"workers {', '.join(map(str, ranks))}"
