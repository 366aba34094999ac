"""The metrics of a stream on two Horovod workers with uneven shards equal plain NumPy on all samples."""

from __future__ import annotations

from tests.distributed.workers import assert_ended_well, run_workers


def test_every_metric_on_two_workers_equals_plain_numpy() -> None:
    assert_ended_well(run_workers(SOURCE, 2))


SOURCE = """
import os
import horovod.torch as hvd
from tests.metrics.all_metrics import check, streams
from hypothesis import given, settings
from dcl_lightning.distributed.horovod.comm import attach_metrics

hvd.init()
rank = int(os.environ["HOROVOD_RANK"])


# The same examples, in the same order, on both workers.
@given(streams())
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
def run(stream):
    check(stream, rank, 2, attach_metrics)


run()
"""
