"""Real kills at random moments, most of them within a save: all that is there is whole, and goes on to the same end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from agents import NAMES

HERE = Path(__file__).parent
# nil_v2 repeats nothing.
REPEATING = [name for name in NAMES if name != "nil_v2"]


def kills(folder: Path, count: int, seed: int, *names: str, timeout: float = 280) -> dict[str, int]:
    """Run ``kills.py``; return what it counted."""
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / "kills.py"), str(folder), str(count), str(seed), *names],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    print(f"seed {seed}, {', '.join(names)}: {counted}")
    return counted


def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    counted = kills(tmp_path, 10, 0, "nil", "nil_v1", "nil_global", "icarl", "derpp")
    assert counted["kills"] >= 10
    assert counted["later"] > 3


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_two_hundred_kills_while_saving(tmp_path: Path) -> None:
    counted = kills(tmp_path, 200, 1, "nil", "nil_v1", "nil_v4", "nil_global", timeout=3500)
    assert counted["kills"] >= 200


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_every_agent_killed_and_resumed_equals_uninterrupted(tmp_path: Path, seed: int) -> None:
    counted = kills(tmp_path, len(REPEATING), 100 + seed, *REPEATING, timeout=1700)
    assert counted["kills"] >= 1
