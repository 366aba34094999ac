"""SimpleCIL, streaming LDA and RanPAC find on several workers what NumPy finds over all samples at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.programs import closed_form
from tests.distributed.workers import assert_ended_well, run_workers


@pytest.mark.parametrize(
    ("workers", "strategy"),
    # The first two are among the methods that tests/distributed/programs/methods.py compares, by another reference.
    [*(pytest.param(2, strategy, marks=pytest.mark.exhaustive) for strategy in ("ddp", "horovod")), (3, "horovod")],
)
def test_statistics_do_not_depend_on_the_number_of_workers(workers: int, strategy: str, tmp_path: Path) -> None:
    assert_ended_well(run_workers(closed_form.as_numpy, workers, tmp_path, strategy))


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["ddp", "horovod"])
def test_a_first_session_is_learnt_by_all_workers(strategy: str, tmp_path: Path) -> None:
    assert_ended_well(run_workers(closed_form.with_a_first_session, 2, tmp_path, strategy))
