"""Rehearsal: what it adds to a training step, side by side in one run.

Step times are those of Lightning's own ``Trainer.fit`` with the real data module, agent and callback: the hooks that
Lightning calls between two batches are part of what rehearsal costs or hides, and a loop written for the benchmark
would leave them out. Each side of a pair is a fit of its own, whose memory is full from the start; a callback times
its steps after a warm-up, without the last step, which draws nothing. One thread computes, one more manages where
execution is blocking. The sides of a round follow each other, in an order that rotates; a row is the median over the
rounds of the ratio within a round, with the 95 % interval of that median from a bootstrap. The residual network has
fewer rounds and steps, for each of its steps takes a good part of a second.

Plain training has 128 new samples a step, rehearsal 64 new and 64 stored; the same network, augmentation and hooks.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import CLASSES, HEADER, SPEC, WARM_UP, Filled, Size, report, rounds_of, step_ms, stream
from torch import nn

from dcl_lightning import NIL, ContinualDataModule, FineTuning
from dcl_lightning.backbones import MLP, ResNet
from dcl_lightning.comm import SingleProcessComm
from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.config import RehearsalConfig, resolve
from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.memory.rows import Candidates
from dcl_lightning.memory.storage import RowStore
from dcl_lightning.types import InputSpec

NEW, DRAWN = 64, 64
PER_CLASS = 20


def _rows(count: int, pixels: int) -> dict[str, torch.Tensor]:
    return {
        "inputs": torch.randint(256, (count, 3, pixels, pixels), dtype=torch.uint8),
        "targets": torch.randint(CLASSES, (count,)),
        "task_ids": torch.zeros(count, dtype=torch.int64),
        "sample_ids": torch.arange(count),
    }


def full_buffer(rows: int, pixels: int, samples: int) -> RehearsalBuffer:
    """Return a full memory of a data set of some samples: all rows were candidates once, as many of each class."""
    offered = _rows(rows, pixels)
    offered["sample_ids"] %= samples
    offered["targets"] = torch.arange(rows) % CLASSES
    buffer = RehearsalBuffer(CLASSES, rows, "nil", "fixed", rows, RowStore(offered, rows))
    buffer.add(offered, offered["targets"], offered["sample_ids"])
    assert len(buffer) == rows
    return buffer


def memory_alone(size: Size) -> dict[str, Any]:
    """Return the row of the memory's work of one step: insert, draw, gather, weights."""
    moved, store = 20, CLASSES * PER_CLASS
    rows = _rows(NEW, 32)
    config = RehearsalConfig(num_representatives=PER_CLASS, num_candidates=moved, num_samples=moved)
    buffer = RehearsalBuffer(CLASSES, store, "nil", "fixed", moved, RowStore(rows, store))
    full = full_buffer(store, 32, store)
    buffer.load_state_dict(full.state_dict())
    slots = full.slots_at(torch.arange(store))
    buffer.store.insert(slots, full.store.gather(slots))
    manager = MemoryManager(
        resolve(config, NIL.memory), buffer, SingleProcessComm(), NEW, (rows, rows["targets"]), torch.device("cpu")
    )
    offers = [Candidates(r, r["targets"], r["sample_ids"]) for r in (_rows(NEW, 32) for _ in range(8))]
    column, candidates = torch.zeros(store, 3, 32, 32, dtype=torch.uint8), rows["inputs"][:moved].clone()
    places = [torch.randperm(store)[:moved] for _ in range(8)]

    def timed(work: Callable[[int], object]) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            for step in range(size.steps):
                work(step)
            return 1e3 * (time.perf_counter() - started) / size.steps

        return run

    def move(step: int) -> None:
        column.index_select(0, places[step % 8])
        column.index_copy_(0, places[(step + 1) % 8], candidates)

    measured = rounds_of(
        {"memory": timed(lambda step: manager.advance(offers[step % 8], True)), "move": timed(move)}, size.rounds
    )
    return report(
        "insert + draw of 20 over index_select + index_copy_", "ms", measured["memory"], measured["move"],
        "< 0.5 ms, <= 5",
    )  # fmt: skip


def _rehearsing(
    backbone: Callable[[], nn.Module],
    data: ContinualDataModule,
    rows: int,
    steps: int,
    trainer: dict[str, Any] | None = None,
    compile: Any = False,
    **options: Any,
) -> Callable[[], float]:
    """Return what trains with a memory that is full from the start; options are the memory's."""
    data.setup()
    filled = Filled(full_buffer(rows, data.train_inputs.shape[3], len(data.train_targets)))
    config = RehearsalConfig(buffer_size=rows, num_samples=DRAWN, **options)
    spec = InputSpec(*data.train_inputs.shape[1:])

    def run() -> float:
        agent = NIL(backbone(), CLASSES, config, input_spec=spec, compile=compile)
        return step_ms(agent, data, steps, filled, **(trainer or {}))

    return run


def against_plain(name: str, backbone: Callable[[], nn.Module], size: Size, target: str) -> list[dict[str, Any]]:
    """Return the rows of rehearsal against plain training on as many samples a step."""
    samples = (WARM_UP + size.steps + 2) * (NEW + DRAWN)
    plain, ours = stream(samples, 32, NEW + DRAWN), stream(samples // 2, 32, NEW)

    def rehearse(**options: Any) -> Callable[[], float]:
        return _rehearsing(backbone, ours, CLASSES * PER_CLASS, size.steps, **options)

    measured = rounds_of(
        {
            "plain": lambda: step_ms(FineTuning(backbone(), CLASSES, input_spec=SPEC), plain, size.steps),
            "blocking": rehearse(execution="blocking", prefetch="device"),
            "inline": rehearse(execution="inline"),
        },
        size.rounds,
    )
    return [
        report(f"{name}, {side}, {size.steps} steps", "ms", measured[side], measured["plain"], goal)
        for side, goal in (("blocking", target), ("inline", "<= 1.15"))
    ]


def against_plain_on_gpu(pixels: int, size: Size, width: int = 64) -> list[dict[str, Any]]:
    """Return the rows of a ResNet-18 in bfloat16, with the memory on the host and on the GPU, eager and compiled.

    Without a GPU they show that everything runs.
    """
    samples = (WARM_UP + size.steps + 2) * (NEW + DRAWN)
    plain, ours = stream(samples, pixels, NEW + DRAWN), stream(samples // 2, pixels, NEW)
    gpu = torch.cuda.is_available()
    trainer: dict[str, Any] = {"accelerator": "auto", "devices": 1}
    if gpu:
        trainer |= {"precision": "bf16-mixed", "benchmark": True}
    spec = InputSpec(3, pixels, pixels)

    def backbone() -> nn.Module:
        return ResNet(18, width=width)

    def plainly(compile: Any = False) -> Callable[[], float]:
        def run() -> float:
            agent = FineTuning(backbone(), CLASSES, input_spec=spec, compile=compile)
            return step_ms(agent, plain, size.steps, **trainer)

        return run

    def rehearse(execution: str = "blocking", **options: Any) -> Callable[[], float]:
        options |= {"execution": execution} | ({"prefetch": "device"} if execution == "blocking" else {})
        return _rehearsing(backbone, ours, CLASSES * PER_CLASS, size.steps, trainer, **options)

    sides = {
        "plain": plainly(),
        "blocking": rehearse(),
        "blocking, stored on the GPU": rehearse(storage="cuda" if gpu else "cpu"),
        "inline": rehearse("inline"),
    }
    for mode in ("default", "reduce-overhead"):
        compile: Any = mode if gpu else {"backend": "aot_eager"}
        sides |= {f"plain, {mode}": plainly(compile), f"blocking, {mode}": rehearse(compile=compile)}
    measured = rounds_of(sides, size.rounds)
    name = f"ResNet-18 bf16, {pixels} px"
    rows = [
        report(f"{name}, {side}, {size.steps} steps", "ms", measured[side], measured["plain"], "<= 1.02")
        for side in ("blocking", "blocking, stored on the GPU", "inline")
    ]
    for mode in ("default", "reduce-overhead"):
        compiled, rehearsing = measured[f"plain, {mode}"], measured[f"blocking, {mode}"]
        rows.append(report(f"{name}, {mode} over eager, plain", "ms", compiled, measured["plain"], "5 ms at 32 px"))
        rows.append(report(f"{name}, {mode}, blocking over plain", "ms", rehearsing, compiled, "<= 1.02"))
    return rows


def million_over_thousand(size: Size) -> dict[str, Any]:
    """Return the row of the step with a million rows stored, inline, against that with a thousand."""
    data = stream((WARM_UP + size.steps + 2) * NEW, 8, NEW)
    sides = {name: _rehearsing(MLP, data, rows, size.steps) for name, rows in (("more", 1_000_000), ("less", 1_000))}
    measured = rounds_of(sides, size.rounds)
    return report("a million rows over a thousand", "ms", measured["more"], measured["less"], "<= 1.2")


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds of few steps: whether it runs, no figures")
    parser.add_argument("--only", default="", help="parts to run: letters of mlp (m), resnet (r), memory (i), rows (s)")
    parser.add_argument(
        "--gpu", action="store_true", help="a ResNet-18 on the GPU: images of 32 (a) and 224 (b) pixels"
    )
    parser.add_argument("--rounds", type=int, help="instead of each part's own number")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def size(rounds: int, steps: int) -> Size:
        return Size(2, min(steps, 3)) if options.quick else Size(options.rounds or rounds, steps)

    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "i": lambda: [memory_alone(size(40, 100))],
        "m": lambda: against_plain("MLP", MLP, size(15, 100), "<= 1.10"),
        "s": lambda: [million_over_thousand(size(7, 100))],
        "r": lambda: against_plain("ResNet-32", lambda: ResNet(32), size(7, 6), "<= 1.05"),
    }
    if options.gpu:
        width = 8 if options.quick else 64
        parts = {
            "a": lambda: against_plain_on_gpu(32, size(9, 200), width),
            "b": lambda: against_plain_on_gpu(224, size(5, 60), width),
        }
    print(HEADER)
    rows = [row for key, part in parts.items() if not options.only or key in options.only for row in part()]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
