"""A Horovod with MPI, built by the install command in its own environment: five minutes unless it is cached."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.jobs import Job
from tests.distributed.mpi import needs_mpi, run
from tests.distributed.workers import ROOT, SCRIPTS

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(1800), needs_mpi]


MPIRUN = ("mpirun", "--oversubscribe", "--allow-run-as-root", "-np", "2")


def mpirun(python: Path, *arguments: str | Path, cwd: Path) -> str:
    return run(*MPIRUN, python, *arguments, cwd=cwd, timeout=300)


def matrix(folder: Path) -> list[list[float]]:
    report = next((folder / "runs").glob("*/version_0")) / "report" / "accuracy_matrix.json"
    found = json.loads(report.read_text())
    assert found["world_size"] == 2
    return found["matrix"]


def test_the_command_line_under_mpirun_gives_the_matrix_of_gloo(python_with_mpi: Path, tmp_path: Path) -> None:
    arguments = ["fit", "--config", ROOT / "configs/icarl_digits.yaml", "--trainer.strategy", "horovod"]
    arguments += ["--data.init_args.batch_size", "8"]
    gloo, mpi = tmp_path / "gloo", tmp_path / "mpi"
    gloo.mkdir()
    mpi.mkdir()
    run(sys.executable, ROOT / "cli.py", *arguments, "--trainer.devices", "2", cwd=gloo)
    mpirun(python_with_mpi, ROOT / "cli.py", *arguments, cwd=mpi)
    assert matrix(mpi) == matrix(gloo)


def test_adasum_adds_orthogonal_gradients_keeps_equal_ones_and_trains(python_with_mpi: Path, tmp_path: Path) -> None:
    assert mpirun(python_with_mpi, SCRIPTS / "adasum.py", cwd=tmp_path).count("ADASUM DONE") == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_mpirun_stops_all_workers_after_the_same_step_and_saves(
    python_with_mpi: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    job = Job(tmp_path, "signal", "0", launcher=MPIRUN, python=str(python_with_mpi))
    try:
        job.wait_for("PID", 2)
        time.sleep(1)
        job.process.send_signal(signum)
        assert job.end() != 0
        # Open MPI sends its workers a SIGTERM, whichever signal it got itself, and passes on nothing more from stdout.
        stopped = re.search(r"horovod: all workers stopped after step (\d+) \(SIGTERM\); saved ", job.text)
        assert stopped, job.text
        assert job.check_saved() == int(stopped[1])
    finally:
        job.kill()


def test_a_worker_that_hangs_ends_the_job_under_mpirun(python_with_mpi: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, "hang", "1", launcher=MPIRUN, python=str(python_with_mpi))
    try:
        job.wait_for("FAULT AT")
        assert job.end() != 0
        told = "did not come to an operation that worker 0 has waited for more than 3 s (collective_timeout)"
        assert f"horovod: worker 1 {told}" in job.text, job.text
        assert "worker 1 is in train, epoch 1, batch 1, fail (faulty_job.py:" in job.text
        assert job.check_saved() == 4
    finally:
        job.kill()
