"""``dcl-lightning run`` over several hosts: hosts that are lost for good, hosts that join, and SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.distributed.hosts import Command, Host, needs_hosts, several_hosts

pytestmark = [needs_hosts, pytest.mark.exhaustive, pytest.mark.timeout(1200)]

FIT = "python cli.py fit --config configs/nil_digits.yaml --model nil_global --model.epochs_per_task 30"
FIT += " --trainer.strategy.class_path dcl_lightning.HorovodStrategy --trainer.strategy.collective_timeout 15"
FIT += " --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps=10"
FIT += " --trainer.callbacks.save_last=true --trainer.logger.init_args.save_dir {folder}"


class Run:
    """A supervised job that the first host starts, with one worker on each host.

    Args:
        hosts: all hosts.
        folder: an empty one.
    """

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        slots = ",".join(f"{host.name}:1" for host in hosts)
        launch = f"dcl-lightning run --max-restarts 4 --min-workers 1 -- horovodrun --gloo -np {len(hosts)} -H {slots} "
        with (folder / "said").open("w") as said:
            self.process: Command = hosts[0].popen(launch + FIT.format(folder=folder), stdout=said, stderr=said)

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def saves(self, times: int = 3, seconds: float = 300) -> None:
        """Wait until it has saved so often from now on."""
        end, before = time.monotonic() + seconds, self._saved()
        while times:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)
            saved = self._saved()
            times, before = times - (saved != before), saved

    def _saved(self) -> int:
        return max((file.stat().st_mtime_ns for file in self.folder.rglob("last.ckpt")), default=0)

    def kill_worker(self, host: Host) -> None:
        """Kill the one there, once those of a former start have ended, which may wait for a lost host."""
        end = time.monotonic() + 150
        workers = []
        while len(workers) != 1:
            assert time.monotonic() < end, workers
            time.sleep(0.5)
            workers = [p for p, line in host.processes().items() if re.match(r"\S*python\S* cli\.py fit", line)]
        os.kill(workers[0], signal.SIGKILL)

    def ends(self, *started_with: int) -> None:
        """It ends well, after starts with so many workers, has learnt every task, and leaves no process behind."""
        assert self.process.wait(timeout=600) == 0, self.said()
        counts = re.findall(r"horovod: (\d+) workers? on", self.said())
        # One worker alone says nothing of others.
        assert [int(count) for count in counts] == [count for count in started_with if count > 1]
        assert re.findall(r"restart .*, on (\d) workers?\n", self.said()) == [str(count) for count in started_with[1:]]
        (report,) = self.folder.rglob("accuracy_matrix.json")
        last = json.loads(report.read_text())["matrix"][-1]
        assert len(last) == 5
        assert min(last) > 0.5, last  # chance is 0.1
        assert_nothing_left(self.hosts)


def assert_nothing_left(hosts: list[Host]) -> None:
    """On hosts that are on; a login that has ended takes a moment to go."""
    end = time.monotonic() + 30
    while left := [line for h in hosts if h.process.poll() is None for line in h.processes().values()]:
        assert time.monotonic() < end, left
        time.sleep(0.5)


@pytest.fixture
def new_hosts(tmp_path: Path) -> Iterator[Callable[[int], list[Host]]]:
    """Makes hosts that a test may kill."""
    folder = tmp_path / "hosts"
    folder.mkdir()
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(several_hosts(count, folder))


def test_one_of_three_hosts_is_gone_for_good(new_hosts: Callable[[int], list[Host]], tmp_path: Path) -> None:
    hosts = new_hosts(3)
    run = Run(hosts, tmp_path)
    run.saves()
    hosts[2].kill()
    run.ends(3, 2)
    assert run.said().count("run: host1, host2 answer; no answer from host3\n") == 1


def test_a_host_that_is_back_is_used_at_the_next_restart(
    new_hosts: Callable[[int], list[Host]], tmp_path: Path
) -> None:
    hosts = new_hosts(3)
    run = Run(hosts, tmp_path)
    run.saves()
    hosts[2].kill()
    run.saves()
    hosts[2].start()
    run.kill_worker(hosts[1])
    run.ends(3, 2, 3)
    assert run.said().count("run: host1, host2, host3 answer\n") == 1


def test_from_one_host_to_two_and_back(new_hosts: Callable[[int], list[Host]], tmp_path: Path) -> None:
    hosts = new_hosts(2)
    hosts[1].kill()
    run = Run(hosts, tmp_path)
    run.saves()
    hosts[1].start()
    run.kill_worker(hosts[0])
    run.saves()
    hosts[1].kill()
    run.ends(1, 2, 1)


def test_sigterm_lets_the_workers_of_all_hosts_save(new_hosts: Callable[[int], list[Host]], tmp_path: Path) -> None:
    hosts = new_hosts(2)
    run = Run(hosts, tmp_path)
    run.saves()
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=60) == 143
    assert re.search(r"all workers stopped after step \d+ \(SIGTERM\); saved \S+/last.ckpt", run.said())
    assert_nothing_left(hosts)
