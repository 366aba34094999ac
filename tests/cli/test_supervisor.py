"""``run -- fit ...``: killed jobs resume from their latest checkpoint; a stop by the user is respected."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcl_lightning import cli
from dcl_lightning.cli import supervisor
from dcl_lightning.cli.hosts import answering_hosts, apart, hosts_of, on_hosts, ssh_options, workers_on
from dcl_lightning.cli.supervisor import Supervisor, with_workers
from dcl_lightning.distributed.horovod import relay
from dcl_lightning.distributed.horovod.relay import SignalListener, SignalRelay

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


# -- signals to worker 0 -------------------------------------------------------------------------------


def until(done: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_worker_that_listens_gets_the_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[int] = []
    monkeypatch.setattr(signal, "getsignal", lambda s: signal.SIG_DFL if s == signal.SIGUSR2 else None)
    monkeypatch.setattr(signal, "pthread_kill", lambda _, signum: got.append(signum))
    server, listener = SignalRelay(), SignalListener()
    for name, value in server.variables(["localhost", "no.such.host.example"]).items():
        monkeypatch.setenv(name, value)
    try:
        assert not server.send(signal.SIGTERM)  # nobody listens
        assert server.send(signal.SIGUSR1, hold=True)
        assert not server.send(signal.SIGHUP, hold=True)
        listener.start()
        until(lambda: got == [signal.SIGUSR1])
        assert server.send(signal.SIGUSR2)  # nothing in the worker acts on it, and it would end it
        assert server.send(signal.SIGTERM)
        until(lambda: got == [signal.SIGUSR1, signal.SIGTERM])
        listener.stop()
        until(lambda: not server.send(signal.SIGTERM))
        listener.start()  # the next fit
        until(lambda: server.send(signal.SIGINT))
        until(lambda: signal.SIGINT in got)
    finally:
        listener.stop()
        server.close()


def test_who_does_not_know_the_secret_gets_no_signal() -> None:
    server = SignalRelay()
    try:
        (place,) = server.variables([]).values()
        with socket.create_connection(("127.0.0.1", int(place.split()[1])), timeout=20) as stranger:
            stranger.sendall(b"let me in\n")
            assert stranger.recv(1) == b""
        assert not server.send(signal.SIGTERM)
    finally:
        server.close()


# Stands for horovodrun: dies of SIGUSR1 and of SIGTERM, and its worker, in another session as on another host, listens.
LAUNCHER = f"""#!{sys.executable}
import subprocess, sys
raise SystemExit(1 if subprocess.run([sys.executable, "worker.py"], start_new_session=True).returncode else 0)
"""
WORKER = f"""
import signal, sys, time
sys.path.insert(0, {str(Path(relay.__file__).parent)!r})  # without the package, whose import takes seconds
from relay import SignalListener
def end(signum, frame): print("got", signum, flush=True); sys.exit(128 + signum)
for s in (signal.SIGTERM, signal.SIGUSR1): signal.signal(s, end)
SignalListener().start()
time.sleep(100)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 143)])
def test_signals_reach_a_worker_behind_a_launcher_that_dies_of_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], signum: int, code: int
) -> None:
    """SLURM starts the job anew after its signal, so the supervisor does not."""
    (place / "worker.py").write_text(WORKER)
    (place / "horovodrun").write_text(LAUNCHER)
    (place / "horovodrun").chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.chdir(place)
    job = Supervisor(["./horovodrun", "-np", "1", "fit"], 3)

    def send() -> None:
        until(lambda: job._process if signum == signal.SIGUSR1 else job._relay._server._listeners)
        signal.pthread_kill(threading.main_thread().ident or 0, signum)

    threading.Thread(target=send, daemon=True).start()
    assert job.run() == code
    assert capfd.readouterr() == (f"got {int(signum)}\n", "")


def test_open_mpi_probes_links_and_the_users_values_are_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_MCA_oob_tcp_keepalive_intvl", "99")
    show = "import os; print(*(os.environ[f'OMPI_MCA_oob_tcp_keepalive_{k}'] for k in ('time', 'intvl', 'probes')))"
    assert started(place, monkeypatch, 0, show) == 0
    assert capfd.readouterr().out == "15 99 5\n"


# -- hosts that answer ---------------------------------------------------------------------------------


def test_a_job_is_put_on_some_of_its_hosts(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\na slots=2\nb  slots = 4 max-slots=8\n\nc\n")
    for option in ("-hostfile", "--hostfile"):
        words = ["horovodrun", "-np", "5", option, str(file), "python", "cli.py", "fit", "-H", "x"]
        assert hosts_of(words) == {"a": 2, "b": 4, "c": 1}
        some = on_hosts(words, {"a": 2, "c": 1})
        assert some == ["horovodrun", "-np", "3", "-H", "a:2,c:1", "python", "cli.py", "fit", "-H", "x"]
    words = apart(
        ["mpirun", "--np=2", "--host=a,b:3,a", "--mca", "plm_rsh_args", "-p 22 -i 'a key'", "p", "fit", "--a=1"]
    )
    assert hosts_of(words) == {"a": 2, "b": 3}
    assert on_hosts(words, {"b": 3})[:5] == ["mpirun", "--np", "2", "--host", "b:3"]  # no more workers than before
    assert words[-1] == "--a=1"
    assert ssh_options(words) == ["-p", "22", "-i", "a key"]
    assert ssh_options(["horovodrun", "-p", "2222", "--ssh-identity-file", "k", "fit"]) == ["-p", "2222", "-i", "k"]
    assert workers_on(["mpirun", "-H", "a:2,b:2", "fit"], {"a": 2}) == 2
    assert hosts_of(["horovodrun", "-np", "2", "python", "cli.py", "fit"]) == {}


SSH = """#!/bin/sh
echo "$@" >> asked
for word; do test -e "up/$word" && exit 0; done
exit 255
"""


@pytest.fixture
def network(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose ``up`` has a file for each host that answers; ``plan`` has what happens at each start."""
    (place / "ssh").write_text(SSH)
    # Writes down what it was given; the first line of the plan has the hosts that answer from now on, and the code.
    (place / "horovodrun").write_text(
        f"#!{sys.executable}\n"
        "import sys; from pathlib import Path\n"
        "with open('given', 'a') as f: print(*sys.argv[1:], file=f)\n"
        "(code, *hosts), *rest = [line.split() for line in open('plan')]\n"
        "Path('plan').write_text(chr(10).join(' '.join(line) for line in rest))\n"
        "[f.unlink() for f in Path('up').iterdir()]; [Path('up', h).touch() for h in hosts]\n"
        "raise SystemExit(int(code))\n"
    )
    for name in ("ssh", "horovodrun"):
        (place / name).chmod(0o755)
    (place / "up").mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.chdir(place)
    # Names that are found, on a network that nobody has (RFC 5737).
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "127.0.0.1" if host == "here" else "192.0.2.1")
    saved = iter(range(9))
    monkeypatch.setattr(supervisor, "_latest", lambda *_: (Path("x.ckpt"), next(saved)))
    monkeypatch.setattr(Supervisor, "_trainer", {})
    monkeypatch.setattr(supervisor, "_PAUSE_S", 0.01)
    return place


def on_network(network: Path, up: str, plan: str, *options: str, min_workers: int = 1) -> tuple[int, list[str]]:
    for host in up.split():
        (network / "up" / host).touch()
    (network / "plan").write_text(plan)
    code = Supervisor(["horovodrun", *options, "fit"], 3, min_workers).run()
    return code, (network / "given").read_text().splitlines() if (network / "given").exists() else []


def test_a_restart_uses_the_hosts_that_answer_then(network: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["-np", "4", "-H", "here:2,b:1,c:1", "-p", "2222", "-i", "key"]
    code, given = on_network(network, "b c", "1 b\n1 c b\n1\n0", *options)
    assert code == 0
    assert given == [
        "-np 4 -H here:2,b:1,c:1 -p 2222 -i key fit",
        "-np 3 -H here:2,b:1 -p 2222 -i key fit --ckpt_path last",
        "-np 4 -H here:2,b:1,c:1 -p 2222 -i key fit --ckpt_path last",
        "-np 2 -H here:2 -p 2222 -i key fit --ckpt_path last",
    ]
    assert capfd.readouterr().err.splitlines() == [
        "run: here, b answer; no answer from c",
        "run: the job ended with code 1; restart 1 of 3, from x.ckpt, on 3 workers",
        "run: here, b, c answer",
        "run: the job ended with code 1; restart 2 of 3, from x.ckpt, on 4 workers",
        "run: here answers; no answer from b, c",
        "run: the job ended with code 1; restart 3 of 3, from x.ckpt, on 2 workers",
    ]
    asked = (network / "asked").read_text().splitlines()
    assert len(asked) == 2 * 4  # this host needs no ssh
    assert all(line.startswith("-p 2222 -i key -n -o BatchMode=yes -o ConnectTimeout=10") for line in asked)


def test_below_min_workers_it_waits_and_then_gives_up(
    network: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "_PATIENCE_S", 0.2)
    options = ["-np", "3", "-H", "here:1,b:1,c:1"]
    assert on_network(network, "b c", "1 b\n7", *options, min_workers=3) == (1, ["-np 3 -H here:1,b:1,c:1 fit"])
    assert capfd.readouterr().err.splitlines() == [
        "run: here, b answer; no answer from c",
        "run: the hosts that answer have 2 workers, fewer than --min-workers=3",
    ]


def test_hosts_that_no_name_server_knows_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", raises_unknown)
    assert answering_hosts({"a": 1, "b": 2}, []) == {}


def raises_unknown(host: str) -> str:
    raise socket.gaierror(-2, "Name or service not known")


def test_a_host_file_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--", "horovodrun", "--hostfile", "none.txt", "python", "cli.py", "fit"]) == 2
    assert "run: --hostfile none.txt cannot be read (No such file or directory)" in capsys.readouterr().err
