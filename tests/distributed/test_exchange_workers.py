"""The asynchronous all-to-all and the global draw on real workers."""

from __future__ import annotations

import pytest

from tests.distributed.programs import exchange
from tests.distributed.workers import assert_ended_well, run_workers


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_global_draws_on_horovod_workers(count: int) -> None:
    assert_ended_well(run_workers(exchange.horovod_draws, count))


def test_global_draws_on_two_torch_workers() -> None:
    assert_ended_well(run_workers(exchange.torch_draws, 2))


def test_weights_are_of_what_all_workers_were_offered() -> None:
    assert_ended_well(run_workers(exchange.offered_by_all, 2))
