"""What the memory's work of a step costs by its size: rows stored, classes, rows drawn.

The work of one step, as the training thread does it with ``execution: inline``: ``MemoryManager.advance`` offers 64 new
images, of which 20 candidates enter under NIL's policy, then draws r rows with their weights. The memory is full from
the start. One quantity varies at a time: rows (10 classes, r = 64, images of 3x8x8, so that with a million of them the
process stays below 2 GB), classes (10,000 rows, r = 64, 3x32x32), r (10,000 rows, 100 classes, 3x32x32). Each row is
the time over that of the smallest of its kind.

One thread. The sides of a round, which are all sizes of a kind, follow each other in an order that rotates; a row is
the median over the rounds of the ratio within a round, with the 95 % interval of that median from a bootstrap. Left out
are the network, whose work meets the same caches, and the exchange between workers: ``exchange.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import HEADER, Size, report, rounds_of
from torch import Tensor

from dcl_lightning.agents import NIL
from dcl_lightning.comm import SingleProcessComm
from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.config import RehearsalConfig, resolve
from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.memory.policies import make_policy
from dcl_lightning.memory.rows import Candidates
from dcl_lightning.memory.storage import RowStore

NEW, CANDIDATES = 64, 20


class Case(NamedTuple):
    """One memory.

    Args:
        rows: stored, a multiple of the classes.
        classes: of the stream.
        drawn: r, a step.
        pixels: of an image's side.
    """

    rows: int
    classes: int
    drawn: int
    pixels: int


# Of each kind: what varies, and from the smallest on.
ROWS = [Case(rows, 10, 64, 8) for rows in (1_000, 10_000, 100_000, 1_000_000)]
CLASSES = [Case(10_000, classes, 64, 32) for classes in (10, 100, 1_000)]
DRAWN = [Case(10_000, 100, drawn, 32) for drawn in (1, 8, 64, 512)]


def images(count: int, case: Case) -> dict[str, Tensor]:
    """Return so many rows, the classes in turn."""
    return {
        "inputs": torch.randint(256, (count, 3, case.pixels, case.pixels), dtype=torch.uint8),
        "targets": torch.arange(count) % case.classes,
        "task_ids": torch.zeros(count, dtype=torch.int64),
        "sample_ids": torch.arange(count),
    }


def full_manager(case: Case) -> MemoryManager:
    """Return the manager of a full memory: all its rows were candidates once, as many of each class."""
    rows = images(case.rows, case)
    buffer = RehearsalBuffer(case.classes, case.rows, "nil", "fixed", case.rows, RowStore(rows, case.rows))
    buffer.add(rows, rows["targets"], rows["sample_ids"])
    assert len(buffer) == case.rows
    buffer.policy = make_policy("nil", CANDIDATES)
    config = RehearsalConfig(buffer_size=case.rows, num_candidates=CANDIDATES, num_samples=case.drawn)
    return MemoryManager(
        resolve(config, NIL.memory), buffer, SingleProcessComm(), NEW, (rows, rows["targets"]), torch.device("cpu")
    )


def advancing(case: Case, steps: int) -> Callable[[], float]:
    """Return what does so many steps and returns their mean time in ms."""
    manager, offers = full_manager(case), []
    for _ in range(8):
        rows = images(NEW, case)
        rows["targets"] = torch.randint(case.classes, (NEW,))
        offers.append(Candidates(rows, rows["targets"], rows["sample_ids"]))

    def run() -> float:
        started = time.perf_counter()
        for step in range(steps):
            drawn = manager.advance(offers[step % 8], draw=True)
        taken = time.perf_counter() - started
        assert drawn is not None
        assert len(drawn.labels) == case.drawn
        return 1e3 * taken / steps

    run()
    return run


def growth(name: str, cases: list[Case], field: str, size: Size) -> list[dict[str, Any]]:
    """Return the rows of one kind: every case over the first.

    Args:
        name: of what varies.
        cases: the smallest first.
        field: of ``Case``, what varies.
        size: rounds, and steps a round and case.
    """
    values = [getattr(case, field) for case in cases]
    sides = {str(value): advancing(case, size.steps) for value, case in zip(values, cases, strict=True)}
    measured = rounds_of(sides, size.rounds)
    least = measured[str(values[0])]
    return [
        report(f"insert + draw, {name} {value:,} over {values[0]:,}", "ms", measured[str(value)], least, "reported")
        for value in values[1:]
    ]


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, smaller memories: whether it runs, no figures")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=200, help="a round and size")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = Size(2, 3) if options.quick else Size(options.rounds, options.steps)
    print(HEADER)
    rows = growth("rows stored", ROWS[:2] if options.quick else ROWS, "rows", size)
    rows += growth("classes", CLASSES, "classes", size)
    rows += growth("rows drawn", DRAWN, "drawn", size)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
