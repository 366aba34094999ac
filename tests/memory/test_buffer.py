"""The buffer: sizes, quotas, uniform draws, saved state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.memory.buffer import RehearsalBuffer, distinct, split_total
from dcl_lightning.memory.policies import POLICIES
from dcl_lightning.memory.storage import RowStore


def make(policy="class_balanced", quota="fixed", num_classes=4, capacity=12, c=3, seed=0):
    store = RowStore((torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)), capacity)
    candidates = None if POLICIES[policy].offers_all else c
    return RehearsalBuffer(num_classes, capacity, policy, quota, candidates, store, seed)


def rows(labels, ids):
    """Rows that carry their label and their id."""
    labels, ids = torch.as_tensor(labels, dtype=torch.int64), torch.as_tensor(ids, dtype=torch.int64)
    return (torch.stack((labels, ids % 256), 1).to(torch.uint8), ids), labels, ids


def stored(buffer):
    slots = buffer.slots_at(torch.arange(len(buffer)))
    pixels, ids = buffer.store.gather(slots)
    return slots, pixels[:, 0].long(), ids


def check(buffer, offered):
    state = buffer.state
    slots, labels, ids = stored(buffer)
    assert len(buffer) <= buffer.store.capacity
    assert slots.unique().numel() == len(buffer)
    assert np.array_equal(state.labels[slots.numpy()], labels)
    assert torch.equal(buffer.labels_at(slots), labels)
    assert int((state.labels >= 0).sum()) == len(buffer)
    assert torch.equal(torch.bincount(labels, minlength=state.num_classes), buffer.class_counts)
    assert set(zip(labels.tolist(), ids.tolist(), strict=True)) <= offered
    if buffer.policy.refreshes:
        assert ids.unique().numel() == len(buffer)
        assert np.array_equal(state.slot_of[ids.numpy()], slots)
        assert int((state.slot_of >= 0).sum()) == len(buffer)
    if buffer.policy.owns_slots:
        assert (buffer.class_counts.numpy() <= state.room).all()
        assert sorted(state.table.tolist()) == list(range(state.capacity))
        for y in range(state.num_classes):
            start, room, count = int(state.start[y]), int(state.room[y]), int(buffer.class_counts[y])
            owned = state.labels[state.table[start : start + room]].tolist()
            assert owned == [y] * count + [-1] * (room - count)


batches = st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=10)


@settings(max_examples=60, deadline=None)
@given(
    batches,
    st.sampled_from(list(POLICIES)),
    st.sampled_from(["fixed", "adaptive"]),
    st.integers(1, 12),
    st.integers(1, 8),
)
def test_rows_are_rows_once_offered(stream, policy, quota, capacity, c):
    buffer = make(policy, quota, capacity=capacity, c=c)
    offered = set()
    for ids in stream:
        labels = [k % 4 for k in ids]
        buffer.add(*rows(labels, ids))
        offered |= set(zip(labels, ids, strict=True))
        check(buffer, offered)
        drawn = buffer.draw(5)
        assert drawn.unique().numel() == min(5, len(buffer))
    if policy == "reservoir" and offered:
        assert len(buffer) == min(capacity, len(offered))


@pytest.mark.parametrize("quota", ["fixed", "adaptive"])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_stay_rows_as_classes_come_one_after_another(policy, quota):
    # A class shrinks whenever the next one comes, and samples of all classes so far are offered again.
    for seed in range(40):
        random = np.random.default_rng(seed)
        buffer = make(policy, quota, capacity=int(random.integers(1, 13)), c=int(random.integers(1, 9)), seed=seed)
        offered = set()
        for step in range(12):
            labels = random.integers(0, step // 3 + 1, int(random.integers(0, 9)))
            ids = labels + 4 * random.integers(0, 6, labels.size)
            buffer.add(*rows(labels, ids))
            offered |= set(zip(labels.tolist(), ids.tolist(), strict=True))
            check(buffer, offered)


def copy_rows(first: RehearsalBuffer, second: RehearsalBuffer) -> None:
    slots = first.slots_at(torch.arange(len(first)))
    second.store.insert(slots, first.store.gather(slots))


@pytest.mark.parametrize("quota", ["fixed", "adaptive"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_saved_state_goes_on_alike(tmp_path, policy, quota):
    # Samples that are stored come again, before the memory is full and after.
    for seed in range(20):
        random = np.random.default_rng(seed)
        first, second = make(policy, quota, seed=1), make(policy, quota, seed=2)
        for step in range(8):
            if step == seed % 8:
                torch.save(first.state_dict(), tmp_path / "state.pt")
                second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
                copy_rows(first, second)
            ids = random.integers(0, 20, int(random.integers(0, 9)))
            for buffer in (first, second) if step >= seed % 8 else (first,):
                buffer.add(*rows(ids % 4, ids))
            assert step < seed % 8 or torch.equal(first.draw(4), second.draw(4))
        assert all(torch.equal(a, b) for a, b in zip(stored(first), stored(second), strict=True))


@pytest.mark.parametrize("policy", ["nil", "class_balanced", "class_reservoir", "greedy", "fifo"])
def test_quotas(policy):
    fixed, adaptive = make(policy, "fixed", c=8), make(policy, "adaptive", c=8)
    for label, room in enumerate(([12], [6, 6], [4, 4, 4], [3, 3, 3, 3])):
        for step in range(6):
            batch = rows([label] * 8, range(100 * label + 8 * step, 100 * label + 8 * step + 8))
            fixed.add(*batch)
            adaptive.add(*batch)
        assert fixed.class_counts.tolist() == [3] * (label + 1) + [0] * (3 - label)
        assert adaptive.class_counts.tolist() == room + [0] * (3 - label)


def test_a_shrunk_class_loses_rows_at_random_and_under_fifo_the_oldest():
    kept = torch.zeros(12)
    for seed in range(500):
        buffer = make("class_balanced", "adaptive", seed=seed)
        buffer.add(*rows([0] * 12, range(12)))
        buffer.add(*rows([1], [99]))
        ids = stored(buffer)[2]
        kept[ids[ids < 12]] += 1
    assert kept.sum() == 500 * 6
    assert ((kept - 250) ** 2 / 125 * 11 / 12).sum() < 31.3  # chi-square, 11 degrees, p = 0.001
    buffer = make("fifo", "adaptive", c=1)
    for k in range(15):
        buffer.add(*rows([0], [k]))
    buffer.add(*rows([1], [99]))
    assert sorted(stored(buffer)[2].tolist()) == [9, 10, 11, 12, 13, 14, 99]
    buffer.add(*rows([0], [50]))
    assert sorted(stored(buffer)[2].tolist()) == [10, 11, 12, 13, 14, 50, 99]


@pytest.mark.parametrize(("bound", "number"), [(6, 2), (300, 3), (1000, 40)])
def test_distinct_is_uniform(bound, number):
    generator = np.random.default_rng(0)
    steps = 4000
    hits = torch.zeros(number, bound)
    for _ in range(steps):
        drawn = distinct(bound, number, generator)
        assert np.unique(drawn).size == number
        hits[torch.arange(number), drawn] += 1
    for counts in (hits.sum(0), hits[0]):  # any place, and the first place
        mean = counts.sum() / bound
        chi = float(((counts - mean) ** 2 / mean).sum())
        assert abs(chi - (bound - 1)) < 3.3 * math.sqrt(2 * bound) + 6


@pytest.mark.parametrize("policy", ["class_balanced", "reservoir"])
def test_draws_are_uniform_over_the_rows_allowed(policy):
    buffer = make(policy, capacity=400, num_classes=4)
    labels = torch.cat((torch.zeros(10), torch.ones(100), torch.full((90,), 2), torch.full((60,), 3))).long()
    buffer.add(*rows(labels, torch.arange(260)))
    exclude = torch.tensor([False, True, False, False])
    for mask, allowed in ((None, 260), (exclude, 160), (~exclude, 100)):
        hits = torch.zeros(400)
        for _ in range(3000):
            drawn = buffer.draw(4, mask)
            assert drawn.unique().numel() == 4
            hits[drawn] += 1
        slots = stored(buffer)[0]
        if mask is not None:
            slots = slots[~mask[buffer.labels_at(slots)]]
        assert slots.numel() == allowed
        assert hits[slots].sum() == 12000
        mean = 12000 / allowed
        chi = float(((hits[slots] - mean) ** 2 / mean).sum())
        assert abs(chi - allowed) < 3.3 * math.sqrt(2 * allowed) + 6
    assert buffer.draw(500, torch.ones(4, dtype=torch.bool)).numel() == 0
    assert buffer.draw(500, exclude).numel() == 160
    assert buffer.draw(500).numel() == 260


def test_empty_memory():
    buffer = make()
    assert buffer.draw(3).numel() == 0
    assert buffer.draw(3, torch.zeros(4, dtype=torch.bool)).numel() == 0
    buffer.add(*rows([], []))
    assert len(buffer) == 0
    assert buffer.num_bytes > buffer.store.num_bytes


def test_weights_in_both_branches():
    buffer = make("nil", num_classes=2, capacity=4, c=2)
    assert buffer.weights(torch.tensor([0, 1]), 8).tolist() == [1, 1]
    for step in range(20):
        buffer.add(*rows([0] * 8, range(8 * step, 8 * step + 8)))
    buffer.add(*rows([1], [500]))
    # n_0 = 40, n_1 = 1, |S| = 3, b / c = 4.
    weights = buffer.weights(torch.tensor([1, 0, 0]), 8)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([1.0, math.log(40 * 8 / (2 * 3)), math.log(40 * 8 / (2 * 3))])
    # Of a batch of one sample there is one candidate.
    assert buffer.weights(torch.tensor([0]), 1).tolist() == pytest.approx([math.log(40 / 3)])


def test_labels_are_optional():
    buffer = make("reservoir", num_classes=1, capacity=5)
    for _ in range(3):
        buffer.add(rows([0] * 4, range(4))[0])
    assert len(buffer) == 5


def test_refusals():
    with pytest.raises(ConfigurationError, match="quota 'free'"):
        make(quota="free")
    with pytest.raises(ConfigurationError, match="store of 3"):
        RehearsalBuffer(2, 4, "nil", "fixed", 1, RowStore(torch.zeros(1), 3))
    with pytest.raises(DataError, match="labels from 0 to 4"):
        make().add(*rows([0, 4], [0, 1]))
    with pytest.raises(DataError, match="for each row"):
        make().add(rows([0, 1], [0, 1])[0], torch.tensor([0]))
    with pytest.raises(DataError, match="sample ids"):
        make().add(rows([0], [0])[0], torch.tensor([0]), torch.tensor([2**40]))
    with pytest.raises(ConfigurationError, match="has policy nil"):
        make().load_state_dict(make("nil").state_dict())
    with pytest.raises(ConfigurationError, match="4 classes and 8 slots"):
        make().load_state_dict(make(capacity=8).state_dict())


def test_split_total():
    assert [split_total(25, 3, rank) for rank in range(3)] == [9, 8, 8]
    assert sum(split_total(2, 4, rank) for rank in range(4)) == 2
