"""The asynchronous all-to-all and the global draw on Horovod and on torch workers, with their statistics."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from horovod.common.exceptions import HorovodInternalError
from scipy.stats import chi2
from torch import Tensor

from dcl_lightning.agents import NIL
from dcl_lightning.comm import Comm, Pending, TorchDistributedComm
from dcl_lightning.distributed.horovod.comm import HorovodComm
from dcl_lightning.distributed.horovod.mesh import Mesh, connect_workers
from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.config import RehearsalConfig, resolve
from dcl_lightning.memory.exchange import HEADER_BYTES, GlobalExchange, RowLayout, SentRows
from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.memory.rows import Candidates
from dcl_lightning.memory.storage import RowStore
from tests.distributed.programs.place import join_torch_group

R, HALF = 4, 250


def horovod_draws() -> None:
    """The memory's rows travel over direct connections; where there are none, as Horovod's own operations."""
    hvd.init()
    check_operation(HorovodComm(), HorovodComm("memory"))
    mesh = connect_workers(HorovodComm(), anew=True, timeout=30)
    assert mesh is not None
    check_draws(HorovodComm(), HorovodComm("memory", mesh))
    check_mesh(mesh)
    hvd.shutdown()


def check_mesh(mesh: Mesh) -> None:
    """A large message beside small ones, what an earlier fit left, and the end of a worker in a wait."""

    def parts(size: int, value: int = 0) -> list[Tensor]:
        return [torch.full((size,), 16 * mesh.rank + k + value, dtype=torch.uint8) for k in range(mesh.size)]

    mesh.send("large", parts(20_000_000))
    for step in range(50):
        mesh.send("small", parts(5, step))
        assert [part.tolist() for part in mesh.receive("small")] == [
            [16 * k + mesh.rank + step] * 5 for k in range(mesh.size)
        ]
    for k, part in enumerate(mesh.receive("large")):
        assert torch.equal(part, torch.full((20_000_000,), 16 * k + mesh.rank, dtype=torch.uint8))
    mesh.send("small", parts(1, 100))
    hvd.barrier()
    mesh.begin_fit()
    mesh.send("small", parts(0))
    assert [len(part) for part in mesh.receive("small")] == [0] * mesh.size
    hvd.barrier()
    if mesh.rank == 1:
        time.sleep(0.3)
        mesh.close()
    with pytest.raises(HorovodInternalError, match="has left the job"):
        mesh.receive("what worker 1 does not send")
    mesh.close()


def torch_draws() -> None:
    """One group for all."""
    join_torch_group()
    comm = TorchDistributedComm()
    check_draws(comm, comm)
    torch.distributed.destroy_process_group()


def check_draws(main: Comm, comm: Comm) -> None:
    """The operation, the draws, and a memory that fails."""
    torch.set_num_threads(1)
    check_operation(main, comm)
    held = {2: [0, 11], 3: [0, 11, 4]}[comm.size]
    draw = GlobalExchange(
        comm, gather_on(comm), RowLayout(gather_on(comm)(torch.arange(0)).rows), R, seed=5, num_counts=1
    )
    check_statistics(main, comm, draw, held)
    check_failure(comm, draw, [5, *held[1:]])
    main.barrier()


def check_operation(main: Comm, comm: Comm) -> None:
    """Uneven, empty, one pending per name, also in inference mode, wide and narrow rows."""
    me, n = comm.rank, comm.size

    def rows(source: int, target: int) -> Tensor:
        return torch.full(((source + 2 * target) % 3, 5), 10 * source + target, dtype=torch.uint8)

    def exchange(name: str) -> Pending:
        sent = torch.cat([rows(me, k) for k in range(n)])
        splits, received = [len(rows(me, k)) for k in range(n)], [len(rows(k, me)) for k in range(n)]
        return comm.alltoall_async(sent, splits, received, name)

    wanted = torch.cat([rows(k, me) for k in range(n)])
    for inference in (False, True):
        with torch.inference_mode(inference):
            for _ in range(3):
                a = exchange("a")
                b = exchange("b")
                with pytest.raises(RuntimeError, match="a is pending"):
                    exchange("a")
                assert main.allreduce(torch.ones(1)).item() == n, "other operations run meanwhile"
                assert torch.equal(a.wait(), wanted)
                assert torch.equal(b.wait(), wanted)
                with pytest.raises(RuntimeError, match="already called"):
                    a.wait()
    empty = torch.zeros((0, 4), dtype=torch.uint8)
    assert comm.alltoall_async(empty, [0] * n, [0] * n, "a").wait().shape == (0, 4)
    with pytest.raises(ValueError, match="splits"):
        comm.alltoall_async(empty, [0] * (n + 1), [0] * n, "a")


def gather_on(comm: Comm) -> Callable[[Tensor], SentRows]:
    """Return what reads this worker's rows, which say whose they are and of which slot."""

    def gather(slots: Tensor) -> SentRows:
        noise = (torch.arange(30)[None] * (slots[:, None] + 1) + comm.rank) % 256
        owner = torch.full_like(slots, comm.rank)
        return SentRows({"owner": owner, "slot": slots.int(), "noise": noise.to(torch.uint8)}, comm.rank + 0.5)

    return gather


def check_statistics(main: Comm, comm: Comm, draw: GlobalExchange, held: list[int]) -> None:
    """Unequal shards, the first one empty at first; the memory's thread exchanges while this one reduces."""
    me, n = comm.rank, comm.size
    more = [5, *held[1:]]
    counts = {tuple(held): np.zeros(sum(held)), tuple(more): np.zeros(sum(more))}
    failure: list[BaseException] = []

    def manage() -> None:
        sizes = [0] * n
        for step in range(2 * HALF + 1):
            now = held if step < HALF else more
            draw.start(step, sizes, now[me], torch.tensor([100 * me + step]))
            got, after, weight_sum, class_counts = draw.collect()
            assert weight_sum == sum(k + 0.5 for k in range(n))
            assert class_counts.tolist() == [[100 * k + step] for k in range(n)]
            owner, slot = got["owner"], got["slot"].long()
            assert len(owner) == min(R, sum(sizes))
            assert draw.last is not None
            assert draw.last.header_bytes == HEADER_BYTES * n
            if sum(sizes):
                noise = (torch.arange(30)[None] * (slot[:, None] + 1) + owner[:, None]) % 256
                assert torch.equal(got["noise"].long(), noise), "a row is what its owner has"
                assert (slot < torch.tensor(sizes)[owner]).all()
                place = (torch.tensor([0, *sizes]).cumsum(0)[owner] + slot).numpy()
                assert len(set(place)) == R, "no row twice"
                counts[tuple(sizes)][place] += 1
            sizes = after
            assert sizes == now

    def guarded() -> None:
        try:
            manage()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    # All workers leave after the same reduction.
    while main.allreduce(torch.tensor([1.0 if thread.is_alive() else 0.0]), "max").item():
        time.sleep(0.002)  # a step
    thread.join()
    if failure:
        raise failure[0]
    # Each row equally often, for this worker and for all together.
    for sizes, mine in counts.items():
        total = sum(sizes)
        every = np.stack([part.numpy() for part in main.allgather(torch.from_numpy(mine)[None])])
        assert every.sum() > n * R * (HALF - 2)
        for table in (mine, every.reshape(n, total).sum(0)):
            statistic = ((table - table.mean()) ** 2 / table.mean()).sum() / (1 - R / total)
            assert chi2.sf(statistic, total - 1) > 0.001, (sizes, table)


def check_failure(comm: Comm, draw: GlobalExchange, sizes: list[int]) -> None:
    """All workers raise at once if one memory fails, and the next exchange works."""

    def broken(slots: Tensor) -> SentRows:
        raise OSError("disk gone")

    last, gather = comm.size - 1, draw._gather
    draw._gather = broken if comm.rank == last else gather
    draw.start(0, sizes, sizes[comm.rank], torch.tensor([0]))
    with pytest.raises(
        OSError if comm.rank == last else RuntimeError,
        match="disk gone" if comm.rank == last else f"worker {last} could not",
    ):
        draw.collect()
    draw._gather = gather
    draw.start(1, sizes, sizes[comm.rank], torch.tensor([0]))
    assert draw.collect().sizes == sizes


def offered_by_all() -> None:
    """One row of each class and worker; worker 0 meets class 0 alone, worker 1 mostly class 1."""
    hvd.init()
    torch.set_num_threads(1)
    comm = HorovodComm("memory")
    config = resolve(RehearsalConfig.of({"buffer_size": 4, "num_samples": 3, "scope": "global"}), NIL.memory)
    example = torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
    buffer = RehearsalBuffer(2, 2, "nil", "fixed", 4, RowStore(example[0], 2))
    manager = MemoryManager(config, buffer, comm, 4, example, torch.device("cpu"))
    labels = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])[comm.rank]
    expected: dict[int, float] = {}
    for step in range(20):
        drawn = manager.advance(Candidates(torch.rand(4, 1), labels, torch.full((4,), -1)), draw=True)
        assert drawn is not None
        before = max(step - 1, 0)  # offers that all workers knew of when the exchange began
        expected = {0: max(math.log(5 * before / 3), 1), 1: max(math.log(3 * before / 3), 1)} if before else {}
        assert sorted(drawn.labels.tolist()) == ([0, 0, 1] if before else [])
        wanted = torch.tensor([expected[y] for y in drawn.labels.tolist()])
        torch.testing.assert_close(drawn.weights, wanted, check_dtype=False)
        assert math.isclose(drawn.weight_share, float(wanted.sum()), rel_tol=1e-6)
    assert expected[0] > expected[1] > 1
    hvd.shutdown()
