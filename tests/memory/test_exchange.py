"""The plan of a global draw, and the exchange among workers simulated in one process."""

from __future__ import annotations

from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare
from torch import Tensor

from dcl_lightning.comm import Comm, Pending, SingleProcessComm, check_async_rows
from dcl_lightning.memory.exchange import HEADER_BYTES, GlobalExchange, RowLayout, SentRows, plan_draws, plan_of

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=6)


# The plan


@settings(deadline=None)
@given(SHARDS, st.integers(0, 60), st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40))
def test_draws_are_distinct_rows_of_the_union(sizes, r, seed, step):
    draws = plan_draws(sizes, r, seed, step)
    assert draws.shape == (len(sizes), min(r, sum(sizes)))
    assert draws.dtype == np.int64
    for row in draws:
        assert len(set(row)) == len(row)
        assert all(0 <= i < sum(sizes) for i in row)
    assert np.array_equal(draws, plan_draws(list(sizes), r, seed, step))


@settings(deadline=None)
@given(SHARDS, st.integers(0, 60), st.integers(0, 1000))
def test_what_one_worker_sends_is_what_the_other_expects(sizes, r, step):
    draws = plan_draws(sizes, r, 7, step)
    plans = [plan_of(k, sizes, draws) for k in range(len(sizes))]
    offsets = np.cumsum([0, *sizes])
    assert sum(len(p.positions) for p in plans) == len(sizes) * min(r, sum(sizes))
    got = [[] for _ in sizes]
    for k, plan in enumerate(plans):
        assert plan.positions.dtype == torch.int64
        assert sum(plan.send) == len(plan.positions)
        assert sum(plan.receive) == min(r, sum(sizes))
        assert all(0 <= i < sizes[k] for i in plan.positions.tolist())
        for j, part in enumerate(plan.positions.split(plan.send)):
            assert plan.send[j] == plans[j].receive[k]
            got[j] += (part + offsets[k]).tolist()
    for rows, wanted in zip(got, draws, strict=True):
        assert sorted(rows) == sorted(wanted)


@pytest.mark.parametrize(
    ("sizes", "r"), [([5, 0, 9, 2], 4), ([40, 3, 0], 4), ([1, 1, 1], 3), ([7, 6], 12), ([300, 20], 8)]
)
def test_every_row_is_drawn_equally_often(sizes, r):
    counts = np.zeros((len(sizes), sum(sizes)))
    for step in range(4000):
        draws = plan_draws(sizes, r, 1, step)
        for k, row in enumerate(draws):
            counts[k, row] += 1
    assert (counts.sum(1) == 4000 * min(r, sum(sizes))).all()
    if r < sum(sizes):
        for row in counts:
            # Without replacement a count varies by (1 - r / total) less than the test supposes.
            statistic = ((row - row.mean()) ** 2 / row.mean()).sum() / (1 - r / sum(sizes))
            assert chi2.sf(statistic, sum(sizes) - 1) > 0.001


@pytest.mark.parametrize(("total", "r"), [(5, 2), (5, 3), (8, 2), (9, 2)])
def test_every_selection_is_equally_likely_and_workers_are_independent(total, r):
    # Both ways of drawing: less than four times r rows, and more.
    sizes = [total - 2, 2]
    sets = {s: i for i, s in enumerate(combinations(range(total), r))}
    first, pairs = np.zeros(len(list(permutations(range(total), r)))), np.zeros((len(sets), len(sets)))
    orders = {p: i for i, p in enumerate(permutations(range(total), r))}
    for step in range(20000):
        a, b = plan_draws(sizes, r, 3, step).tolist()
        first[orders[tuple(a)]] += 1
        pairs[sets[tuple(sorted(a))], sets[tuple(sorted(b))]] += 1
    assert chisquare(first).pvalue > 0.001
    assert chisquare(pairs.reshape(-1)).pvalue > 0.001


def test_too_few_distinct_draws_start_again(monkeypatch):
    # 16 draws that are all the same row are not enough for 4 rows: 32 follow.
    class Stuck:
        asked: list[int] = []

        def __init__(self, key):
            pass

        def random_raw(self, n):
            self.asked.append(n)
            return np.zeros(n, dtype=np.uint64) if len(self.asked) == 1 else np.arange(n, dtype=np.uint64)

    monkeypatch.setattr(np.random, "Philox", Stuck)
    assert plan_draws([50, 50], 4, 0, 0).tolist() == [[0, 1, 2, 3], [32, 33, 34, 35]]
    assert Stuck.asked == [2 * 16, 2 * 32]


def test_seed_and_step_change_the_draw():
    a, b, c = (plan_draws([1000, 1000], 32, *key).tolist() for key in ((0, 0), (0, 1), (1, 0)))
    assert a != b != c != a


# The layout


class Row(NamedTuple):
    image: Tensor
    extra: dict[str, Tensor]


def columns(owner: int, slots: Tensor) -> Row:
    """Rows whose every column tells the owner and the slot."""
    n = len(slots)
    mark = (slots * 10 + owner).view(n, 1)
    return Row(
        (mark * torch.arange(1, 4) % 251).to(torch.uint8).view(n, 3, 1),
        {
            "owner": torch.full((n,), owner),
            "slot": slots.to(torch.int32),
            "logits": mark.to(torch.bfloat16).expand(n, 3),
            "old": (mark[:, 0] % 2).bool(),
            "weight": mark[:, 0].double(),
            "none": torch.zeros(n, 0),
        },
    )


def same(found: Row, wanted: Row) -> None:
    assert type(found) is Row
    torch.testing.assert_close(found._asdict(), wanted._asdict(), rtol=0, atol=0)


def layout() -> RowLayout:
    return RowLayout(columns(0, torch.arange(0)))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_rows_come_back_as_they_were(n):
    rows = columns(3, torch.arange(n))
    packed = layout().pack(rows)
    assert packed.shape == (n, 3 + 8 + 4 + 6 + 1 + 8)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    same(layout().unpack(packed), rows)


def test_rows_without_bytes():
    only = RowLayout([torch.zeros(0, 0)])
    assert only.unpack(only.pack([torch.zeros(4, 0)]))[0].shape == (4, 0)


@pytest.mark.parametrize(
    "rows", [[torch.zeros(2)], {"a": torch.zeros(2, 3)}, {"a": torch.zeros(2).int()}, {"b": torch.zeros(2)}, {}]
)
def test_rows_of_another_kind_are_refused(rows):
    with pytest.raises(ValueError, match=r"rows|column"):
        RowLayout({"a": torch.zeros(0)}).pack(rows)


def test_rows_that_are_no_tensors_are_refused():
    with pytest.raises(TypeError, match="rows: leaf 'a' is a float"):
        RowLayout({"a": torch.zeros(0)}).pack({"a": 1.0})


# The exchange


class Board:
    def __init__(self, size):
        self.size, self.parts = size, {}


class SimulatedComm(SingleProcessComm):
    """One of several workers of this process; what is sent waits on a board."""

    def __init__(self, board, rank):
        self.board, self.rank, self.size = board, rank, board.size
        self.sent: list[int] = []

    def alltoall_async(self, tensor: Tensor, splits: list[int], received: list[int], name: str) -> Pending:
        check_async_rows(self.rank, self.size, tensor, splits, received)
        self.sent.append(tensor.numel())
        for k, part in enumerate(tensor.split(splits)):
            assert (self.rank, k, name) not in self.board.parts
            self.board.parts[self.rank, k, name] = part
        board, rank, size = self.board, self.rank, self.size

        class Waiting:
            def wait(self) -> Tensor:
                parts = [board.parts.pop((k, rank, name)) for k in range(size)]
                assert [len(p) for p in parts] == received
                return torch.cat(parts)

        return Waiting()


class Worker:
    def __init__(self, comm: Comm, r, seed=0):
        self.comm, self.r, self.held = comm, r, 0
        self.sizes = [0] * comm.size
        self.exchange = GlobalExchange(comm, self.gather, layout(), r, seed, num_counts=2)
        self.weight_sum = 0.0

    def gather(self, positions):
        assert positions.numel() == 0 or int(positions.max()) < self.held
        self.weight_sum = float(positions.sum()) / 7 + self.comm.rank
        return SentRows(columns(self.comm.rank, positions), self.weight_sum)

    def start(self, step):
        self.exchange.start(step, self.sizes, self.held, torch.tensor([self.held, -step]))

    def collect(self):
        rows, self.sizes, self.total, self.class_counts = self.exchange.collect()
        return rows


def workers(size, r):
    board = Board(size)
    return [Worker(SimulatedComm(board, k) if size > 1 else SingleProcessComm(), r) for k in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("r", [1, 7, 40])
def test_every_worker_gets_its_rows_as_their_owner_has_them(size, r):
    group = workers(size, r)
    before = [0] * size
    for step in range(12):
        for k, worker in enumerate(group):
            # Worker 0 stays empty for long, the others grow at different rates.
            worker.held += (k + 1) * (k > 0 or step > 6)
            worker.start(step)
        drawn = [worker.collect() for worker in group]
        total = sum(before)
        for k, (worker, rows) in enumerate(zip(group, drawn, strict=True)):
            owner, slot = rows.extra["owner"], rows.extra["slot"].long()
            assert len(owner) == min(r, total)
            pairs = list(zip(owner.tolist(), slot.tolist(), strict=True))
            assert len(set(pairs)) == len(pairs)
            assert all(i < before[j] for j, i in pairs)
            assert sorted(owner.tolist()) == owner.tolist()
            parts = [columns(j, slot[owner == j]) for j in range(size)]
            extra = {name: torch.cat([part.extra[name] for part in parts]) for name in rows.extra}
            same(rows, Row(torch.cat([part.image for part in parts]), extra))
            wanted = plan_draws(before, r, 0, step)[k]
            assert sorted(sum(before[:j]) + i for j, i in pairs) == sorted(wanted)
            # The sizes for the next step are those at the start of this one.
            assert worker.sizes == [w.held for w in group]
            last = worker.exchange.last
            assert last.header_bytes == HEADER_BYTES * size <= 16 * size
            assert last.count_bytes == 16 * size
            if size > 1:
                assert worker.comm.sent[-1] == last.header_bytes + last.count_bytes + last.row_bytes
            # The sum of what the workers said of the rows that they sent, and every worker's counts.
            assert worker.total == pytest.approx(sum(w.weight_sum for w in group), rel=1e-15)
            assert worker.class_counts.tolist() == [[w.held, -step] for w in group]
        assert sum(w.exchange.last.rows_sent for w in group) == size * min(r, total)
        before = group[0].sizes


def test_an_overwritten_slot_serves_its_new_sample():
    comm, table = SingleProcessComm(), torch.zeros(4)
    exchange = GlobalExchange(comm, lambda i: SentRows(table[i]), RowLayout(table), 4, 0)
    exchange.start(0, [0], 4)
    assert exchange.collect().sizes == [4]
    table.fill_(5)
    exchange.start(1, [4], 4)
    table.fill_(6)
    assert exchange.collect().rows.tolist() == [5.0] * 4


def test_turns_are_kept():
    [worker] = workers(1, 3)
    with pytest.raises(RuntimeError, match="start one first"):
        worker.exchange.collect()
    worker.held = 2
    worker.start(0)
    with pytest.raises(RuntimeError, match="collect it before"):
        worker.start(1)
    assert worker.exchange.collect().sizes == [2]
    with pytest.raises(ValueError, match="one for each of 1 workers"):
        worker.exchange.start(1, [1, 1], 2)
    with pytest.raises(ValueError, match="0 class counts, expected 2"):
        worker.exchange.start(1, [2], 2)
    with pytest.raises(ValueError, match="2 GiB"):
        GlobalExchange(SingleProcessComm(), worker.gather, layout(), 2**30, 0)


def test_a_memory_that_fails_tells_every_worker_when_they_collect():
    group = workers(3, 8)
    for worker in group:
        worker.held, worker.sizes = 10, [10, 10, 10]

    def broken(positions):
        raise OSError("disk gone")

    group[1].exchange._gather = broken
    for worker in group:
        worker.start(0)
    for k, worker in enumerate(group):
        with pytest.raises(OSError if k == 1 else RuntimeError, match="disk gone" if k == 1 else "worker 1 could not"):
            worker.collect()
    group[1].exchange._gather = group[1].gather
    # A memory that lost rows since the sizes were told.
    group[2].held = 5
    for worker in group:
        worker.start(1)
    for k, worker in enumerate(group):
        with pytest.raises(RuntimeError, match="5 rows, fewer than the 10" if k == 2 else "worker 2 could not"):
            worker.collect()
    group[2].held = 10
    for worker in group:
        worker.start(2)
    assert all(len(w.collect().image) == 8 for w in group)


def test_workers_at_different_steps_are_told_apart():
    group = workers(2, 4)
    group[0].start(5)
    group[1].start(6)
    with pytest.raises(RuntimeError, match="worker 1 is at step 6 of the exchange, this one at 5"):
        group[0].collect()


def test_a_transfer_that_fails_to_start_raises_at_collect():
    class Down(SingleProcessComm):
        def alltoall_async(self, tensor, splits, received, name):
            raise ConnectionError("network down")

    worker = Worker(Down(), 4)
    worker.start(0)
    with pytest.raises(ConnectionError, match="network down"):
        worker.collect()
    with pytest.raises(RuntimeError, match="start one first"):
        worker.collect()


@pytest.mark.parametrize(
    ("rows", "splits", "received"),
    [
        (torch.zeros(2, 3), [2], [2]),
        (torch.zeros(2, dtype=torch.uint8), [2], [2]),
        (torch.zeros(3, 2, dtype=torch.uint8).T, [2], [2]),
        (torch.zeros(2, 3, dtype=torch.uint8), [1], [1]),
        (torch.zeros(2, 3, dtype=torch.uint8), [2], [1]),
        (torch.zeros(2, 3, dtype=torch.uint8), [1, 1], [2]),
    ],
)
def test_wrong_arguments_of_an_asynchronous_all_to_all_are_refused(rows, splits, received):
    with pytest.raises(ValueError, match="give"):
        SingleProcessComm().alltoall_async(rows, splits, received, "x")
