"""The reference protocol on digits: floors that a wrong method falls below.

A floor is the reference mean - 3 standard errors - 1, for the number of seeds run here.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import protocol


@pytest.mark.parametrize(
    ("case", "low", "high"),
    [("naive", 0, 25), ("transfer", 92, 100), ("icarl, 200 exemplars", 85, 100)],
)
def test_final_accuracy(case: str, low: float, high: float, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    values = [protocol.final_accuracy(case, seed, str(tmp_path)) for seed in range(2)]
    assert low <= statistics.mean(values) <= high
