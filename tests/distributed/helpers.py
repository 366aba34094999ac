"""Runs Python source on real Horovod workers of this machine."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from dcl_lightning.distributed.workers import started_workers

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

# Drawing takes most of a small run's time; what reports look like is tested elsewhere.
WITHOUT_PICTURES = "from dcl_lightning.callbacks import report; report.pictures_of = lambda *_: {}\n"


@dataclass
class Ended:
    code: int | None  # None: it ran past the deadline and was killed
    output: str


def environment() -> dict[str, str]:
    """This process's, without a place among workers, and with the package and these helpers on the path."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HOROVOD_", "OMPI_"))}
    return {**clean, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "HOROVOD_GLOO_TIMEOUT_SECONDS": "120"}


def free_port() -> int:
    """A port for a group of torch.distributed, outside the range from which the system gives ports to connections."""
    while True:
        with socket.socket() as one:
            port = random.randrange(15000, 32000)
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def run_workers(source: str, count: int, deadline: float = 150) -> list[Ended]:
    """Run ``source`` on ``count`` workers; a worker that ends does not end the others."""
    files = []
    torch_port = {"TORCH_PORT": str(free_port())}

    def start(rank: int, variables: dict[str, str]) -> subprocess.Popen[str]:
        files.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 (closed below)
        return subprocess.Popen(
            [sys.executable, "-c", WITHOUT_PICTURES + source if ".fit(" in source else source],
            env={**environment(), **variables, **torch_port},
            stdout=files[-1],
            stderr=subprocess.STDOUT,
        )

    with started_workers(count, 1, start) as processes:
        end = time.monotonic() + deadline
        while time.monotonic() < end and any(p.poll() is None for p in processes):
            time.sleep(0.05)
        codes = [p.poll() for p in processes]
    ended = []
    for code, file in zip(codes, files, strict=True):
        file.seek(0)
        ended.append(Ended(code, file.read()))
        file.close()
    return ended


def assert_ended_well(workers: list[Ended]) -> None:
    text = "\n".join(f"--- worker {k}, code {w.code}\n{w.output}" for k, w in enumerate(workers))
    assert all(w.code == 0 for w in workers), text


def run_script(script: Path, *args: str, deadline: float = 150) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a script the way a user does, with plain ``python``; return how it ended and after how long."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script), *args],
        cwd=script.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=deadline,
    )
    return done, time.monotonic() - started
