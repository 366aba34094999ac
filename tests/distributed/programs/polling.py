"""A worker that waits, and one that is interrupted while it waits."""

from __future__ import annotations

import signal
import time
from typing import Any

import horovod.torch as hvd
import pytest
import torch

from dcl_lightning.distributed.horovod.watchdog import poll_while_waiting


class Interrupted(Exception):
    """Raised by the signal's handler."""


def interrupt(*args: Any) -> None:
    raise Interrupted


def waiting() -> None:
    """Waiting takes no time of the core, and an interrupted operation leaves nothing behind."""
    hvd.init()
    poll_while_waiting()
    first = hvd.synchronize
    poll_while_waiting()
    assert hvd.synchronize is first, "once is enough"

    # Worker 1 comes three seconds later. What counts is the core's time, on however busy a machine.
    late = hvd.rank() == 1
    for meet in (
        lambda: hvd.allreduce(torch.ones(3), name="a"),
        hvd.barrier,
        lambda: hvd.synchronize(hvd.allreduce_async_(torch.ones(3), name="b")),
        lambda: hvd.broadcast_object([1], root_rank=1),
    ):
        hvd.barrier()
        begun = time.process_time()
        if late:
            time.sleep(3)
        meet()
        assert time.process_time() - begun < 2, meet

    # A signal whose handler raises, while worker 0 waits for an operation that worker 1 joins four seconds later.
    signal.signal(signal.SIGALRM, interrupt)
    hvd.barrier()
    if late:
        time.sleep(4)
        hvd.allreduce(torch.ones(1), op=hvd.Sum, name="c")
    else:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(Interrupted):
            hvd.allreduce(torch.ones(1), op=hvd.Sum, name="c")
    # The name is free again, and both mean the same operation by it.
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="c").item() == 2
    handle = hvd.allreduce_async_(torch.ones(1), name="d")
    hvd.synchronize(handle)
    assert hvd.synchronize(handle) is None, "waited for already"
