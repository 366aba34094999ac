"""Parameters without a gradient, without ``find_unused_parameters``: correct where workers agree, named where not."""

from __future__ import annotations

import re

from tests.distributed.programs import unused_parameters
from tests.distributed.workers import assert_ended_well, run_workers


def test_parameters_that_no_worker_uses_in_a_step_cost_nothing() -> None:
    """As one process that has the global batches: used now and then, thawed later, one after the other by hand."""
    assert_ended_well(run_workers(unused_parameters.agreed, 2))


def test_a_worker_that_waits_for_a_gradient_learns_which_and_from_whom_it_does_not_come() -> None:
    workers = run_workers(unused_parameters.one_worker_without, 2)
    assert [worker.code for worker in workers] == [1, 1], workers
    messages = re.findall(r"^\S*ConfigurationError: (.*)$", workers[0].output, re.MULTILINE)
    assert messages == [
        "worker 1's backward pass gave no gradient to spare.weight, spare.bias, and worker 0 waits for it: "
        "set find_unused_parameters=true of strategy=horovod"
    ], workers[0].output
    assert "ConfigurationError" not in workers[1].output, "the echo"


def test_gradients_of_two_steps_are_never_combined_silently() -> None:
    """Worker 0 uses it in even steps, worker 1 in odd ones: each would wait for the other's next step, and get that."""
    workers = run_workers(unused_parameters.in_turn, 2)
    assert [worker.code for worker in workers] == [1, 1], workers
    output = workers[0].output + workers[1].output
    assert "than on another worker: set find_unused_parameters=true of strategy=horovod" in output, output
    assert "none to spare.weight, spare.bias" in output
