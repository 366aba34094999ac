"""Several hosts on one machine: namespaces of network, names, mounts and processes, a bridge between them, and sshd.

Nothing here has a name on the machine, and all of it lives as long as its processes do, which end with this one.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.workers import ROOT, environment

NETWORK = "10.213.0"
SSHD_PATH = "/usr/sbin/sshd"
# Without PATH and PYTHONPATH of its own, as the environment at the same place on every host.
ADMIN = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
# Ends with the process that starts it, also when that one is killed.
BOUND = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net")

SWITCH = "ip link add br0 type bridge && ip link set br0 up && echo ready && exec sleep infinity"

# Each host has its own /run and /dev/shm; everything else is one file system for all of them.
HOST = f"""
set -e
hostname "$1"
ip link set lo up
for path in "$2"/*; do mount --bind "$path" "/etc/$(basename "$path")"; done
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec {SSHD_PATH} -D -e
"""

SSH_CONFIG = """\
IdentityFile /etc/ssh/id
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""

SSHD_CONFIG = """\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/id.pub
StrictModes no
PasswordAuthentication no
PermitRootLogin yes
UsePAM no
PidFile none
"""


@functools.cache
def why_not() -> str | None:
    """Why no hosts can be made on this machine; None if they can."""
    if os.geteuid() != 0:
        return "hosts are namespaces, which only root makes"
    missing = [name for name in ("ip", "setpriv", "unshare", "ssh") if shutil.which(name, path=ADMIN["PATH"]) is None]
    if missing or not Path(SSHD_PATH).exists():
        return "hosts need `apt-get install iproute2 openssh-server`"
    words = [*BOUND, "bash", "-c", "ip link add br0 type bridge"]
    probe = subprocess.run(words, env=ADMIN, capture_output=True, text=True)
    return f"this machine lets no hosts be made: {probe.stderr.strip()}" if probe.returncode else None


needs_hosts = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


class Command(subprocess.Popen[str]):
    """A command on a host. A signal reaches the command itself, not the ``nsenter`` that started it."""

    def send_signal(self, sig: int) -> None:
        for pid in _children(self.pid):
            os.kill(pid, sig)


class Host:
    """A machine of its own, as far as programs can tell, with this machine's file system.

    Args:
        name: what it calls itself and what the others call it.
        number: the last part of its addresses.
        folder: of this network, with ``etc``; gets the log of sshd.
        switch: process id of the namespace with the bridge.
    """

    def __init__(self, name: str, number: int, folder: Path, switch: int) -> None:
        self.name, self.number, self.folder = name, number, folder
        self._at_switch = ["nsenter", "-t", str(switch), "-n", "ip"]
        self.start()

    def start(self) -> None:
        """Switch it on, at first or after :meth:`kill`; return when one can log in."""
        log = self.folder / f"sshd_{self.name}.log"
        words = [*BOUND, "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        words += ["bash", "-c", HOST, "-", self.name, str(self.folder / "etc")]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                words, env=ADMIN, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        end = time.monotonic() + 30
        while "Server listening" not in log.read_text():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"{self.name} did not start:\n{log.read_text()}")
            time.sleep(0.02)
        (self.init,) = _children(self.process.pid)
        # The card keeps its address when the host comes back, as others remember it.
        card = f"eth0 address 02:00:00:00:00:{self.number:02x}"
        self._ip(f"link add {self.name} type veth peer name {card} netns {self.init}")
        self._ip(f"link set {self.name} master br0 up")
        done = self.run(f"ip addr add {NETWORK}.{self.number}/24 dev eth0 && ip link set eth0 up", cwd=Path("/"))
        assert done.returncode == 0, done.stderr

    def _ip(self, words: str) -> None:
        subprocess.run([*self._at_switch, *words.split()], env=ADMIN, check=True)

    def link(self, up: bool) -> None:
        """Plug its cable in or pull it out, at the switch."""
        self._ip(f"link set {self.name} {'up' if up else 'down'}")

    def kill(self) -> None:
        """Kill all that runs there at once, as a lost machine does; nothing answers at its address."""
        for pid in _children(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        # The kernel would remove it a little later.
        subprocess.run([*self._at_switch, "link", "del", self.name], env=ADMIN, capture_output=True)

    def popen(self, command: str, cwd: Path = ROOT, **options: Any) -> Command:
        """Start a command line as somebody who is logged in there, with this environment's programs on the path."""
        # Horovod keeps in the home folder which hosts it could log in to.
        variables = environment() | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "HOME": str(self.folder / "home")}
        variables["PATH"] = f"{Path(sys.executable).parent}:{ADMIN['PATH']}"
        words = ["nsenter", "-t", str(self.init), "-n", "-u", "-i", "-m", "-p", "env", "-C", str(cwd)]
        return Command([*words, "bash", "-c", command], env=variables, stdin=subprocess.DEVNULL, text=True, **options)

    def run(self, command: str, cwd: Path = ROOT, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command line as :meth:`popen` does, to its end; ``timeout`` in seconds."""
        with self.popen(command, cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def processes(self) -> dict[int, str]:
        """Command lines of what runs there beside the sshd that waits, by this machine's process ids."""
        namespace, found = os.readlink(f"/proc/{self.init}/ns/pid"), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns" / "pid") == namespace and folder.name != str(self.init):
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:  # ended meanwhile
                continue
        return {pid: line for pid, line in found.items() if line}  # a dead process has none


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@contextmanager
def several_hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """``host1``, ``host2``, ... on one network, which log in to one another; all of it is gone at the end.

    Args:
        count: number of hosts.
        folder: an empty one for keys and logs.
    """
    names = [f"host{k + 1}" for k in range(count)]
    (folder / "home").mkdir()
    _write_etc(folder / "etc", names)
    with ExitStack() as stack:
        switch = subprocess.Popen([*BOUND, "bash", "-c", SWITCH], env=ADMIN, stdout=subprocess.PIPE, text=True)
        stack.enter_context(switch)
        stack.callback(switch.kill)
        assert switch.stdout is not None
        assert switch.stdout.readline() == "ready\n"
        hosts = []
        for number, name in enumerate(names, start=1):
            hosts.append(Host(name, number, folder, switch.pid))
            stack.callback(hosts[-1].kill)
        yield hosts


def _write_etc(etc: Path, names: list[str]) -> None:
    ssh = etc / "ssh"
    ssh.mkdir(parents=True)
    lines = [f"{NETWORK}.{number} {name}" for number, name in enumerate(names, start=1)]
    (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    for key in ("id", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)], check=True)
    (ssh / "ssh_config").write_text(SSH_CONFIG)
    (ssh / "sshd_config").write_text(SSHD_CONFIG)
