"""A waiting worker leaves its core to others, and an interrupted one leaves no operation behind."""

from __future__ import annotations

from tests.distributed.programs import polling
from tests.distributed.workers import assert_ended_well, run_workers


def test_waiting_leaves_the_core_and_ends_with_the_operation() -> None:
    assert_ended_well(run_workers(polling.waiting, 2, deadline=120))
