"""The contract of every ``Comm``: each worker calls it and checks its own results."""

from __future__ import annotations

import pytest
import torch

from dcl_lightning.comm import Comm, gather_rows

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
)  # fmt: skip


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert torch.equal(found, wanted), (found, wanted)


def rows(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return ((torch.arange(count * 6).reshape(count, 2, 3) + 7 * rank) % 5).to(dtype)


def check_contract(comm: Comm) -> None:
    r, n = comm.rank, comm.size
    total = n * (n + 1) // 2

    # allreduce
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32):
        value = torch.full((2, 2), r + 1).to(dtype)
        same(comm.allreduce(value), torch.full((2, 2), total).to(dtype))
        same(comm.allreduce(value, "max"), torch.full((2, 2), n).to(dtype))
        same(comm.allreduce(value, "min"), torch.ones(2, 2, dtype=dtype))
        same(value, torch.full((2, 2), r + 1).to(dtype))
    same(comm.allreduce(torch.tensor(r + 3), "mean"), torch.tensor(sum(range(3, n + 3)) / n, dtype=torch.float64))
    same(comm.allreduce(torch.tensor(r == 0), "max"), torch.tensor(True))
    same(comm.allreduce(torch.tensor(r == 0), "min"), torch.tensor(n == 1))
    same(comm.allreduce(torch.zeros(0, 3)), torch.zeros(0, 3))
    channels_last = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert comm.allreduce(channels_last).shape == channels_last.shape
    own = torch.ones(3)
    comm.allreduce(own).zero_()
    assert own.sum() == 3, "the result is a new tensor"

    # allgather: uneven, some empty, any dtype, 0-dim
    for dtype in DTYPES:
        for k, part in enumerate(comm.allgather(rows(r, r + 1, dtype))):
            same(part, rows(k, k + 1, dtype))
        for k, part in enumerate(comm.allgather(rows(r, r, dtype))):
            same(part, rows(k, k, dtype))
    for k, part in enumerate(comm.allgather(torch.tensor(r, dtype=torch.bfloat16))):
        same(part, torch.tensor(k, dtype=torch.bfloat16))
    assert [tuple(p.shape) for p in comm.allgather(torch.zeros(0, 4))] == [(0, 4)] * n
    assert [tuple(p.shape) for p in comm.allgather(torch.zeros(r + 1, 0))] == [(k + 1, 0) for k in range(n)]
    if n > 1:
        # An empty tensor does not know the shape and dtype of the others' rows.
        mine = rows(r, 2, torch.bool) if r == n - 1 else torch.zeros(0)
        for k, part in enumerate(comm.allgather(mine)):
            same(part, rows(k, 2 if k == n - 1 else 0, torch.bool))
        # All workers see that rows do not fit together; the next operation works.
        with pytest.raises(ValueError, match="differ in dtype or shape"):
            comm.allgather(torch.zeros(1, 2 + r))

    # gather_rows: of uneven rows, with the gradient of the sum of what all workers make of all rows
    with torch.inference_mode(False), torch.enable_grad():
        own = rows(r, r + 1, torch.float64).requires_grad_()
        every, mine = gather_rows(own, comm)
        same(every.detach(), torch.cat([rows(k, k + 1, torch.float64) for k in range(n)]))
        same(every[mine].detach(), own.detach())
        (every**2 * (r + 1)).sum().backward()
        assert own.grad is not None
        same(own.grad, 2 * total * own.detach())

    # broadcast, barrier
    for dtype in DTYPES:
        same(comm.broadcast(rows(r, 2, dtype), n - 1), rows(n - 1, 2, dtype))
    same(comm.broadcast(torch.tensor(float(r))), torch.tensor(0.0))
    same(comm.broadcast(torch.zeros(0, 2)), torch.zeros(0, 2))
    comm.barrier()
