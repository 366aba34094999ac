"""Weak scaling on this machine: step times of one to four workers, under Horovod and under ddp, and with rehearsal.

Processes of one thread each hold a Horovod job and a torch.distributed group at once, and fit the same network in turn
under either strategy, with a memory that is drawn from globally, and each alone, without any exchange, all at the same
time; so the sides of a ratio meet the same noise and share the same cores. Each fit is Lightning's own, with the real
data module and agent; a callback times its steps after a warm-up, and what counts is the mean over the workers. Each
worker has the same number of samples a step, whatever the number of workers; where a memory is, half of them come out
of it. A row is the median over the rounds of the ratio within a round, with the 95 % interval of that median from a
bootstrap; the rows of several workers over one are of two runs, one after the other. More workers than cores take
turns: what they cost beside as many fits alone is what the exchange costs, and waiting for the slowest.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import CLASSES, HEADER, SPEC, WARM_UP, Filled, Size, report, rounds_of, step_ms, stream
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from rehearsal import full_buffer
from torch import nn

from dcl_lightning import NIL, FineTuning, HorovodStrategy
from dcl_lightning.backbones import MLP, ResNet
from dcl_lightning.memory.config import RehearsalConfig

WORKERS = (1, 2, 3, 4)
BATCH, DRAWN = 32, 16
STORED = 2_000  # rows of each worker
# Network, and how much is measured of it.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Size]] = {
    "ResNet-32": (lambda: ResNet(32), Size(9, 6)),
    "MLP": (MLP, Size(11, 40)),
}


def fits(network: Callable[[], nn.Module], steps: int, workers: int) -> dict[str, Callable[[], float]]:
    """Return the sides: each fits once on this worker, beside the others, and returns the mean step time of all."""
    samples = (WARM_UP + steps + 2) * BATCH * workers
    data, fewer = stream(samples, 32, BATCH), stream(samples // 2, 32, BATCH - DRAWN)
    filled = Filled(full_buffer(STORED, 32, samples // 2), workers)
    config = RehearsalConfig(
        buffer_size=STORED * workers, num_samples=DRAWN, scope="global", execution="blocking", prefetch="device"
    )

    def alone() -> float:
        return step_ms(FineTuning(network(), CLASSES, input_spec=SPEC), data, steps, devices=1)

    def under(strategy: Callable[[], Any]) -> float:
        agent = FineTuning(network(), CLASSES, input_spec=SPEC)
        return step_ms(agent, data, steps, strategy=strategy(), devices=workers)

    def rehearsing() -> float:
        agent = NIL(network(), CLASSES, config, input_spec=SPEC)
        return step_ms(agent, fewer, steps, filled, strategy=HorovodStrategy(), devices=workers)

    def ddp() -> DDPStrategy:
        # Gloo's group of torch lives as long as the process; Lightning takes the one that is there.
        return DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")

    sides = {"alone": alone, "horovod": lambda: under(HorovodStrategy), "rehearsing": rehearsing}
    if workers > 1:
        sides["ddp"] = lambda: under(ddp)
    return {name: lambda fit=fit: mean_over_workers(fit()) for name, fit in sides.items()}


def mean_over_workers(value: float) -> float:
    """Return the mean of what the workers measured; they go on together."""
    import horovod.torch as hvd

    return statistics.mean(hvd.allgather_object(value))


def measure(quick: bool) -> dict[str, dict[str, list[float]]]:
    """Be one worker; return for each network the step times of each side."""
    import horovod.torch as hvd

    hvd.init()
    found = {}
    for name, (network, (rounds, steps)) in NETWORKS.items():
        rounds, steps = (2, 3) if quick else (rounds, steps)
        found[name] = rounds_of(fits(network, steps, hvd.size()), rounds)
    return found


def launch(workers: int, quick: bool) -> dict[str, dict[str, list[float]]]:
    """Return what worker 0 of so many measured."""
    from dcl_lightning.distributed.horovod.rendezvous import started_workers

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "steps.json")
        command = [sys.executable, __file__, "--worker", "--json", str(file), *(["--quick"] if quick else [])]

        def start(rank: int, variables: dict[str, str]) -> subprocess.Popen[bytes]:
            group = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": workers}
            group |= {"LOCAL_WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            place = {name: str(value) for name, value in group.items()}
            return subprocess.Popen(command, env={**os.environ, **variables, **place}, stdout=subprocess.DEVNULL)

        with started_workers(workers, 1, start) as processes:
            codes = [process.wait(timeout=1800) for process in processes]
        if any(codes):
            raise RuntimeError(f"workers ended with {codes}")
        return json.loads(file.read_text())


def rows_of(
    name: str, workers: int, sides: dict[str, list[float]], one: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Print the rows of so many workers and return them; the sides of one worker are those of another run."""
    group = "one worker" if workers == 1 else f"{workers} workers"

    def row(what: str, value: list[float], baseline: list[float], target: str = "reported") -> dict[str, Any]:
        return report(f"{name}, {group}, {what}", "ms", value, baseline, target)

    plain, alone = sides["horovod"], sides["alone"]
    rows = [
        row("horovod over as many fits alone", plain, alone),
        row("with a memory drawn from globally over horovod", sides["rehearsing"], plain),
    ]
    if workers > 1:
        goal = "<= 1.1" if (name, workers) == ("ResNet-32", 2) else "reported"
        rows += [
            row("horovod over ddp", plain, sides["ddp"], goal),
            row("horovod over one worker", plain, one["horovod"]),
            row("fits alone over one fit alone", alone, one["alone"]),
        ]
    return rows


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds of few steps: whether it runs, no figures")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="numbers of workers, the first 1")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.worker:
        found = measure(options.quick)
        if os.environ["HOROVOD_RANK"] == "0":
            options.json.write_text(json.dumps(found))
        return
    print(HEADER)
    one: dict[str, dict[str, list[float]]] = {}
    rows: list[dict[str, Any]] = []
    for workers in options.workers:
        found = launch(workers, options.quick)
        one = one or found
        for name, sides in found.items():
            rows += rows_of(name, workers, sides, one[name])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
