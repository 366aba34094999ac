"""A slow network: a step of two hosts that are 0, 2 and 20 ms apart, under ddp and Horovod, alone and with a memory.

The hosts are network namespaces of this machine, joined by a switch in user space that holds every packet back for half
the round trip; that takes root and iproute2. In each a process of one thread fits the same network in turn under either
strategy, without a memory, with one of each worker's own and with one that is drawn from globally; so the sides of a
ratio meet the same noise. Every fit is Lightning's own, with the real data module and agent. What counts is the median
of its steps after a warm-up, the mean over the workers; a row is the median over the rounds of the ratio within a
round, with its 95 % interval from a bootstrap. A last part counts round trips: what a step of the MLP takes longer at
100 ms than at 50 ms, over 50 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import itertools
import json
import logging
import os
import random
import select
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import CLASSES, HEADER, SPEC, WARM_UP, Filled, Size, quiet_trainer, report, rounds_of, stream
from rehearsal import full_buffer
from torch import nn

from dcl_lightning import NIL, ContinualAgent, FineTuning, HorovodStrategy
from dcl_lightning.backbones import MLP, ResNet
from dcl_lightning.memory.config import RehearsalConfig

ROUND_TRIPS_MS = (0.0, 2.0, 20.0)
COUNTED_MS = (50.0, 100.0)
HOSTS = 2
NEW, DRAWN, STORED = 16, 16, 1_000  # rows of each worker
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Size]] = {
    "MLP": (lambda: MLP([100, 100]), Size(7, 20)),
    "ResNet-20": (lambda: ResNet(20), Size(5, 10)),
}
MEMORIES = ("base", "local", "global")
_TAP, _SET_INTERFACE, _NO_HEADER = 0x0002, 0x400454CA, 0x1000


# -- the network ---------------------------------------------------------------------------------------


def serve_switch(names: list[str], control: Path) -> None:
    """Be the switch between the interfaces.

    Args:
        names: of the interfaces, which are made.
        control: file with the round trip in ms, by half of which packets are late, and the per cent that are lost, if
            any; read again and again.
    """
    taps = []
    for name in names:
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tap, _SET_INTERFACE, struct.pack("16sH22x", name.encode(), _TAP | _NO_HEADER))
        taps.append(tap)
    print("ready", flush=True)
    late: deque[tuple[float, int, bytes]] = deque()
    delay, loss, looked = 0.0, 0.0, 0.0
    luck = random.Random(0)
    while True:
        now = time.monotonic()
        if now - looked > 0.05:
            said = [*map(float, control.read_text().split()), 0.0, 0.0]
            delay, loss, looked = said[0] / 2e3, said[1] / 100, now
        while late and late[0][0] <= now:
            _, tap, packet = late.popleft()
            with contextlib.suppress(OSError):
                os.write(tap, packet)
        wait = min(0.05, late[0][0] - now) if late else 0.05
        for ready in select.select(taps, [], [], max(0.0, wait))[0]:
            with contextlib.suppress(OSError):  # nothing more, or an interface that is down
                while True:
                    packet = os.read(ready, 16384)
                    if luck.random() >= loss:
                        late += [(time.monotonic() + delay, tap, packet) for tap in taps if tap != ready]


@contextlib.contextmanager
def hosts(folder: Path) -> Iterator[list[str]]:
    """Yield the names of the namespaces; the file ``round_trip`` of the folder holds the milliseconds between them."""

    def ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True)

    names = [f"late{os.getpid() % 100000}{'abcdef'[k]}" for k in range(HOSTS)]
    control = folder / "round_trip"
    control.write_text("0")
    command = [sys.executable, __file__, "--switch", *names, "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as switch:
        try:
            assert switch.stdout is not None
            switch.stdout.readline()
            for k, name in enumerate(names):
                ip(f"netns add {name}")
                ip(f"link set {name} netns {name} name eth0 mtu 9000")
                ip(f"-n {name} addr add 10.79.0.{k + 1}/24 dev eth0")
                ip(f"-n {name} link set eth0 up")
                ip(f"-n {name} link set lo up")
                etc = Path("/etc/netns", name)
                etc.mkdir(parents=True)
                (etc / "hosts").write_text("".join(f"10.79.0.{j + 1} {other}\n" for j, other in enumerate(names)))
            yield names
        finally:
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
                shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)
            switch.kill()


def launch(names: list[str], options: list[str]) -> int:
    """Be the launcher, on the first host: start a worker on each, and return their worst exit code."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port = server.start()
    server.init(get_host_assignments(parse_hosts(",".join(f"{name}:1" for name in names)), len(names)))
    workers = []
    for rank, name in enumerate(names):
        horovod = {
            "HOSTNAME": name, "RANK": rank, "SIZE": len(names), "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "CROSS_RANK": rank,
            "CROSS_SIZE": len(names), "CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo", "GLOO_IFACE": "eth0",
            "GLOO_RENDEZVOUS_ADDR": "10.79.0.1", "GLOO_RENDEZVOUS_PORT": port, "GLOO_TIMEOUT_SECONDS": 300,
        }  # fmt: skip
        group = {
            "RANK": rank, "LOCAL_RANK": 0, "GROUP_RANK": rank, "WORLD_SIZE": len(names), "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": "10.79.0.1", "MASTER_PORT": 0, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        place = {f"HOROVOD_{key}": value for key, value in horovod.items()} | group
        # Its own host name too: Horovod and torch listen at the address that this stands for.
        command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        command += [sys.executable, __file__, "--worker", *options]
        workers.append(subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in place.items()}))
    return max(worker.wait() for worker in workers)


# -- a worker ------------------------------------------------------------------------------------------


class Steps(pl.Callback):
    """Takes the time of each step after the warm-up, from the start of its batch to that of the next."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Note the time."""
        self.began.append(1e3 * time.perf_counter())

    def median(self) -> float:
        """Return the median in milliseconds."""
        began = self.began[WARM_UP:]
        return statistics.median(b - a for a, b in itertools.pairwise(began))


def fits(network: Callable[[], nn.Module], steps: int) -> dict[str, Callable[[], float]]:
    """Return the sides, as "strategy memory": each fits once and returns the median of its steps."""
    samples = (WARM_UP + steps + 3) * NEW * HOSTS
    filled = Filled(full_buffer(STORED, 32, samples), HOSTS)
    # A step without a memory is one of as many rows.
    rehearsed, plain = stream(samples, 32, NEW), stream(samples * (NEW + DRAWN) // NEW, 32, NEW + DRAWN)
    ports = iter(range(29600, 32000))

    def agent(memory: str) -> ContinualAgent:
        if memory == "base":
            return FineTuning(network(), CLASSES, input_spec=SPEC)
        config = RehearsalConfig(
            buffer_size=STORED * HOSTS, num_samples=DRAWN, scope=memory, execution="blocking", prefetch="device"
        )
        return NIL(network(), CLASSES, config, input_spec=SPEC)

    def fit(strategy: str, memory: str) -> float:
        timer, callbacks = Steps(), [] if memory == "base" else [filled]
        os.environ["MASTER_PORT"] = str(next(ports))
        chosen = HorovodStrategy() if strategy == "horovod" else _ddp()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = quiet_trainer(
                folder, timer, *callbacks, strategy=chosen, devices=1, num_nodes=HOSTS,
                limit_train_batches=WARM_UP + steps + 2,
            )  # fmt: skip
            trainer.fit(agent(memory), datamodule=plain if memory == "base" else rehearsed)
        if torch.distributed.is_initialized():  # where it is, Lightning sends a message before every batch
            torch.distributed.destroy_process_group()
        return _mean_over_workers(timer.median())

    return {
        f"{strategy} {memory}": lambda strategy=strategy, memory=memory: fit(strategy, memory)
        for memory in MEMORIES
        for strategy in ("ddp", "horovod")
    }


def _ddp() -> Any:
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")


def _mean_over_workers(value: float) -> float:
    import horovod.torch as hvd

    return statistics.mean(hvd.allgather_object(value))


def work(folder: Path, quick: bool, networks: list[str], count: bool) -> None:
    """Be one worker: measure, and leave what was found in the folder."""
    import horovod.torch as hvd

    torch.set_num_threads(1)
    hvd.init()
    found: dict[str, dict[str, dict[str, list[float]]]] = {}

    def at(round_trip: float, sides: dict[str, Callable[[], float]]) -> dict[str, Callable[[], float]]:
        def side(call: Callable[[], float]) -> float:
            (folder / "round_trip").write_text(str(round_trip))
            hvd.barrier()
            time.sleep(0.1)
            return call()

        return {f"{name} {round_trip:g}": lambda call=call: side(call) for name, call in sides.items()}

    for name in networks:
        network, (rounds, steps) = NETWORKS[name]
        rounds, steps = (1, 8) if quick else (rounds, steps)
        sides = fits(network, steps)
        every = {key: call for ms in ROUND_TRIPS_MS for key, call in at(ms, sides).items()}
        found[name] = rounds_of(every, rounds)
    if count:
        sides = fits(NETWORKS["MLP"][0], 3 if quick else 12)
        found["round trips"] = rounds_of({k: c for ms in COUNTED_MS for k, c in at(ms, sides).items()}, 1)
    if hvd.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    hvd.barrier()


# -- the tables ----------------------------------------------------------------------------------------


def tables(found: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Print what was found and return the rows."""
    counted = found.pop("round trips", None)
    print("| ms a step | round trip | " + " | ".join(f"{s} {m}" for m in MEMORIES for s in ("ddp", "horovod")) + " |")
    print("|---|---|" + "---|" * 2 * len(MEMORIES))
    for name, sides in found.items():
        for ms in ROUND_TRIPS_MS:
            medians = [statistics.median(sides[f"{s} {m} {ms:g}"]) for m in MEMORIES for s in ("ddp", "horovod")]
            print(f"| {name} | {ms:g} ms | " + " | ".join(f"{value:.1f}" for value in medians) + " |")
    rows = []
    print(f"\n{HEADER}")
    for name, sides in found.items():
        for ms in ROUND_TRIPS_MS:

            def row(what: str, against: str, goal: float, sides: Any = sides, name: str = name, ms: float = ms) -> None:
                target = f"<= {goal:g}" if ms == ROUND_TRIPS_MS[-1] else "reported"
                values, baseline = sides[f"{what} {ms:g}"], sides[f"{against} {ms:g}"]
                rows.append(report(f"{name}, {ms:g} ms, {what} over {against}", "ms", values, baseline, target))

            for memory in MEMORIES:
                row(f"horovod {memory}", f"ddp {memory}", 1.15)
            for strategy in ("ddp", "horovod"):
                row(f"{strategy} local", f"{strategy} base", 1.05)
                row(f"{strategy} global", f"{strategy} base", 1.1)
    if counted:
        print("\n| round trips a step of the MLP | ddp | horovod |\n|---|---|---|")
        near, far = COUNTED_MS
        for memory in MEMORIES:
            trips = {}
            for strategy in ("ddp", "horovod"):
                apart = [counted[f"{strategy} {memory} {ms:g}"][0] for ms in COUNTED_MS]
                trips[strategy] = (apart[1] - apart[0]) / (far - near)
                name = f"round trips a step, {strategy} {memory}"
                rows.append({"name": name, "value": trips[strategy], "unit": "", "baseline": None, "ratio": None})
            print(f"| {memory} | {trips['ddp']:.1f} | {trips['horovod']:.1f} |")
    return rows


def main() -> None:
    """Print the tables; with --json also write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few steps: whether it runs, no figures")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--no-count", action="store_true", help="leave the round trips uncounted")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--switch", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--launch", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if options.switch:
        serve_switch(options.switch, options.folder / "round_trip")
    if options.worker:
        work(options.folder, options.quick, options.networks, not options.no_count)
        return
    if options.launch:
        names, rest = options.launch, sys.argv[sys.argv.index("--folder") :]
        sys.exit(launch(names, rest))
    if os.name != "posix" or os.geteuid() or not shutil.which("ip"):
        print("Not measured: network namespaces take root and iproute2.")
        return
    with tempfile.TemporaryDirectory() as name, hosts(Path(name)) as names:
        command = ["ip", "netns", "exec", names[0], sys.executable, __file__, "--launch", *names, "--folder", name]
        command += [*(["--quick"] if options.quick else []), *(["--no-count"] if options.no_count else [])]
        subprocess.run([*command, "--networks", *options.networks], check=True)
        found = json.loads(Path(name, "found.json").read_text())
    rows = tables(found)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
