"""A worker that waits leaves its core to others, and one that is interrupted leaves no operation behind."""

from __future__ import annotations

from tests.distributed.workers import assert_ended_well, run_workers

PROGRAM = """
import signal, time
import horovod.torch as hvd, torch
from dcl_lightning.distributed.horovod.watchdog import poll_while_waiting
hvd.init()
poll_while_waiting()
first = hvd.synchronize
poll_while_waiting()
assert hvd.synchronize is first, "once is enough"

# Worker 1 comes three seconds later. What counts is the core's time, on however busy a machine.
late = hvd.rank() == 1
for meet in (lambda: hvd.allreduce(torch.ones(3), name="a"), hvd.barrier,
             lambda: hvd.synchronize(hvd.allreduce_async_(torch.ones(3), name="b")),
             lambda: hvd.broadcast_object([1], root_rank=1)):
    hvd.barrier()
    begun = time.process_time()
    if late:
        time.sleep(3)
    meet()
    assert time.process_time() - begun < 2, (meet, time.process_time() - begun)

class Ended(Exception):
    pass

# A signal whose handler raises, while worker 0 waits for an operation that worker 1 joins four seconds later.
def end(*args):
    raise Ended

signal.signal(signal.SIGALRM, end)
hvd.barrier()
if late:
    time.sleep(4)
    hvd.allreduce(torch.ones(1), op=hvd.Sum, name="c")
else:
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        hvd.allreduce(torch.ones(1), op=hvd.Sum, name="c")
    except Ended:
        pass
    else:
        raise AssertionError("the signal did not come")
# The name is free again, and both mean the same operation by it.
assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="c").item() == 2
handle = hvd.allreduce_async_(torch.ones(1), name="d")
hvd.synchronize(handle)
assert hvd.synchronize(handle) is None, "waited for already"
"""


def test_waiting_leaves_the_core_and_ends_with_the_operation() -> None:
    assert_ended_well(run_workers(PROGRAM, 2, deadline=120))
