"""Starts functions on real Horovod workers of this machine, and scripts the way a user does."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from _pytest.assertion import install_importhook
from _pytest.config import get_config

from dcl_lightning.callbacks import report
from dcl_lightning.distributed.horovod.rendezvous import started_workers

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"


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
        "pytest",
        "dcl_lightning.cli.program",
        "dcl_lightning.distributed.horovod.strategy",
    ]
)


class Worker(ForkServerProcess):
    """Calls a function of a module in a process of its own; offers what ``subprocess.Popen`` does to wait and to kill.

    Args:
        program: a function at the top of a module, which the new process imports; its assertions are rewritten.
        args: its arguments.
        variables: all environment variables of the process.
        output: the file that gets stdout and stderr.
    """

    def __init__(
        self, program: Callable[..., None], args: tuple[Any, ...], variables: dict[str, str], output: Path
    ) -> None:
        super().__init__()
        self.module, self.function, self.args = program.__module__, program.__qualname__, args
        self.variables, self.output = variables, output
        self.start()

    def run(self) -> None:
        with self.output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.clear()
        os.environ.update(self.variables)
        sys.argv = ["-c"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        install_importhook(get_config())
        pytest.register_assert_rewrite(self.module)
        # Drawing takes most of a small run's time; what reports look like is tested elsewhere.
        pytest.MonkeyPatch().setattr(report, "figures_of", lambda *_: {})
        try:
            getattr(importlib.import_module(self.module), self.function)(*self.args)
        finally:
            atexit._run_exitfuncs()  # a forked process ends without them

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> None:
        self.join()


def run_workers(program: Callable[..., None], count: int, *args: Any, deadline: float = 150) -> list[Ended]:
    """Call ``program(*args)`` on ``count`` workers; a worker that ends does not end the others."""
    variables = {**environment(), "TORCH_PORT": str(free_port())}
    with TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(count)]
        with started_workers(
            count, 1, lambda rank, place: Worker(program, args, {**variables, **place}, outputs[rank])
        ) as processes:
            end = time.monotonic() + deadline
            while time.monotonic() < end and any(p.poll() is None for p in processes):
                time.sleep(0.05)
            codes = [p.poll() for p in processes]
        return [Ended(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]


def assert_ended_well(workers: list[Ended]) -> None:
    text = "\n".join(f"--- worker {k}, code {w.code}\n{w.output}" for k, w in enumerate(workers))
    assert all(w.code == 0 for w in workers), text


def run_script(name: str, folder: Path, *args: str, deadline: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a script of ``scripts/`` in a folder the way a user does, with plain ``python``."""
    return subprocess.run(
        [sys.executable, str(SCRIPTS / f"{name}.py"), *args],
        cwd=folder,
        env={**environment(), "MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=deadline,
    )
