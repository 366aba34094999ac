"""The global draw on 2, 3 and 4 Horovod workers of this machine: bytes a step, and what is waited for at collection.

Rows are CIFAR-sized (3x32x32 uint8, label, id and weight). An exchange starts before a step of a small
residual network and is collected after it. With fewer cores than workers the network's time grows, and
so does the wait, since the transfer's own threads want a core too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcl_lightning.memory.exchange import GlobalExchange, RowLayout, SentRows, plan_draws, plan_of

WORKERS = (2, 3, 4)
LARGER = (64, 128, 256, 512, 1024, 2048)
HIDDEN = 0.05  # a wait of this share of the step counts as hidden


class Network(nn.Module):
    """A few residual blocks."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean(dim=(2, 3)))


def training_step() -> Callable[[], None]:
    """Return what trains the network on one batch, without any collective."""
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    inputs, targets = torch.rand(8, 3, 32, 32), torch.randint(0, 100, (8,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()

    return step


def milliseconds(call: Callable[[], Any]) -> float:
    """Return how long the call took."""
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def measure(r: int, steps: int, held: int) -> dict[str, list[float]]:
    """Return for each step of this worker its bytes and times in ms."""
    from dcl_lightning.distributed.horovod.comm import HorovodComm

    comm = HorovodComm("benchmark")
    table = {
        "input": torch.randint(0, 256, (held, 3, 32, 32), dtype=torch.uint8),
        "target": torch.zeros(held, dtype=torch.int64),
        "id": torch.arange(held),
        "weight": torch.ones(held),
    }

    def gather(slots: Tensor) -> SentRows:
        return SentRows({name: column[slots] for name, column in table.items()})

    exchange = GlobalExchange(comm, gather, RowLayout(table), r, seed=0)
    compute = training_step()
    found: dict[str, list[float]] = {
        name: [] for name in ("header", "rows", "start", "wait", "step", "alone", "compute")
    }
    sizes = [0] * comm.size
    warmup = 5
    for step in range(-warmup, steps):
        number = 2 * (step + warmup)
        comm.barrier()
        values = {"compute": milliseconds(compute)}
        # The exchange alone, with nothing to hide behind.
        comm.barrier()
        started = time.perf_counter()
        exchange.start(number, sizes, held)
        sizes = exchange.collect().sizes
        values["alone"] = 1000 * (time.perf_counter() - started)
        # And started before a step, collected after it.
        comm.barrier()
        started = time.perf_counter()
        exchange.start(number + 1, sizes, held)
        values["start"] = 1000 * (time.perf_counter() - started)
        compute()
        drawn = exchange.collect()
        values["step"] = 1000 * (time.perf_counter() - started)
        assert len(drawn.rows["target"]) == min(r, sum(sizes))
        last = exchange.last
        values |= {"header": last.header_bytes, "rows": last.row_bytes, "wait": 1000 * last.wait_seconds}
        if step >= 0:
            for name, value in values.items():
                found[name].append(value)
    return {name: torch.cat(comm.allgather(torch.tensor(v, dtype=torch.float64))).tolist() for name, v in found.items()}


def work(options: argparse.Namespace) -> None:
    """Be one worker; worker 0 prints what all measured, by r."""
    import horovod.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    results = {r: measure(r, options.steps, options.held) for r in options.worker}
    if hvd.rank() == 0:
        print(json.dumps(results))
    hvd.barrier()
    hvd.shutdown()


def launch(count: int, draws: tuple[int, ...], options: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """Return what ``count`` workers measured, by r."""
    from dcl_lightning.distributed.horovod.rendezvous import started_workers

    command = [sys.executable, __file__, f"--steps={options.steps}", f"--held={options.held}"]
    command += ["--worker", *map(str, draws)]

    def start(rank: int, variables: dict[str, str]) -> subprocess.Popen[str]:
        stdout = output if rank == 0 else subprocess.DEVNULL
        return subprocess.Popen(command, env={**os.environ, **variables}, stdout=stdout, text=True)

    with tempfile.TemporaryFile("w+") as output:
        with started_workers(count, 1, start) as workers:
            codes = [worker.wait(timeout=600) for worker in workers]
        if any(codes):
            raise RuntimeError(f"workers ended with {codes}")
        output.seek(0)
        return {int(r): found for r, found in json.loads(output.read().splitlines()[-1]).items()}


def plan_milliseconds(workers: int, r: int, held: int) -> list[float]:
    """Return how long the plan of one step takes one of so many workers."""
    sizes = [held] * workers

    def plan(step: int) -> None:
        plan_of(0, sizes, plan_draws(sizes, r, 0, step))

    return [milliseconds(partial(plan, step)) for step in range(100)]


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--r", type=int, default=64, help="rows that each worker draws a step")
    parser.add_argument("--held", type=int, default=2000, help="rows that each worker holds")
    parser.add_argument("--worker", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    rows: list[dict[str, Any]] = []

    def note(name: str, value: float, unit: str, baseline: float | None = None) -> None:
        ratio = value / baseline if baseline else None
        rows.append({"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio})
        beside = "" if baseline is None else f"{baseline:.4g}"
        print(f"| {name} | {value:.4g} | {unit} | {beside} | {'' if ratio is None else f'{ratio:.3f}'} |", flush=True)

    print("| what | value | unit | beside | ratio |\n|---|---|---|---|---|")
    torch.set_num_threads(1)
    plan = plan_milliseconds(128, options.r, options.held)[10:]
    note(f"plan for 128 workers, r = {options.r}, median", statistics.median(plan), "ms")
    visible: list[int] = []
    hidden = 0
    for count in WORKERS:
        draws = (options.r, *(r for r in LARGER if r > options.r)) if count == WORKERS[0] else (options.r,)
        results = launch(count, draws, options)
        found, row = results[options.r], f"{count} workers"
        note(f"{row}, header sent a step and worker, max (beside: 16 N)", max(found["header"]), "bytes", 16 * count)
        share = statistics.mean(found["rows"])
        note(f"{row}, rows sent a step and worker, mean (beside: max)", share, "bytes", max(found["rows"]))
        median = {name: statistics.median(values) for name, values in found.items()}
        note(f"{row}, exchange alone, median", median["alone"], "ms")
        note(f"{row}, start (plan and packing), median", median["start"], "ms")
        note(f"{row}, wait at collection, median (beside: alone)", median["wait"], "ms", median["alone"])
        note(f"{row}, wait at collection, mean (beside: max)", statistics.mean(found["wait"]), "ms", max(found["wait"]))
        note(f"{row}, step with exchange, median (beside: without)", median["step"], "ms", median["compute"])
        for r, larger in results.items():
            wait, step = statistics.median(larger["wait"]), statistics.median(larger["step"])
            if len(results) > 1:
                note(f"{row}, r = {r}: wait at collection, median (beside: step)", wait, "ms", step)
                visible += [r] if wait > HIDDEN * step else []
                hidden = hidden if visible else r
    note(f"{WORKERS[0]} workers, largest r with a wait of at most {HIDDEN:.0%} of the step", hidden, "rows")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
