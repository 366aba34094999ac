"""Two Horovod workers learn what one process learns with the double batch, where the draws are the same."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.programs import methods, passes
from tests.distributed.workers import assert_ended_well, run_workers


def test_methods_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    assert_ended_well(run_workers(methods.as_one_process, 2, tmp_path, deadline=240))


def test_two_passes_have_statistics_of_each_workers_own_rows(tmp_path: Path) -> None:
    assert_ended_well(run_workers(passes.steps, 2, tmp_path))


def test_halves_of_the_draws_are_means_over_all_workers(tmp_path: Path) -> None:
    assert_ended_well(run_workers(methods.halves, 2, tmp_path))


def test_each_task_warms_up_by_its_own_number_of_steps() -> None:
    assert_ended_well(run_workers(methods.warm_up, 2))
