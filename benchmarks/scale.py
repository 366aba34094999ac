"""A simulated step of many workers: what rehearsal adds at 8, 128 and 1024, and which part of it is seen first.

Nothing is trained. ResNet-50, 25.6 million parameters, b = 56 new and r = 7 rehearsed images of 3x224x224 bytes, c = 14
candidates, a draw over the memories of all workers, in the background. Both sides are simulated: a step with rehearsal,
and one that trains on as many images for which no memory works; below stand those over plain steps on b images, which
also hold the r more images that are trained on.

Measured here, one thread: the plan of a draw for N workers (``plan_draws`` and ``plan_of``), and the memory's own work
of a step with images of that size (insert, gather, pack, unpack), the fastest of some repeats. The plan also tells how
many rows each worker sends. Assumed, each an option:

- images a second of one GPU: NVIDIA's published training throughput of ResNet-50 v1.5 in PyTorch (DeepLearningExamples,
  one GPU): V100 16 GB 367 in FP32 and 1200 in mixed precision, A100 938 in TF32 and 2470 in mixed precision. They are
  of larger batches than 56, which makes our steps too short and rehearsal too visible;
- spread of the compute time between workers and steps: normal, 3 % of it;
- network: 5 us a message, 3.1 GB/s a worker (a link of 100 Gbit/s shared by four).

The model of a step: all workers begin together. A third of the compute is the forward pass, after which the gradients
travel while the backward pass goes on: a ring, 2 (N - 1) messages one after the other and 2 (N - 1) / N times the
gradients' bytes. The exchange of rehearsal has the same link: plan, gather and pack on the host, N - 1 messages one
after the other, of 16 bytes each, 8 bytes a class with NIL's weights (``--classes 0`` for none), and the rows; the
slowest worker is the one that sends most. What has not arrived when the gradients begin delays these. The step ends
when the slowest worker's compute, the gradients, and the memory's work with insert and unpacking all have. The parts
of rehearsal follow each other, so that the largest is the one to blame where rehearsal is seen. Left out: links inside
a host, which are faster; congestion; what Horovod tells its workers before an operation; time that the memory's thread
takes from the training thread; reading of images.

Bouvier et al. (CCGrid 2024) trained this network with these b, c and r on 16 to 128 A100 of ThetaGPU, and report a
runtime close to that of incremental training, which has no memory and trains on b images a step.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import HEADER, report

from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.exchange import HEADER_BYTES, RowLayout, plan_draws, plan_of
from dcl_lightning.memory.storage import RowStore

NEW, DRAWN, CANDIDATES = 56, 7, 14
PARAMETERS, IMAGE = 25_600_000, (3, 224, 224)
WORKERS = (8, 128, 1024)
MOST = 65_536  # workers, beyond which nobody looks
SEEN = 0.01  # share of a step that counts as seen
# Images a second of one GPU and bytes of a gradient.
GPUS = {"V100 fp32": (367, 4), "V100 amp": (1200, 2), "A100 tf32": (938, 4), "A100 amp": (2470, 2)}
PARTS = ("plan", "memory", "messages", "headers and counts", "rows")


class Network(NamedTuple):
    """What is assumed.

    Args:
        spread: deviation of the compute time, a share of it.
        latency: s a message.
        bandwidth: bytes/s of a worker.
        classes: of which the workers tell each other how often each was offered; 0 for no weights.
    """

    spread: float
    latency: float
    bandwidth: float
    classes: int


class Costs(NamedTuple):
    """What rehearsal costs a worker in a step, in s.

    Args:
        plan: who sends what to whom.
        memory: insert, gather, pack and unpack.
        messages: latencies of the exchange.
        headers: their bytes and those of the counts of classes.
        rows: bytes of the rows, of the worker that sends most.
    """

    plan: float = 0.0
    memory: float = 0.0
    messages: float = 0.0
    headers: float = 0.0
    rows: float = 0.0


def plan_seconds(workers: int, held: int, repeats: int = 5) -> float:
    """Return how long the plan of one step takes one of so many workers, the fastest of some repeats."""
    sizes, taken = [held] * workers, []
    for step in range(repeats):
        started = time.perf_counter()
        plan_of(0, sizes, plan_draws(sizes, DRAWN, 0, step))
        taken.append(time.perf_counter() - started)
    return min(taken)


def memory_seconds(held: int, repeats: int = 20) -> float:
    """Return how long insert, gather, pack and unpack of one step take, the fastest of some repeats."""
    new = {"inputs": torch.zeros(NEW, *IMAGE, dtype=torch.uint8), "targets": torch.arange(NEW) % 10}
    buffer = RehearsalBuffer(10, held, "nil", "fixed", CANDIDATES, RowStore(new, held))
    while len(buffer) < held // 2:
        buffer.add(new, new["targets"])
    layout, taken = RowLayout(new), []
    for _ in range(repeats):
        started = time.perf_counter()
        buffer.add(new, new["targets"])
        layout.unpack(layout.pack(buffer.store.gather(buffer.draw(DRAWN))))
        taken.append(time.perf_counter() - started)
    return min(taken)


def row_bytes() -> int:
    """Return the bytes of a row as it travels: image, target, task, id and label."""
    numbers = [torch.zeros(0, dtype=torch.int64)] * 4
    return RowLayout([torch.zeros(0, *IMAGE, dtype=torch.uint8), *numbers]).row_bytes


def most_sent(workers: int, held: int, step: int) -> int:
    """Return how many rows the worker sends that sends most, by the plan of a step."""
    draws = plan_draws([held] * workers, DRAWN, 0, step)
    return int(np.bincount(draws.ravel() // held, minlength=workers).max())


def costs(workers: int, sent: int, plan: float, memory: float, network: Network) -> Costs:
    """Return what rehearsal costs in a step.

    Args:
        workers: N.
        sent: rows that the worker sends that sends most.
        plan: s.
        memory: s.
        network: what is assumed of it.
    """
    fixed = workers * (HEADER_BYTES + 8 * network.classes)
    return Costs(
        plan,
        memory,
        (workers - 1) * network.latency,
        fixed / network.bandwidth,
        sent * row_bytes() / network.bandwidth,
    )


def step_seconds(compute: float, workers: int, gradient_bytes: int, network: Network, costs: Costs) -> float:
    """Return the time of one step.

    Args:
        compute: s of the slowest worker.
        workers: N.
        gradient_bytes: of all gradients.
        network: what is assumed of it.
        costs: of rehearsal; all 0 without it.
    """
    ring = 2 * (workers - 1) * (network.latency + gradient_bytes / workers / network.bandwidth)
    forward = compute / 3
    before = costs.plan + costs.memory / 2  # gather and pack come before the exchange, the rest behind it
    arrived = before + costs.messages + costs.headers + costs.rows
    late = max(0.0, arrived - max(forward, before))
    gradients = forward + ring + late
    return max(compute, gradients, arrived + costs.memory / 2)


class Simulated(NamedTuple):
    """Steps of one job.

    Args:
        rehearsal: ms of each step.
        free: ms of steps on b + r images without any work of a memory.
        plain: ms of steps on b images.
        costs: of rehearsal in the last step.
    """

    rehearsal: list[float]
    free: list[float]
    plain: list[float]
    costs: Costs


def simulate(
    workers: int, gpu: tuple[float, int], network: Network, plan: float, memory: float, steps: int, held: int
) -> Simulated:
    """Return simulated steps.

    Args:
        workers: N.
        gpu: images a second, and bytes of a gradient.
        network: what is assumed of it.
        plan: s of the plan.
        memory: s of the memory's own work.
        steps: their number.
        held: rows that each worker stores.
    """
    rate, width = gpu
    slowest = 1 + network.spread * np.random.default_rng(0).standard_normal((steps, workers)).max(axis=1)
    whole, free, plain, paid = [], [], [], Costs()
    for step, factor in enumerate(slowest.tolist()):
        paid = costs(workers, most_sent(workers, held, step), plan, memory, network)
        for images, spent, steps_ms in (
            (NEW + DRAWN, paid, whole),
            (NEW + DRAWN, Costs(), free),
            (NEW, Costs(), plain),
        ):
            taken = step_seconds(factor * images / rate, workers, width * PARAMETERS, network, spent)
            steps_ms.append(1e3 * taken)
    return Simulated(whole, free, plain, paid)


def first_seen(simulated: Callable[[int], Simulated]) -> tuple[int, str]:
    """Return the least power of two of workers at which rehearsal is seen, and its largest part; 0 if it never is.

    Args:
        simulated: steps for a number of workers.
    """
    workers = 2
    while workers <= MOST:
        found = simulated(workers)
        if statistics.median(a / b for a, b in zip(found.rehearsal, found.free, strict=True)) > 1 + SEEN:
            return workers, PARTS[found.costs.index(max(found.costs))]
        workers *= 2
    return 0, ""


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, fewer workers: whether it runs, no figures")
    parser.add_argument("--rounds", type=int, default=50, help="simulated steps of each case")
    parser.add_argument("--held", type=int, default=1000, help="rows that each worker stores")
    parser.add_argument("--images-per-s", type=float, help="of one GPU, instead of the published ones")
    parser.add_argument("--gradient-bytes", type=int, default=2, help="of one gradient, with --images-per-s")
    parser.add_argument("--spread", type=float, default=0.03, help="deviation of the compute time, a share of it")
    parser.add_argument("--latency-us", type=float, default=5.0, help="of a message")
    parser.add_argument("--bandwidth-gb-s", type=float, default=3.1, help="of a worker, in 1e9 bytes/s")
    parser.add_argument("--classes", type=int, default=1000, help="whose counts travel for NIL's weights; 0 for none")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print the table; with --json also write it."""
    options = parse()
    torch.set_num_threads(1)
    network = Network(options.spread, options.latency_us * 1e-6, options.bandwidth_gb_s * 1e9, options.classes)
    gpus: dict[str, tuple[float, int]] = dict(GPUS)
    if options.images_per_s:
        gpus = {f"{options.images_per_s:g} images/s": (options.images_per_s, options.gradient_bytes)}
    memory = memory_seconds(60 if options.quick else 500)
    plan = functools.cache(lambda workers: plan_seconds(workers, options.held))

    def simulated(gpu: tuple[float, int], workers: int, steps: int) -> Simulated:
        return simulate(workers, gpu, network, plan(workers), memory, steps, options.held)

    print(HEADER)
    rows: list[dict[str, Any]] = []
    for name, gpu in gpus.items():
        for workers in WORKERS:
            found = simulated(gpu, workers, 3 if options.quick else options.rounds)
            what = f"{name}, {workers} workers, rehearsal over"
            rows.append(report(f"{what} b + r images without", "ms", found.rehearsal, found.free, "reported"))
            rows.append(report(f"{what} plain b images", "ms", found.rehearsal, found.plain, "reported"))
    print(f"\n- Measured: the memory's own work {1e3 * memory:.3f} ms. A row has {row_bytes()} bytes.")
    for workers in WORKERS:
        paid = costs(workers, most_sent(workers, options.held, 0), plan(workers), memory, network)
        parts = ", ".join(f"{part} {1e3 * value:.3f}" for part, value in zip(PARTS, paid, strict=True))
        print(f"- {workers} workers, ms of a step, hidden or not: {parts}.")
    for name, gpu in [] if options.quick else gpus.items():
        workers, part = first_seen(lambda workers, gpu=gpu: simulated(gpu, workers, 5))
        place = f"from {workers} workers on; the largest part: {part}" if workers else f"nowhere up to {MOST} workers"
        print(f"- {name}: seen by more than {SEEN:.0%} of a step {place}.")
        rows.append({"name": f"{name}, first seen, {part}", "value": workers, "unit": "workers"})
        rows[-1] |= {"baseline": None, "ratio": None}
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
