"""Faults between hosts: the job ends in time, names rank, host and cause first, leaves nothing, and its save is whole.

``pytest -s -m "exhaustive or not exhaustive"`` on this file prints the table of docs/exhaustive.md.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.data import small_sets
from tests.distributed.hosts import ADMIN, NETWORK, Host, needs_hosts, several_hosts
from tests.distributed.jobs import START, Job
from tests.distributed.mpi import needs_mpi
from tests.distributed.workers import ROOT, SCRIPTS

pytestmark = [needs_hosts, pytest.mark.timeout(1800)]

ON_BOTH = "-np 2 -H host1:1,host2:1"
# By Gloo also where Horovod has MPI, which horovodrun else hands the job to.
HOROVODRUN = f"horovodrun --gloo {ON_BOTH} python"
# As docs/distributed.md has it, with shorter times.
KEEPALIVE = "-mca oob_tcp_keepalive_time 5 -mca oob_tcp_keepalive_intvl 3 -mca oob_tcp_keepalive_probes 4"
MPIRUN = f"mpirun --allow-run-as-root {ON_BOTH} -x PATH -x PYTHONPATH -x OMP_NUM_THREADS"
INTERFACE = "-mca btl_tcp_if_include eth0 -mca oob_tcp_if_include eth0"
COLLECTIVE_TIMEOUT, MARGIN = 10, 30  # seconds
FAULTY = SCRIPTS / "faulty_job.py"
DOWN = f"more than {COLLECTIVE_TIMEOUT} s (collective_timeout): its host does not answer; the host or its network is"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with several_hosts(2, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


class SpreadJob(Job):
    """A job that is started on the first host."""

    def __init__(self, hosts: list[Host], folder: Path, command: str) -> None:
        self.hosts, self.folder, self.out, self.err = hosts, folder, folder / "stdout", folder / "stderr"
        self.began = time.monotonic()
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = hosts[0].popen(f"exec {command}", cwd=folder, stdout=out, stderr=err)

    def left(self) -> dict[int, str]:
        """What runs on the hosts beside logins."""
        hosts = [host for host in self.hosts if host.process.poll() is None]
        found = {pid: line for host in hosts for pid, line in host.processes().items()}
        return {pid: line for pid, line in found.items() if not line.startswith("sshd: ")}

    def fault(self) -> None:
        """Count the seconds from now on."""
        self.began = time.monotonic()

    def end(self, within: float = MARGIN) -> int:
        code = self.process.wait(timeout=within)
        self.seconds = time.monotonic() - self.began
        end = time.monotonic() + MARGIN
        while time.monotonic() < end and self.left():
            time.sleep(0.1)
        assert not self.left(), f"left behind\n{self.text}"
        return code

    @property
    def error(self) -> str:
        """The first line on stderr of this package, or of a traceback; warnings and Horovod's own log come before."""
        lines = re.sub(r"(?m)^\[\d\]<stderr>:", "", self.err.read_text()).splitlines()
        lines = [line for line in lines if re.match(r"horovod: |error: |Traceback|\w*Error|python: |ORTE ", line)]
        return lines[0] if lines else self.text

    def row(self, fault: str, step: int | None = None) -> None:
        """Print this fault's row of the table."""
        saved = "none yet" if step is None else f"whole, step {step}"
        print(f"| {fault} | {self.seconds:.1f} | `{self.error}` | 0 | {saved} |")

    def kill(self) -> None:
        for pid in self.left():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


class Start:
    """Starts jobs, which end with the test."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self.folder, self.jobs = hosts, folder, list[SpreadJob]()

    def __call__(self, what: str, timeout: float = COLLECTIVE_TIMEOUT, by: str = HOROVODRUN) -> SpreadJob:
        """``what`` is the fault and the rank for ``faulty_job.py``; ``by``, the launcher and the interpreter."""
        self.jobs.append(SpreadJob(self.hosts, self.folder, f"{by} {FAULTY} {what} {timeout}"))
        return self.jobs[-1]

    def training(self, timeout: float = COLLECTIVE_TIMEOUT, by: str = HOROVODRUN) -> SpreadJob:
        """A job that has trained for some steps, and would go on for ever."""
        job = self("signal 9", timeout, by)
        job.wait_for("PID", 2)
        end = time.monotonic() + START
        while time.monotonic() < end and not (job.folder / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.1)
        return job


@pytest.fixture
def start(hosts: list[Host], tmp_path: Path) -> Iterator[Start]:
    start = Start(hosts, tmp_path)
    yield start
    for job in start.jobs:
        job.kill()
    for host in hosts:
        host.link(up=True)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_a_killed_worker_is_named(rank: int, start: Start) -> None:
    job = start(f"kill {rank}", 1800)
    job.wait_for("FAULT AT")
    job.fault()
    assert job.end() == 1, job.text
    told = f"horovod: worker {rank} on host{rank + 1} was killed (SIGKILL: from outside, or out of memory); its host"
    assert job.error.startswith(told), job.text
    step = job.check_saved()
    assert step == 4
    job.row(f"worker killed on the {'other' if rank else 'launching'} host", step)


@pytest.mark.exhaustive
def test_an_exception_on_the_other_host_is_named(start: Start) -> None:
    job = start("raise 1", 1800)
    job.wait_for("FAULT AT")
    job.fault()
    assert job.end() == 1, job.text
    assert re.match("horovod: worker 1 on host2 end(s|ed): ValueError: no such luck$", job.error), job.text
    step = job.check_saved()
    assert step == 4
    job.row("an exception on the other host", step)


@pytest.mark.exhaustive
def test_a_lost_login_ends_the_job(start: Start) -> None:
    job = start.training(1800)
    logins = [pid for pid, line in start.hosts[1].processes().items() if line.startswith("sshd: ")]
    job.fault()
    for pid in logins:
        os.kill(pid, signal.SIGKILL)
    assert job.end() == 1, job.text
    job.row("ssh session killed", job.check_saved())


@pytest.mark.exhaustive
def test_a_host_that_is_silent_for_good_is_named(start: Start) -> None:
    job = start.training()
    start.hosts[1].link(up=False)
    job.fault()
    assert job.end(COLLECTIVE_TIMEOUT + MARGIN) == 1, job.text
    told = "horovod: worker 1 on host2 did not come to an operation that worker 0 on host1 has waited for "
    assert job.error.startswith(told + DOWN), job.text
    job.row(f"link down for good, collective_timeout {COLLECTIVE_TIMEOUT} s", job.check_saved())


@pytest.mark.exhaustive
def test_a_lost_machine_is_named(start: Start) -> None:
    job = start.training()
    job.fault()
    start.hosts[1].kill()
    try:
        assert job.end(COLLECTIVE_TIMEOUT + MARGIN) == 1, job.text
        assert "worker 1 on host2" in job.error, job.text
        job.row("machine switched off", job.check_saved())
    finally:
        start.hosts[1].start()


@pytest.mark.exhaustive
def test_a_link_that_comes_back_in_time_is_no_fault(start: Start) -> None:
    job = start.training(60)
    start.hosts[1].link(up=False)
    job.fault()
    time.sleep(25)
    before = job.check_saved()
    start.hosts[1].link(up=True)
    end = time.monotonic() + 60
    while time.monotonic() < end and job.check_saved() <= before:
        time.sleep(0.5)
    assert job.check_saved() > before, job.text
    assert job.process.poll() is None
    print(f"| link down for 25 s | goes on after {time.monotonic() - job.began:.1f} | | | whole |")


@pytest.mark.exhaustive
def test_a_slow_network_that_loses_packets_is_no_fault(tmp_path: Path) -> None:
    """By the switch of benchmarks/latency.py: 20 ms there and back, 1 % of the packets lost."""
    control, folder = tmp_path / "round_trip", tmp_path / "hosts"
    control.write_text("20 1")
    folder.mkdir()
    names = [f"slow{os.getpid() % 100000}{letter}" for letter in "ab"]
    words = [sys.executable, ROOT / "benchmarks" / "latency.py", "--switch", *names, "--folder", tmp_path]
    with several_hosts(2, folder) as hosts, subprocess.Popen(words, stdout=subprocess.PIPE) as switch:
        assert switch.stdout is not None
        switch.stdout.readline()
        for host, name in zip(hosts, names, strict=True):
            host.run("ip link del eth0")
            subprocess.run(["ip", "link", "set", name, "netns", str(host.init), "name", "eth0"], env=ADMIN, check=True)
            host.run(f"ip addr add {NETWORK}.{host.number}/24 dev eth0 && ip link set eth0 up")
        start = Start(hosts, tmp_path)
        try:
            job = start.training()
            began, before = time.monotonic(), job.check_saved()
            time.sleep(3 * COLLECTIVE_TIMEOUT)
            steps, seconds = job.check_saved() - before, time.monotonic() - began
            assert steps > 0, job.text
            assert job.process.poll() is None, job.text
            print(f"| 20 ms and 1 % loss | goes on, {1000 * seconds / steps:.0f} ms a step | | | whole |")
        finally:
            for one in start.jobs:
                one.kill()
            switch.kill()


@pytest.mark.exhaustive
@needs_mpi
def test_a_silent_host_ends_mpirun(start: Start, python_with_mpi: Path) -> None:
    job = start.training(60, by=f"{MPIRUN} {INTERFACE} {KEEPALIVE} {python_with_mpi}")
    start.hosts[1].link(up=False)
    job.fault()
    assert job.end(60 + MARGIN) != 0, job.text
    assert "ORTE has lost communication with a remote daemon" in job.text
    assert re.search(r"Remote daemon: .* on node host2", job.text), job.text
    job.row("link down for good under mpirun, keepalive 5 + 4 * 3 s", job.check_saved())


@pytest.mark.exhaustive
@needs_mpi
def test_a_killed_worker_is_named_by_mpirun(start: Start, python_with_mpi: Path) -> None:
    job = start("kill 1", 60, by=f"{MPIRUN} {INTERFACE} {KEEPALIVE} {python_with_mpi}")
    job.wait_for("FAULT AT")
    job.fault()
    assert job.end() != 0, job.text
    assert job.error.startswith("horovod: worker 1 on host2 was killed (SIGKILL: from outside"), job.text
    assert re.search(r"process rank 1 with PID \d+ on node host2 exited on signal 9", job.text), job.text
    job.row("worker killed under mpirun", job.check_saved())


@pytest.mark.exhaustive
@needs_mpi
def test_a_network_that_leads_nowhere_ends_the_start_under_mpi(start: Start, python_with_mpi: Path) -> None:
    """As docker0, with the same address on every host."""
    commands = "ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up"
    for host in start.hosts:
        assert host.run(commands).returncode == 0
    try:
        job = start("never 9", by=f"{MPIRUN} {python_with_mpi}")  # which has a start_timeout of 5 s
        assert job.end(START) == 1, job.text
        assert "did not connect to the others within 5 s (start_timeout)" in job.error, job.text
        assert "docker0 172.17.0.1" in job.error
        assert "mpirun -mca btl_tcp_if_include NAME -mca oob_tcp_if_include NAME" in job.error
        job.row("a network that leads nowhere, under mpirun (seconds from the command on)")
        job.end()
        job = start.training(60, by=f"{MPIRUN} {INTERFACE} {python_with_mpi}")
        assert job.check_saved() > 0
    finally:
        for host in start.hosts:
            host.run("ip link del docker0")


@contextmanager
def own_folder(host: Host, folder: Path, options: str = "") -> Iterator[None]:
    """Within the block a host has an empty folder of its own at this place, as on a disk that the others do not see."""
    folder.mkdir(exist_ok=True)
    assert host.run(f"mount -t tmpfs {options} tmpfs {folder}").returncode == 0
    try:
        yield
    finally:
        host.run(f"umount {folder}")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("fault", "folder"), [("clone missing", SCRIPTS), ("environment missing", ROOT / "dcl_lightning")]
)
def test_a_host_that_lacks_something_ends_the_job(fault: str, folder: Path, start: Start) -> None:
    with own_folder(start.hosts[1], folder):
        job = start("signal 9")
        assert job.end(START) == 1, job.text
        assert re.search(r"^\[1\]<stderr>:.*(No such file|Error)", job.err.read_text(), re.MULTILINE), job.text
        job.row(f"{fault} on one host (seconds from the command on)")


FIT = f"horovodrun --gloo {ON_BOTH} dcl-lightning fit --trainer.strategy horovod --trainer.accelerator cpu --model nil"


@pytest.mark.exhaustive
def test_a_host_with_another_configuration_is_refused(start: Start) -> None:
    """The same path, another file."""
    folder, content = start.folder / "own", "data: {{dataset: digits}}\nmodel: {{lr: {}}}\n"
    folder.mkdir()
    (folder / "c.yaml").write_text(content.format(0.1))
    with own_folder(start.hosts[1], folder):
        (start.folder / "other.yaml").write_text(content.format(0.2))
        assert start.hosts[1].run(f"cp {start.folder}/other.yaml {folder}/c.yaml").returncode == 0
        job = SpreadJob(start.hosts, start.folder, f"{FIT} --config {folder}/c.yaml")
        start.jobs.append(job)
        assert job.end(START) == 1, job.text
        assert "lr" in job.text
        assert "differ" in job.text
        job.row("another configuration on one host (seconds from the command on)")


@pytest.mark.exhaustive
def test_a_host_with_other_data_is_refused(start: Start) -> None:
    """As many images, in files of the same names; one of their labels is another."""
    folder, copy = start.folder / "sets", start.folder / "copy"
    small_sets.mnist(folder)
    shutil.copytree(folder, copy)
    (labels,) = copy.rglob("train-labels-idx1-ubyte")
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x00")
    with own_folder(start.hosts[1], folder):
        assert start.hosts[1].run(f"cp -r {copy}/. {folder}").returncode == 0
        mnist = f"--data.dataset mnist --data.root {folder} --data.increment 5"
        job = SpreadJob(start.hosts, start.folder, f"{FIT} {mnist}")
        start.jobs.append(job)
        assert job.end(START) == 1, job.text
        assert re.search("workers differ: the labels of the data is .* on worker 0 and .* on worker 1", job.text)
        job.row("other data on one host (seconds from the command on)")


@pytest.mark.exhaustive
def test_clocks_that_differ_are_no_fault(start: Start) -> None:
    own = start.folder / "own"
    (start.folder / "sitecustomize.py").write_text("import time\ntrue = time.time\ntime.time = lambda: true() + 7200\n")
    with own_folder(start.hosts[1], own):
        assert start.hosts[1].run(f"cp {start.folder}/sitecustomize.py {own}").returncode == 0
        job = start.training(by=f"env PYTHONPATH={own}:{ROOT} {HOROVODRUN}")
        try:
            times = sorted(float(line.split()[-1]) for line in job.out.read_text().splitlines() if "CLOCK" in line)
            assert times[1] - times[0] > 7000, job.text
            assert job.check_saved() > 0
            print("| clock two hours off on one host | goes on | | | whole |")
        finally:
            job.kill()


@pytest.mark.exhaustive
def test_a_full_disk_ends_the_job_and_leaves_what_was_saved(start: Start) -> None:
    folder = start.folder / "checkpoints"
    with own_folder(start.hosts[0], folder, "-o size=16k"):
        job = start("signal 9")
        code = job.end(START)
        assert code != 0, job.text
        assert "No space left on device" in job.text
        start.hosts[0].run(f"cp {folder}/last.ckpt {start.folder}")
        job.row("disk full on the launching host (seconds from the command on)", job.check_saved(".", "last.ckpt"))


@pytest.mark.exhaustive
def test_hosts_without_a_shared_folder_of_runs_are_told(start: Start) -> None:
    """Worker 0 saves; a job that resumes would miss its file on the other host."""
    folder = start.folder / "runs"
    command = f"{FIT} --data.dataset digits --model.epochs_per_task 1 --trainer.logger.init_args.save_dir {folder}"
    with own_folder(start.hosts[1], folder):
        job = SpreadJob(start.hosts, start.folder, command)
        start.jobs.append(job)
        code = job.end(START)
        assert code != 0, job.text
        assert re.match(r"error: worker 1 on host host2 wrote .*: checkpoints need a folder that all hosts", job.error)
        job.row("folder of runs not shared (seconds from the command on)")
