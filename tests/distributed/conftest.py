"""A SLURM allocation whose variables are set by hand, a ``scontrol`` that records its calls; a Horovod with MPI."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed.mpi import install_with_mpi


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    # As sbatch gives them for two nodes of four tasks: Lightning alone refuses --ntasks without --ntasks-per-node.
    given = "JOB_ID=123 JOB_NAME=train NTASKS=8 NNODES=2 PROCID=0 LOCALID=0 NODEID=0"
    for name, value in (pair.split("=") for pair in given.split()):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    return monkeypatch


@pytest.fixture
def requeued(tmp_path: Path, allocation: pytest.MonkeyPatch) -> Path:
    """The file into which a stub of ``scontrol`` writes its arguments."""
    file, command = tmp_path / "requeued", tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\necho $@ >> {file}\n")
    command.chmod(0o755)
    allocation.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return file


@pytest.fixture(scope="session")
def python_with_mpi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with a Horovod for MPI: five minutes unless its wheel is cached."""
    return install_with_mpi(tmp_path_factory.mktemp("mpi"))
