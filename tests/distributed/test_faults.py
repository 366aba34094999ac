"""Faults of a worker: the job ends soon, names the cause first, and leaves nothing behind."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.jobs import START, Job


@pytest.fixture
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    job = Job(tmp_path, *request.param.split())
    yield job
    job.kill()


@pytest.fixture(scope="module", autouse=True)
def late(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Worker 1 comes 40 s late: started first, looked at last."""
    job = Job(tmp_path_factory.mktemp("late"), "late", "1")
    yield job
    job.kill()


def first_error(job: Job) -> str:
    """What the job wrote to stderr, from the first line on that tells of an error."""
    lines = job.err.read_text().splitlines(keepends=True)
    words = ("Traceback", "Error", "horovod: ", "Fatal")
    start = next((i for i, line in enumerate(lines) if any(word in line for word in words)), len(lines))
    return "".join(lines[start:])


@pytest.mark.parametrize("job", ["raise 1", pytest.param("raise 0", marks=pytest.mark.exhaustive)], indirect=True)
def test_an_exception_is_the_first_thing_shown_and_nobody_saves(job: Job) -> None:
    job.wait_for("FAULT AT")
    assert job.end() == 1, job.text
    error = first_error(job)
    assert "ValueError: no such luck" in error.partition("HorovodInternalError")[0], job.text
    if "[rank 1] FAULT AT" in job.text:
        told = error[error.index("horovod: worker 1 ended with code 1; its last lines:") :]
        assert "ValueError: no such luck" in told
        assert told.rstrip().endswith("WorkerError: worker 1 ended with code 1: its last lines are shown above")
    else:
        assert "horovod: worker 1 ended" not in error, "worker 0 is the cause"
    assert not list(job.folder.glob("exceptions/*.ckpt")), "a save after an exception takes all workers"
    assert job.check_saved() == 4


@pytest.mark.parametrize("job", ["kill 1", pytest.param("kill 0", marks=pytest.mark.exhaustive)], indirect=True)
def test_a_killed_worker_takes_the_others_with_it(job: Job) -> None:
    job.wait_for("FAULT AT")
    code = job.end()
    if "[rank 1] FAULT AT" in job.text:
        assert code == 1
        assert first_error(job).startswith("horovod: worker 1 ended with code -9 (SIGKILL"), job.text
    else:
        assert code == -signal.SIGKILL
    assert job.check_saved() == 4


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("job", ["signal 0"], indirect=True)
def test_a_signal_stops_all_workers_after_the_same_step_and_saves(signum: signal.Signals, job: Job) -> None:
    job.wait_for("PID", 2)
    time.sleep(1)
    job.process.send_signal(signum)
    assert job.end() == 128 + signum, job.text
    stops = [line.split("STOPPED")[1] for line in job.out.read_text().splitlines() if "STOPPED" in line]
    assert len(stops) == 2, job.text
    assert stops[0] == stops[1], "both after the same step"
    step = int(stops[0].split()[-2])
    assert job.check_saved() == step
    assert job.check_saved("exceptions", "on_exception.ckpt") == step
    assert len(list(job.folder.glob("exceptions/*.ckpt"))) == 2
    assert f"horovod: all workers stopped after step {step} ({signum.name}); saved " in job.text
    assert "Traceback" not in job.text
    assert "PID" in (job.folder / "runs/faulty/version_0/logs/rank_1.log").read_text()


@pytest.mark.parametrize("job", ["stuck 1"], indirect=True)
def test_a_second_signal_ends_a_job_that_is_stuck(job: Job) -> None:
    job.wait_for("FAULT AT")
    time.sleep(1)
    job.process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert job.process.poll() is None
    assert "horovod: SIGINT: all workers stop after this step; a second signal ends them at once" in job.text
    job.process.send_signal(signal.SIGINT)
    assert job.end() == 130, job.text
    assert job.check_saved() == 4


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("job", ["away 1"], indirect=True)
def test_a_signal_before_training_ends_all(signum: signal.Signals, job: Job) -> None:
    job.wait_for("PID")
    time.sleep(1)
    job.process.send_signal(signum)
    assert job.end() == 128 + signum, job.text
    assert "no checkpoint is saved" in job.text


@pytest.mark.parametrize("job", ["hang 1", pytest.param("hang 0", marks=pytest.mark.exhaustive)], indirect=True)
def test_a_worker_that_hangs_is_named_and_shows_where(job: Job) -> None:
    job.wait_for("FAULT AT")
    assert job.end() == 1, job.text
    rank = 1 if "[rank 1] FAULT AT" in job.text else 0
    error = first_error(job).replace("[rank 1] ", "")
    assert error.startswith(f"horovod: worker {rank} did not come to an operation that worker {1 - rank}"), job.text
    assert f"worker {rank} is in train, epoch 1, batch 1, fail (faulty_job.py:" in error
    assert f"worker {1 - rank} waits in train, epoch 1, batch 1, " in error
    assert " in training_step" in error.partition(f"where worker {rank} is:")[2], "the stack"
    assert job.check_saved() == 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("job", ["freeze 1", "freeze 0"], indirect=True)
def test_a_worker_whose_interpreter_is_frozen_shows_where(job: Job) -> None:
    job.wait_for("FAULT AT")
    assert job.end() not in (0, None), job.text
    assert " in training_step" in job.err.read_text(), job.text
    assert job.check_saved() == 4


@pytest.mark.parametrize("job", ["never 1"], indirect=True)
def test_a_worker_that_never_comes_is_named(job: Job) -> None:
    assert job.end(START) == 1, job.text
    assert job.err.read_text().rstrip().endswith("raise start_timeout")
    assert "WorkerError: worker 1 of 2 did not come within 5 s of worker 0" in job.text


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_horovodrun_ends_at_once(signum: signal.Signals, tmp_path: Path) -> None:
    horovodrun = (str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", "2")
    job = Job(tmp_path, "signal", "0", launcher=horovodrun)
    try:
        job.wait_for("PID", 2)
        time.sleep(1)
        job.process.send_signal(signum)
        # Now and then with 0: two threads of Horovod wait for a worker, and the second one sees that it ended well.
        assert job.end() in (0, 1)
        assert "DONE" not in job.text
        assert job.check_saved() >= 2
    finally:
        job.kill()


def test_a_worker_may_be_forty_seconds_late(late: Job) -> None:
    assert late.end(START) == 0, late.text
    assert late.said("DONE") == ["12", "12"], late.text
