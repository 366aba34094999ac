"""``run -- fit ...``: killed jobs resume from their latest checkpoint; a stop by the user is respected."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dcl_lightning import cli
from dcl_lightning.cli.supervisor import Supervisor, with_workers

ROOT = Path(__file__).parent.parent.parent
# Kills its process, or only rank 1's, once at a step; what "once" is, a file tells.
DYING = """
import os, signal
from pathlib import Path
import lightning.pytorch as pl

class Dies(pl.Callback):
    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            if not Path("died").exists():
                Path("died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
"""
# Two tasks of six steps, a checkpoint every second step.
JOB = ["fit", "--model", "nil", "--data.dataset", "digits", "--data.increment", "5", "--model.epochs_per_task", "1"]
JOB += ["--trainer.limit_train_batches", "6", "--trainer.accelerator", "cpu", "--trainer.logger.name", "job"]
JOB += ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "2"]
JOB += ["--trainer.callbacks.save_last", "true", "--trainer.callbacks+=TaskReport"]
JOB += ["--trainer.callbacks.pictures=false"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "dying.py").write_text(DYING)
    return tmp_path


def supervised(place: Path, options: list[str], job: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dcl_lightning", "run", *options, "--", *job], cwd=place, text=True,
        capture_output=True, timeout=250, env={**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def dies(**args: object) -> list[str]:
    words = [f"--trainer.callbacks.{key}={value}" for key, value in args.items()]
    return ["--trainer.callbacks+=dying.Dies", *words]


def last(place: Path) -> dict[str, torch.Tensor]:
    path = place / "runs/job/version_0/checkpoints/last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.exhaustive
def test_a_killed_job_ends_as_if_it_had_not_been(place: Path) -> None:
    done = supervised(place, [], [*JOB, *dies(step=9)])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run: the job ended with signal 9; restart 1 of 3, from ") == 1
    lost = last(place)
    (place / "runs").rename(place / "lost")
    whole = supervised(place, [], JOB)
    assert whole.returncode == 0, whole.stderr
    assert "run:" not in whole.stderr
    for name, value in last(place).items():
        assert torch.equal(value, lost[name]), name


def test_a_lost_worker_does_not_lose_the_run(place: Path) -> None:
    pytest.importorskip("horovod")
    job = [*JOB, "--trainer.strategy", "horovod", "--trainer.devices", "2", *dies(step=9, rank=1)]
    done = supervised(place, ["--min-workers", "1"], job)
    assert done.returncode == 0, done.stderr
    assert "restart 1 of 3, from " in done.stderr
    assert ", on 1 worker\n" in done.stderr
    assert not (place / "runs/job/version_1").exists()
    assert last(place)
    assert (place / "runs/job/version_0/report/summary.md").exists()


def started(place: Path, monkeypatch: pytest.MonkeyPatch, max_restarts: int, script: str) -> int:
    """Run a job that is a script, supervised from this process."""
    (place / "job.py").write_text(script)
    monkeypatch.chdir(place)
    return Supervisor([sys.executable, "job.py", "fit"], max_restarts).run()


def test_without_progress_it_ends(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    earlier = place / "runs" / "dcl" / "version_0" / "checkpoints"  # another run of the name, not gone on with
    shutil.copytree(ROOT / "tests" / "data" / "checkpoint_v1", earlier)
    assert started(place, monkeypatch, 5, "import os; os.kill(os.getpid(), 9)") == 137
    assert capfd.readouterr().err.splitlines() == [
        "run: the job ended with signal 9; restart 1 of 5, from the beginning",
        "run: the job ended with signal 9 twice without a new checkpoint in between: see its messages above",
    ]


@pytest.mark.parametrize("code", [0, 2, 130, 143])
def test_what_ends_by_itself_is_not_started_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    assert started(place, monkeypatch, 3, f"print('started'); raise SystemExit({code})") == code
    assert capfd.readouterr() == ("started\n", "")


def test_starts_are_counted(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert started(place, monkeypatch, 0, "raise SystemExit(7)") == 7
    assert capfd.readouterr().err == "run: the job ended with code 7; that was the last of 1 starts\n"


SUPERVISED = [sys.executable, "-m", "dcl_lightning", "run", "--", sys.executable, "job.py", "fit"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_job_and_end_the_run(place: Path, signum: int) -> None:
    (place / "job.py").write_text(
        "import signal, sys, time\n"
        "def end(signum, frame): print('got', signum, flush=True); sys.exit(9 if signum != 10 else 0)\n"
        "for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1): signal.signal(s, end)\n"
        "print('ready', flush=True); time.sleep(100)"
    )
    with subprocess.Popen(SUPERVISED, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    assert out == f"got {int(signum)}\n"
    assert err == ""
    assert process.returncode == (0 if signum == signal.SIGUSR1 else 143)


def test_the_job_ends_with_its_supervisor(place: Path) -> None:
    (place / "job.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(100)")
    with subprocess.Popen(SUPERVISED, cwd=place, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}/cwd").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}/cwd").exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "no fit in the job (empty)"),
        (["--", "python", "x.py"], "no fit in the job (python x.py)"),
        (["--max-restarts", "-1", "--", "fit"], "--max-restarts=-1: give 0 or more"),
        (["--min-workers", "0", "--", "fit"], "--min-workers=0: give 1 or more"),
    ],
)
def test_mistakes_are_told_in_one_line(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", *args]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_fewer_workers_need_a_number_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--min-workers", "1", "--", "fit", "--model", "base", "--data.dataset", "digits"]) == 2
    assert "--min-workers needs a number of workers, trainer.devices is auto" in capsys.readouterr().err


def test_the_number_of_workers_is_told_to_whoever_starts_them() -> None:
    assert with_workers(["fit", "--a", "1"], 3) == ["fit", "--a", "1", "--trainer.devices", "3"]
    words = ["horovodrun", "-np", "4", "-H", "a:2,b:2", "python", "cli.py", "fit"]
    assert with_workers(words, 2) == ["horovodrun", "-np", "2", *words[3:]]
