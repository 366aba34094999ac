"""Parameters without a gradient, without ``find_unused_parameters``: correct where workers agree, named where not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.distributed.programs import unused_parameters
from tests.distributed.workers import assert_ended_well, run_workers


def test_parameters_that_no_worker_uses_in_a_step_cost_nothing() -> None:
    """As one process that has the global batches: used now and then, thawed later, one after the other by hand."""
    assert_ended_well(run_workers(unused_parameters.agreed, 2))


@pytest.mark.parametrize(
    ("program", "lacks"), [(unused_parameters.one_worker_without, 1), (unused_parameters.in_turn, 0)]
)
def test_a_gradient_that_some_workers_lack_is_named_in_the_same_step(program: Callable[[], None], lacks: int) -> None:
    """Also where each worker lacks it in every other step, so that those of two steps could meet."""
    workers = run_workers(program, 2)
    assert [worker.code for worker in workers] == [1, 1], workers
    for worker in workers:
        assert re.findall(r"^\S*ConfigurationError: (.*)$", worker.output, re.MULTILINE) == [
            f"worker {lacks}'s backward pass gave no gradient to spare.weight, spare.bias, and worker {1 - lacks}'s "
            "did: set find_unused_parameters=true of strategy=horovod"
        ], worker.output
