"""Combinations of agent, strategy, precision, accumulation and compilation on two workers; checkpoints under fsdp2.

The exhaustive test adds what it finds to the file ``STRATEGIES_LOG``, if that is set, and leaves out what is there.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from tests.distributed.cells import ALL, ON_WORKERS, Cell
from tests.distributed.programs import sharded, strategies
from tests.distributed.workers import assert_ended_well, run_workers

TRIED = [cell for cell in ALL if cell.strategy in ON_WORKERS]
LOG = os.environ.get("STRATEGIES_LOG")
PART = 54


def sample() -> list[Cell]:
    """Return some cells of each strategy that learn, and refused ones; ``STRATEGIES_SEED=n`` draws others."""
    draw = random.Random(int(os.environ.get("STRATEGIES_SEED", 0)))
    working = {s: [c for c in TRIED if c.strategy == s and c.reason is None] for s in ON_WORKERS}
    refused = [c for c in TRIED if c.reason is not None]
    asked = [Cell(name, "fsdp2", "32-true", False, False) for name in ("nil_global", "derpp", "icarl")]
    drawn = [cell for s, cells in working.items() for cell in draw.sample(cells, 1 if s == "auto" else 2)]
    return list(dict.fromkeys([*asked, *drawn, *draw.sample(refused, 3)]))


def check(cells: list[Cell], folder: Path, deadline: float) -> None:
    ended = run_workers(strategies.run, 2, folder, cells, deadline=deadline)
    found = folder / "found.json"
    lines = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    if LOG:
        with open(LOG, "a") as log:
            log.writelines(json.dumps(line) + "\n" for line in lines)
    faults = [f"{line['cell']}: {line['fault']}" for line in lines if line["fault"]]
    assert not faults, "\n".join(faults)
    assert_ended_well(ended)
    assert len(lines) == len(cells)


def test_a_few_combinations(tmp_path: Path) -> None:
    check(sample(), tmp_path, deadline=240)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, len(TRIED), PART))
def test_every_combination(first: int, tmp_path: Path) -> None:
    known = Path(LOG).read_text().splitlines() if LOG and Path(LOG).exists() else []
    done = [Cell(*line["cell"]) for line in map(json.loads, known) if not line["fault"]]
    if cells := [cell for cell in TRIED[first : first + PART] if cell not in done]:
        check(cells, tmp_path, deadline=840)


def test_checkpoints_of_shards(tmp_path: Path) -> None:
    assert_ended_well(run_workers(sharded.checkpoints, 2, tmp_path, deadline=240))


@pytest.mark.exhaustive
def test_shards_go_on_with_other_workers(tmp_path: Path) -> None:
    for number, workers in enumerate((2, 3, 1)):
        assert_ended_well(run_workers(sharded.part, workers, tmp_path, number))
