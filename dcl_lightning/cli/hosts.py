"""Hosts that a launcher was given with ``-H`` or a host file: which of them answer, and a job on these alone."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dcl_lightning.distributed.horovod.relay import own_address
from dcl_lightning.errors import ConfigurationError

__all__ = [
    "answering_hosts", "apart", "hosts_of", "number_place", "on_hosts", "ssh_options",
    "workers_on",
]  # fmt: skip

# Options of launchers: the number of workers, the hosts, a file of them.
_NUMBER = ("-np", "--num-proc", "-n", "--np")
_HOSTS = ("-H", "--hosts", "-host", "--host")
_FILE = ("-hostfile", "--hostfile", "-machinefile", "--machinefile")
_PORT, _IDENTITY, _MPI_SSH = ("-p", "--ssh-port"), ("-i", "--ssh-identity-file"), ("plm_rsh_args",)
_ANSWER_S = 10
_QUESTION = (
    "-n", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWER_S}", "-o", "StrictHostKeyChecking=no",
    "-o", "PasswordAuthentication=no",
)  # fmt: skip


def apart(words: Sequence[str]) -> list[str]:
    """Return the words of a job with a launcher's ``--option=value`` as two words, where the option is one of these."""
    fit = words.index("fit")
    known = (*_NUMBER, *_HOSTS, *_FILE, *_PORT, *_IDENTITY)
    return [
        part
        for place, word in enumerate(words)
        for part in (word.split("=", 1) if place < fit and word.partition("=")[0] in known else [word])
    ]


def number_place(words: Sequence[str]) -> int | None:
    """Return the index of the launcher's number of workers; None without one."""
    return _place(words, _NUMBER)


def hosts_of(words: Sequence[str]) -> dict[str, int]:
    """Return the launcher's hosts with their numbers of workers; empty if it was given none.

    Args:
        words: of a job, ``apart``.

    Raises:
        ConfigurationError: the host file cannot be read.
    """
    listed, file = _place(words, _HOSTS), _place(words, _FILE)
    entries: list[tuple[str, str]] = []
    if listed is not None:
        entries = [(host, slots) for host, _, slots in (word.partition(":") for word in words[listed].split(","))]
    elif file is not None:
        try:
            lines = Path(words[file]).read_text().splitlines()
        except OSError as error:
            reason = f"run: {words[file - 1]} {words[file]} cannot be read ({error.strerror})"
            raise ConfigurationError(f"{reason}: give a host file, or -H host1:2,host2:2") from None
        for line in lines:
            name, _, rest = line.partition("#")[0].strip().partition(" ")
            slots = re.search(r"\bslots\s*=\s*(\d+)", rest)
            entries += [(name, slots[1] if slots else "")] if name else []
    hosts: dict[str, int] = {}
    for name, number in entries:
        hosts[name] = hosts.get(name, 0) + (int(number) if number.isdigit() else 1)
    return hosts


def on_hosts(words: Sequence[str], hosts: Mapping[str, int]) -> list[str]:
    """Return the words of a job for these hosts alone: ``-H`` in place of what named them, and at most their workers.

    Args:
        words: of a job with ``hosts_of``, ``apart``.
        hosts: some of them.
    """
    changed, number = list(words), number_place(words)
    if number is not None:
        changed[number] = str(workers_on(words, hosts))
    place = _place(words, (*_HOSTS, *_FILE))
    assert place is not None
    option = words[place - 1] if words[place - 1] in _HOSTS else "-H"
    changed[place - 1 : place + 1] = [option, ",".join(f"{host}:{slots}" for host, slots in hosts.items())]
    return changed


def workers_on(words: Sequence[str], hosts: Mapping[str, int]) -> int:
    """Return the number of workers of a job on these hosts: what they hold, at most the launcher's number."""
    number, held = number_place(words), sum(hosts.values())
    return held if number is None or not words[number].isdigit() else min(int(words[number]), held)


def ssh_options(words: Sequence[str]) -> list[str]:
    """Return the options with which the launcher calls ssh: those that it was given."""
    port, identity, mpi = _place(words, _PORT), _place(words, _IDENTITY), _place(words, _MPI_SSH)
    options = [] if port is None else ["-p", words[port]]
    options += [] if identity is None else ["-i", words[identity]]
    return options + ([] if mpi is None else shlex.split(words[mpi]))


def answering_hosts(hosts: Mapping[str, int], options: Sequence[str]) -> dict[str, int]:
    """Return the hosts that ssh reaches without a password, all asked at once; this host needs none.

    Args:
        hosts: numbers of workers by host.
        options: of ssh.
    """
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = list(pool.map(lambda host: _answers(host, options), hosts))
    return {host: slots for (host, slots), answer in zip(hosts.items(), answers, strict=True) if answer}


def _answers(host: str, options: Sequence[str]) -> bool:
    try:
        if _is_here(socket.gethostbyname(host)):
            return True
        asked = subprocess.run(["ssh", *options, *_QUESTION, host, "true"], capture_output=True, timeout=2 * _ANSWER_S)
        return asked.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _is_here(address: str) -> bool:
    return address.startswith("127.") or own_address(address) == address


def _place(words: Sequence[str], options: Sequence[str]) -> int | None:
    """Return the index of the value of a launcher's option; None without the option."""
    launcher = words[: words.index("fit")]
    return next((place + 1 for place, word in enumerate(launcher[:-1]) if word in options), None)
