"""Runs Python source on real Horovod workers of this machine."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from dcl_lightning.distributed.horovod.rendezvous import started_workers

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

# Drawing takes most of a small run's time; what reports look like is tested elsewhere.
WITHOUT_PICTURES = "from dcl_lightning.callbacks import report; report.figures_of = lambda *_: {}\n"


@dataclass
class Ended:
    code: int | None  # None: it ran past the deadline and was killed
    output: str


def environment() -> dict[str, str]:
    """This process's, without a place among workers, and with the package and its tests on the path."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HOROVOD_", "OMPI_"))}
    return {**clean, "PYTHONPATH": str(ROOT), "HOROVOD_GLOO_TIMEOUT_SECONDS": "120"}


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


# Workers are forked from a process that has imported what takes longer than most tests do.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "horovod.torch",
        "lightning.pytorch.cli",
        "continuum",
        "sklearn.datasets",
        "dcl_lightning.cli.program",
        "dcl_lightning.distributed.horovod.strategy",
    ]
)


class Worker(ForkServerProcess):
    """Runs ``source`` as ``python -c`` does, and can be asked and ended as a ``subprocess.Popen``."""

    def __init__(self, source: str, variables: dict[str, str], output: Path) -> None:
        super().__init__()
        self.source, self.variables, self.output = source, variables, output
        self.start()

    def run(self) -> None:
        with self.output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.clear()
        os.environ.update(self.variables)
        sys.argv = ["-c"]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            exec(compile(self.source, "<string>", "exec"), main.__dict__)
        finally:
            atexit._run_exitfuncs()  # a forked process ends without them

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> None:
        self.join()


def run_workers(source: str, count: int, deadline: float = 150) -> list[Ended]:
    """Run ``source`` on ``count`` workers; a worker that ends does not end the others."""
    source = WITHOUT_PICTURES + source if ".fit(" in source else source
    variables = {**environment(), "TORCH_PORT": str(free_port())}
    with TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(count)]
        with started_workers(
            count, 1, lambda rank, place: Worker(source, {**variables, **place}, outputs[rank])
        ) as processes:
            end = time.monotonic() + deadline
            while time.monotonic() < end and any(p.poll() is None for p in processes):
                time.sleep(0.05)
            codes = [p.poll() for p in processes]
        return [Ended(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]


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
