"""Workers with different numbers of batches: refused on all alike without a hang; tiny tasks are made even."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.programs import uneven
from tests.distributed.workers import assert_ended_well, run_workers


def test_uneven_shards_on_three_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for the report
    assert_ended_well(run_workers(uneven.three_workers, 3))


def test_streams_of_unequal_length_beside_a_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_ended_well(run_workers(uneven.streams_beside_a_memory, 2))
