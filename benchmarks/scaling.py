"""Weak scaling on this machine: step times of one and of two workers, under Horovod and under ddp.

Two processes of one thread each hold a Horovod job and a torch.distributed group at once, and fit the same network in
turn under either strategy; so both sides of a ratio meet the same noise. Each fit is Lightning's own, with the real
data module and agent; a callback times its steps after a warm-up. Each worker has the same number of samples whatever
the number of workers. A row is the median over the rounds of the ratio within a round, with the 95 % interval of that
median from a bootstrap; the rows of one worker against two are of two runs, one after the other.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import CLASSES, HEADER, SPEC, WARM_UP, Size, report, rounds_of, step_ms, stream
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from dcl_lightning import FineTuning, HorovodStrategy
from dcl_lightning.backbones import MLP, ResNet

BATCH = 32
# Network, and how much is measured of it.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Size]] = {
    "ResNet-32": (lambda: ResNet(32), Size(9, 8)),
    "MLP": (MLP, Size(15, 60)),
}


def fit_ms(strategy: Any, network: Callable[[], nn.Module], steps: int, workers: int) -> float:
    """Return the mean time of a step of one fit on this worker."""
    data = stream((WARM_UP + steps + 1) * BATCH * workers, 32, BATCH)
    agent = FineTuning(network(), CLASSES, input_spec=SPEC)
    return step_ms(agent, data, steps, strategy=strategy, devices=workers)


def measure(quick: bool) -> dict[str, dict[str, list[float]]]:
    """Be one worker; return for each network the step times of each strategy."""
    workers = int(os.environ.get("HOROVOD_SIZE", 1))
    strategies: dict[str, Callable[[], Any]] = {"horovod": HorovodStrategy}
    if workers > 1:
        # Gloo's group of torch lives as long as the process; Lightning takes the one that is there.
        strategies["ddp"] = lambda: DDPStrategy(
            cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo"
        )
    else:
        strategies["auto"] = lambda: "auto"
    found = {}
    for name, (network, (rounds, steps)) in NETWORKS.items():
        rounds, steps = (2, 3) if quick else (rounds, steps)
        sides = {
            key: lambda make=make, network=network, steps=steps: fit_ms(make(), network, steps, workers)
            for key, make in strategies.items()
        }
        found[name] = rounds_of(sides, rounds)
    return found


def launch(workers: int, quick: bool) -> dict[str, dict[str, list[float]]]:
    """Return what worker 0 of so many measured."""
    from dcl_lightning.distributed.workers import started_workers

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


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds of few steps: whether it runs, no figures")
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
    two, one = launch(2, options.quick), launch(1, options.quick)
    print(HEADER)
    rows: list[dict[str, Any]] = []
    for name in NETWORKS:
        target = "<= 1.1" if name == "ResNet-32" else "reported"
        rows += [
            report(f"{name}, two workers, horovod over ddp", "ms", two[name]["horovod"], two[name]["ddp"], target),
            report(
                f"{name}, horovod, two workers over one", "ms", two[name]["horovod"], one[name]["horovod"], "reported"
            ),
            report(f"{name}, ddp over one process", "ms", two[name]["ddp"], one[name]["auto"], "reported"),
        ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
