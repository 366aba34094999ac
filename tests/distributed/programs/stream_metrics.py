"""Every metric of a stream on two workers against plain NumPy on all samples."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
from hypothesis import given, settings

from dcl_lightning.distributed.horovod.comm import attach_metrics
from tests.distributed.programs.place import rank
from tests.metrics.all_metrics import check, streams


def as_numpy() -> None:
    """The same examples, in the same order, on both workers."""
    hvd.init()

    @given(streams())
    @settings(max_examples=4, deadline=None, derandomize=True, database=None)
    def run(stream: Any) -> None:
        check(stream, rank(), 2, attach_metrics)

    run()
