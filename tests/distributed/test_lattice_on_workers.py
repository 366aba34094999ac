"""Whole configurations drawn at random, on two Horovod workers; ``tests/conformance/lattice`` says what has to hold.

``LATTICE_SEED=n`` draws others. A draw that fails prints the line that repeats it alone.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.lattice.draws import Draw, draw, named_axes, recipe
from tests.distributed.programs import lattice_draws
from tests.distributed.workers import run_workers

SEED = int(os.environ.get("LATTICE_SEED", 20))
ALONE = json.loads(os.environ.get("LATTICE_DRAW", "null"))
FAST, ALL, PART = 10, 400, 10
FILE = "tests/distributed/test_lattice_on_workers.py"

counts: Counter[str] = Counter()


def draws_of(numbers: range) -> list[Draw]:
    # Other draws than in one process.
    return [draw(SEED + 1_000_000, number) for number in numbers]


def parts(first: int, last: int, *marks: Any) -> list[Any]:
    return [pytest.param(draws_of(range(k, k + PART)), id=f"from_{k}", marks=marks) for k in range(first, last, PART)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "draws", [*parts(0, FAST), *parts(FAST, ALL, pytest.mark.exhaustive)] if ALONE is None else [[ALONE]]
)
def test_draws(draws: list[Draw], tmp_path: Path) -> None:
    ended = run_workers(lattice_draws.run_all, 2, tmp_path, draws, deadline=540)
    lines = [json.loads(line) for line in (tmp_path / "found.json").read_text().splitlines()]
    faults = []
    for line in lines:
        counts["run" if line["refused"] is None else "refused"] += 1
        if line["refused"] is not None:
            counts[f"refused for {', '.join(named_axes(line['refused'], line['draw']))}"] += 1
        if line["faults"]:
            faults += [recipe(line["draw"], FILE), *line["faults"]]
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)
    assert [worker.code for worker in ended] == [0, 0], [worker.output[-2000:] for worker in ended]
    assert len(lines) == len(draws)


if ALONE is None:

    def test_most_draws_ran(capsys: pytest.CaptureFixture[str]) -> None:
        """Comes last, and prints the counts of the draws before it; a part of them is too few to judge by."""
        with capsys.disabled():
            print(f"\nlattice on workers, seed {SEED}:", ", ".join(f"{n} {what}" for what, n in counts.most_common()))
        tried = counts["run"] + counts["refused"]
        # Of all draws about 0.65 run: of twenty, hardly ever fewer than eight.
        assert tried < FAST or counts["run"] >= 0.4 * tried
