"""Memories resharded to another number of workers: all rows, the capacity, the balance, and uniform draws."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcl_lightning.checkpoint.reshard import reshard
from dcl_lightning.comm import SingleProcessComm
from dcl_lightning.memory.buffer import RehearsalBuffer, split_total
from dcl_lightning.memory.config import RehearsalConfig, resolve
from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.memory.policies import POLICIES
from dcl_lightning.memory.storage import RowStore

CLASSES = 5
EXAMPLE = {"row": torch.zeros(0, dtype=torch.int64)}


def make(total: int, size: int, rank: int, policy: str, quota: str) -> MemoryManager:
    capacity = split_total(total, size, rank)
    candidates = None if POLICIES[policy].offers_all else 3
    buffer = RehearsalBuffer(CLASSES, capacity, policy, quota, candidates, RowStore(EXAMPLE, capacity), seed=rank)
    config = RehearsalConfig(buffer_size=total, policy=policy, quota=quota, num_candidates=candidates, weighting="none")
    return MemoryManager(resolve(config), buffer, SingleProcessComm(), 4, EXAMPLE, torch.device("cpu"), seed=7)


def offer(managers: list[MemoryManager], batches: int, first: int = 0) -> int:
    """Give each worker batches of its own rows; row i is of class i // 40 at first, then of any."""
    for _ in range(batches):
        for manager in managers:
            ids = torch.arange(first, first + 4)
            manager.buffer.add({"row": ids}, ids // 40 % CLASSES, ids)
            first += 4
    return first


def rows_of(manager: MemoryManager) -> list[int]:
    buffer = manager.buffer
    return buffer.store.gather(buffer.slots_at(torch.arange(len(buffer))))["row"].tolist()


def deal(managers: list[MemoryManager], total: int, size: int) -> list[MemoryManager]:
    saved = [manager.state_dict() for manager in managers]
    policy, quota = managers[0].buffer.policy_name, managers[0].buffer.quota
    result = []
    for rank in range(size):
        manager = make(total, size, rank, policy, quota)
        dealt = reshard(saved, size, rank)
        manager.load_state_dict(dealt.manager)
        for old, (places, slots) in zip(managers, dealt.rows, strict=True):
            rows = old.buffer.store.gather(old.buffer.slots_at(places))
            manager.buffer.store.insert(slots, rows)
        result.append(manager)
    return result


def check(manager: MemoryManager) -> None:
    """What must hold of any memory: rows have the class that is noted, and slots are where their class's are."""
    buffer, state = manager.buffer, manager.buffer.state
    filled = state.filled[: state.size]
    assert len(set(filled.tolist())) == state.size <= buffer.store.capacity
    assert (np.bincount(state.labels[filled], minlength=CLASSES) == state.class_counts).all()
    assert (state.labels >= 0).sum() == state.size
    rows = buffer.store.gather(torch.from_numpy(filled))["row"].numpy()
    assert (rows // 40 % CLASSES == state.labels[filled]).all()
    assert (rows == state.ids[filled]).all() or not buffer.policy.refreshes
    if not buffer.policy.owns_slots:
        assert sorted(filled.tolist()) == list(range(state.size))
    else:
        assert sorted(state.table.tolist()) == list(range(buffer.store.capacity))
        for y in range(CLASSES):
            own = state.table[state.start[y] : state.start[y] + state.class_counts[y]]
            assert state.class_counts[y] <= state.room[y]
            assert (state.labels[own] == y).all()
        assert int(state.room.sum()) in (0, buffer.store.capacity)


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(list(POLICIES)),
    quota=st.sampled_from(["fixed", "adaptive"]),
    total=st.integers(10, 40),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    batches=st.integers(0, 30),
)
def test_no_row_is_lost_and_the_job_stays_the_same(policy, quota, total, sizes, batches) -> None:
    managers = [make(total, sizes[0], rank, policy, quota) for rank in range(sizes[0])]
    first = offer(managers, batches)
    before = Counter(row for manager in managers for row in rows_of(manager))
    for size in sizes[1:]:
        managers = deal(managers, total, size)
        assert Counter(row for manager in managers for row in rows_of(manager)) == before
        for manager in managers:
            check(manager)
        counts = np.array([manager.buffer.state.class_counts for manager in managers])
        assert (counts.max(0) - counts.min(0) <= 1).all()
        assert sum(manager.buffer.store.capacity for manager in managers) == total
        assert sum(manager.buffer.state.seen for manager in managers) == first
        assert [manager.sizes for manager in managers] == [[len(manager.buffer) for manager in managers]] * size
    # And it goes on.
    offer(managers, 12, first)
    for manager in managers:
        check(manager)
        assert len(manager.buffer.draw(6)) == min(6, len(manager.buffer))


def test_under_fifo_rows_that_were_dealt_out_leave_once_their_class_is_full() -> None:
    managers = [make(50, 2, rank, "fifo", "fixed") for rank in range(2)]  # ten rows of a class in all
    first = offer(managers, 1)
    (one,) = deal(managers, 50, 1)
    before = set(rows_of(one))
    assert len(before) == 6
    for left in (6, 4, 1):  # three candidates of class 0 enter at a time
        first = offer([one], 1, first)
        assert len(before & set(rows_of(one))) == left


def test_rows_go_class_by_class_in_the_order_of_workers_and_slots() -> None:
    managers = [make(30, 2, rank, "class_balanced", "fixed") for rank in range(2)]
    for rank, manager in enumerate(managers):
        ids = torch.tensor([0, 40, 1, 41]) + 10 * rank
        manager.buffer.add({"row": ids}, ids // 40 % CLASSES, ids)
    three = deal(managers, 30, 3)
    # Class 0 has the job's first six slots, class 1 the next six, each in turn of workers 0, 1 and 2.
    assert [rows_of(manager) for manager in three] == [[0, 11, 40, 51], [1, 41], [10, 50]]


def test_the_oldest_leave_first_afterwards() -> None:
    managers = [make(10, 1, 0, "fifo", "fixed")]
    for row in range(7):  # one by one, of class 0 alone, of which two are kept
        managers[0].buffer.add({"row": torch.tensor([row])}, torch.tensor([0]), torch.tensor([row]))
    assert sorted(rows_of(managers[0])) == [5, 6]
    one = deal(deal(managers, 10, 2), 10, 1)[0]
    one.buffer.add({"row": torch.tensor([9])}, torch.tensor([0]), torch.tensor([9]))
    assert sorted(rows_of(one)) == [6, 9]


@pytest.mark.parametrize("size", [1, 3])
def test_draws_are_unbiased_afterwards(size: int) -> None:
    """Each worker draws each of its rows equally often, and workers draw independently of each other."""
    managers = [make(24, 2, rank, "class_balanced", "fixed") for rank in range(2)]
    offer(managers, 60)
    drawn: list[Any] = []
    for manager in deal(managers, 24, size):
        rounds, number, rows = 3000, 4, rows_of(manager)
        counts = Counter()
        for _ in range(rounds):
            counts.update(manager.buffer.store.gather(manager.buffer.draw(number))["row"].tolist())
        expected = rounds * number / len(rows)
        chi2 = sum((counts[row] - expected) ** 2 / expected for row in rows)
        assert set(counts) == set(rows)
        assert chi2 < 3 * len(rows)
        drawn.append(manager.buffer.generator.bit_generator.state["state"])
    assert len({str(state) for state in drawn}) == size
    # The same each time, and not the draws of the run's beginning.
    again = deal(managers, 24, size)[0].buffer.generator.bit_generator.state
    assert again == deal(managers, 24, size)[0].buffer.generator.bit_generator.state
    assert again != make(24, size, 0, "class_balanced", "fixed").buffer.generator.bit_generator.state


@pytest.mark.parametrize("policy", ["reservoir", "class_reservoir"])
def test_a_reservoir_goes_on_as_one_over_all_samples_seen(policy: str) -> None:
    """After dealing 2 -> 1 each of n samples is kept with capacity / n, the early and the late ones."""
    kept = Counter()
    for trial in range(400):
        managers = [make(12, 2, rank, policy, "adaptive") for rank in range(2)]
        for rank, manager in enumerate(managers):
            manager.buffer.generator = np.random.default_rng((trial, rank))
        first = offer(managers, 5)
        (one,) = deal(managers, 12, 1)
        one.buffer.generator = np.random.default_rng((trial, 9))
        offer([one], 10, first)
        kept.update(rows_of(one))
    share = [np.mean([kept[row] / 400 for row in range(low, low + 20)]) for low in range(0, 80, 20)]
    np.testing.assert_allclose(share, 12 / 80, atol=0.02)
