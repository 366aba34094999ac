"""The asynchronous all-to-all and the global draw on real workers."""

from __future__ import annotations

import pytest

from tests.distributed.workers import assert_ended_well, run_workers


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_global_draws_on_horovod_workers(count: int) -> None:
    assert_ended_well(run_workers(HOROVOD + CHECKS, count))


def test_global_draws_on_two_torch_workers() -> None:
    assert_ended_well(run_workers(TORCH + CHECKS, 2))


def test_weights_are_of_what_all_workers_were_offered() -> None:
    assert_ended_well(run_workers(HOROVOD + WEIGHTS, 2))


HOROVOD = """
import horovod.torch as hvd
from dcl_lightning.distributed.horovod.comm import HorovodComm
hvd.init()
main, comm = HorovodComm(), HorovodComm("memory")
close = hvd.shutdown
"""

TORCH = """
import os, torch
from dcl_lightning.comm import TorchDistributedComm
port = os.environ["TORCH_PORT"]
rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
main = comm = TorchDistributedComm()
close = torch.distributed.destroy_process_group
"""

CHECKS = """
import threading
import time
import numpy as np
import torch
from scipy.stats import chi2
from dcl_lightning.memory.exchange import HEADER_BYTES, GlobalExchange, RowLayout, SentRows
torch.set_num_threads(1)
me, n = comm.rank, comm.size

def refused(call, kind, words):
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")

# The operation alone: uneven, empty, one pending per name, also in inference mode, wide and narrow rows.
def rows(source, target):
    return torch.full(((source + 2 * target) % 3, 5), 10 * source + target, dtype=torch.uint8)
def exchange(name):
    sent = torch.cat([rows(me, k) for k in range(n)])
    return comm.alltoall_async(sent, [len(rows(me, k)) for k in range(n)], [len(rows(k, me)) for k in range(n)], name)
wanted = torch.cat([rows(k, me) for k in range(n)])
for inference in (False, True):
    with torch.inference_mode(inference):
        for _ in range(3):
            a = exchange("a")
            b = exchange("b")
            refused(lambda: exchange("a"), RuntimeError, "a is pending")
            assert main.allreduce(torch.ones(1)).item() == n, "other operations run meanwhile"
            assert torch.equal(a.wait(), wanted) and torch.equal(b.wait(), wanted)
            refused(a.wait, RuntimeError, "already called")
empty = torch.zeros((0, 4), dtype=torch.uint8)
assert comm.alltoall_async(empty, [0] * n, [0] * n, "a").wait().shape == (0, 4)
refused(lambda: comm.alltoall_async(empty, [0] * (n + 1), [0] * n, "a"), ValueError, "splits")

# The global draw: unequal shards, the first one empty; the memory's thread exchanges while this one reduces.
held = {2: [0, 11], 3: [0, 11, 4]}[n]
more = held[:]
more[0] = 5
r, half = 4, 250

def gather(slots):
    noise = (torch.arange(30)[None] * (slots[:, None] + 1) + me) % 256
    rows = {"owner": torch.full_like(slots, me), "slot": slots.int(), "noise": noise.to(torch.uint8)}
    return SentRows(rows, me + 0.5)

draw = GlobalExchange(comm, gather, RowLayout(gather(torch.arange(0)).rows), r, seed=5, num_counts=1)
counts = {tuple(held): np.zeros(sum(held)), tuple(more): np.zeros(sum(more))}
failure = []

def manage():
    sizes = [0] * n
    for step in range(2 * half + 1):
        now = held if step < half else more
        draw.start(step, sizes, now[me], torch.tensor([100 * me + step]))
        got, after, weight_sum, class_counts = draw.collect()
        assert weight_sum == sum(k + 0.5 for k in range(n))
        assert class_counts.tolist() == [[100 * k + step] for k in range(n)]
        owner, slot = got["owner"], got["slot"].long()
        assert len(owner) == min(r, sum(sizes))
        assert draw.last.header_bytes == HEADER_BYTES * n
        if sum(sizes):
            noise = (torch.arange(30)[None] * (slot[:, None] + 1) + owner[:, None]) % 256
            assert torch.equal(got["noise"].long(), noise), "a row is what its owner has"
            assert (slot < torch.tensor(sizes)[owner]).all()
            place = (torch.tensor([0, *sizes]).cumsum(0)[owner] + slot).numpy()
            assert len(set(place)) == r, "no row twice"
            counts[tuple(sizes)][place] += 1
        sizes = after
        assert sizes == now

def guarded():
    try:
        manage()
    except BaseException as error:
        failure.append(error)

thread = threading.Thread(target=guarded)
thread.start()
while True:
    # All workers leave after the same reduction.
    busy = main.allreduce(torch.tensor([1.0 if thread.is_alive() else 0.0]), "max")
    if busy.item() == 0:
        break
    time.sleep(0.002)  # a step
thread.join()
if failure:
    raise failure[0]

# Each row equally often, for this worker and for all together.
for sizes, mine in counts.items():
    total = sum(sizes)
    every = np.stack([part.numpy() for part in main.allgather(torch.from_numpy(mine)[None])])
    assert every.sum() > n * r * (half - 2)
    for table in (mine, every.reshape(n, total).sum(0)):
        statistic = ((table - table.mean()) ** 2 / table.mean()).sum() / (1 - r / total)
        assert chi2.sf(statistic, total - 1) > 0.001, (sizes, table)

# A memory that fails is told to all at once, and the next exchange works.
def broken(slots):
    raise OSError("disk gone")
draw._gather = broken if me == n - 1 else gather
draw.start(0, more, more[me], torch.tensor([0]))
refused(draw.collect, *((OSError, "disk gone") if me == n - 1 else (RuntimeError, f"worker {n - 1} could not")))
draw._gather = gather
draw.start(1, more, more[me], torch.tensor([0]))
assert draw.collect().sizes == more
main.barrier()
close()
print("done")
"""

WEIGHTS = """
import math
import torch
from dcl_lightning.agents import NIL
from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.config import resolve, RehearsalConfig
from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.memory.rows import Candidates
from dcl_lightning.memory.storage import RowStore
torch.set_num_threads(1)

# One row of each class and worker; worker 0 meets class 0 alone, worker 1 mostly class 1.
config = resolve(RehearsalConfig.of({"buffer_size": 4, "num_samples": 3, "scope": "global"}), NIL.memory)
example = torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
buffer = RehearsalBuffer(2, 2, "nil", "fixed", 4, RowStore(example[0], 2))
manager = MemoryManager(config, buffer, comm, 4, example, torch.device("cpu"))
labels = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])[comm.rank]
for step in range(20):
    drawn = manager.advance(Candidates(torch.rand(4, 1), labels, torch.full((4,), -1)), draw=True)
    before = max(step - 1, 0)  # offers that all workers knew of when the exchange began
    expected = {0: max(math.log(5 * before / 3), 1), 1: max(math.log(3 * before / 3), 1)} if before else {}
    assert sorted(drawn.labels.tolist()) == ([0, 0, 1] if before else []), (step, drawn.labels)
    wanted = torch.tensor([expected[y] for y in drawn.labels.tolist()])
    torch.testing.assert_close(drawn.weights, wanted, check_dtype=False)
    assert math.isclose(drawn.weight_share, float(wanted.sum()), rel_tol=1e-6)
assert expected[0] > expected[1] > 1
close()
"""
