"""Memory files of two workers, one of which cannot be written."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import horovod.torch as hvd
import pytest

from dcl_lightning.checkpoint.io import Writable, check_files, stage_files
from dcl_lightning.distributed.horovod.comm import HorovodComm
from dcl_lightning.errors import CheckpointError


def staged(root: Path) -> None:
    """All workers raise the same error, and nothing half is left."""
    hvd.init()
    comm = HorovodComm()

    def small(file: Writable) -> None:
        file.write(bytes([comm.rank]) * (100 + comm.rank))

    def large(file: Writable) -> None:
        file.write(bytes(20_000))

    record = stage_files(comm, root / "good", small)
    assert [file["bytes"] for file in record["files"]] == [100, 101]
    assert not check_files(Path(record["staged"]), record["files"], [0, 1])
    if comm.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError, match=r"rank_1 cannot be written \(File too large\)"):
        stage_files(comm, root / "bad", large)
    if comm.rank == 0:
        assert not any((root / "bad").iterdir())
