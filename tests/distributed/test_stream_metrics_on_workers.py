"""The metrics of a stream on two Horovod workers with uneven shards equal plain NumPy on all samples."""

from __future__ import annotations

from tests.distributed.programs import stream_metrics
from tests.distributed.workers import assert_ended_well, run_workers


def test_every_metric_on_two_workers_equals_plain_numpy() -> None:
    assert_ended_well(run_workers(stream_metrics.as_numpy, 2))
