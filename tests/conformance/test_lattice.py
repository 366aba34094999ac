"""Whole configurations drawn at random, in one process; the package ``lattice`` says what has to hold of each.

``LATTICE_SEED=n`` draws others. A draw that fails prints the line that repeats it alone, which also looks for a smaller
draw that fails.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.lattice.draws import Draw, draw, named_axes, recipe
from tests.conformance.lattice.examination import examine, shrunk

SEED = int(os.environ.get("LATTICE_SEED", 20))
ALONE = json.loads(os.environ.get("LATTICE_DRAW", "null"))
FAST, ALL, PART = 200, 5_000, 10

counts: Counter[str] = Counter()
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # as its import has set it lower


pytestmark = pytest.mark.usefixtures("one_thread")


def check(drawn: Draw, folder: Path) -> list[str]:
    """Run a draw, count it, and return its faults below the line that repeats it."""
    found = examine(drawn, folder)
    if found.refused is None:
        counts["run"] += 1
    else:
        counts["refused"] += 1
        counts[f"refused for {', '.join(named_axes(found.refused, drawn))}"] += 1
    return [recipe(drawn), *found.faults] if found.faults else []


def parts(first: int, last: int, *marks: Any) -> list[Any]:
    return [pytest.param(range(k, k + PART), id=f"from_{k}", marks=marks) for k in range(first, last, PART)]


if ALONE is None:

    @pytest.mark.parametrize("numbers", [*parts(0, FAST), *parts(FAST, ALL, pytest.mark.exhaustive)])
    def test_draws(numbers: range, tmp_path: Path) -> None:
        faults = [fault for number in numbers for fault in check(draw(SEED, number), tmp_path)]
        if faults:
            pytest.fail("\n".join(faults), pytrace=False)

    def test_most_draws_ran(capsys: pytest.CaptureFixture[str]) -> None:
        """Comes last, and prints the counts of the draws before it."""
        with capsys.disabled():
            print(f"\nlattice, seed {SEED}:", ", ".join(f"{n} {what}" for what, n in counts.most_common()))
        assert counts["run"] >= 0.6 * (counts["run"] + counts["refused"])

else:

    @pytest.mark.timeout(1200)
    def test_one_draw(tmp_path: Path) -> None:
        faults = check(ALONE, tmp_path)
        if faults:
            smaller = shrunk(ALONE, tmp_path)
            pytest.fail("\n".join([*faults, "smaller:", *check(smaller, tmp_path)]), pytrace=False)
