"""Policies: enumerated small cases, properties, and distributions of what is stored."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
import torch

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory import policies
from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.policies import (
    ClassBalanced,
    ClassReservoir,
    Fifo,
    Greedy,
    GreedyBalancing,
    Nil,
    Reservoir,
    make_policy,
)
from dcl_lightning.memory.slots import SlotState, class_quotas
from dcl_lightning.memory.storage import RowStore

ALL = lambda k: np.ones(k, dtype=np.bool_)  # noqa: E731


class Memory:
    """The ids stored, driven by a policy."""

    def __init__(self, policy, num_classes, capacity, seed=0):
        room = class_quotas(capacity, ALL(num_classes) & policy.owns_slots)
        self.policy, self.state, self.generator = (
            policy,
            SlotState(num_classes, capacity, room),
            np.random.default_rng(seed),
        )
        self.content = np.full(capacity, -1)

    def add(self, ids, labels=None):
        ids = np.asarray(ids)
        labels = np.zeros_like(ids) if labels is None else np.asarray(labels)
        given = ids if self.policy.refreshes else None
        assignment = self.policy.assign(self.state, labels, given, self.generator)
        self.content[assignment.slots] = ids[assignment.rows]
        self.state.apply(assignment, labels, given)
        return assignment

    def stored(self):
        return tuple(sorted(self.content[self.content >= 0].tolist()))


def enumerated(monkeypatch, build, steps):
    """Exact distribution of the stored ids: every outcome of every bounded draw, the order of a batch as given."""
    found: Counter = Counter()
    paths = [()]
    while paths:
        path = paths.pop()
        given, weight, short = iter(path), 1.0, []

        def below(bounds, _generator, given=given, short=short):
            nonlocal weight
            drawn = []
            for bound in bounds.tolist():
                choice = next(given, None)
                if choice is None:
                    short.append(bound)
                    return np.zeros_like(bounds)
                weight /= bound
                drawn.append(choice)
            return np.array(drawn, dtype=np.int64)

        monkeypatch.setattr(policies, "_below", below)
        memory = build()
        for step in steps:
            memory.add(step)
            if short:
                break
        if short:
            paths += [(*path, choice) for choice in range(short[0])]
        else:
            found[memory.stored()] += weight
    return found


@pytest.mark.parametrize(
    ("capacity", "steps"),
    list(product([1, 2, 3], [[[0, 1]], [[0], [1]], [[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1, 2], [3]]])),
)
def test_reservoir_is_uniform_over_subsets(monkeypatch, capacity, steps):
    found = enumerated(monkeypatch, lambda: Memory(Reservoir(), 1, capacity), steps)
    count = sum(map(len, steps))
    size = min(capacity, count)
    assert all(len(stored) == size for stored in found)
    subsets = torch.combinations(torch.arange(count), size).shape[0]
    assert len(found) == subsets
    assert all(chance == pytest.approx(1 / subsets) for chance in found.values())


class Choices:
    """A generator and a ``_below`` that follow a path of choices; ``more`` ways to go on from its end, if any."""

    def __init__(self, path):
        self.path, self.weight, self.more = iter(path), 1.0, 0

    def choose(self, number):
        choice = next(self.path, None)
        if choice is None:
            self.more = self.more or number
            return 0
        self.weight /= number
        return choice

    def below(self, bounds, _generator):
        return np.array([self.choose(max(bound, 1)) for bound in bounds.tolist()], dtype=np.int64)

    def permutation(self, rows):
        orders = list(permutations(rows.tolist()))
        return np.array(orders[self.choose(len(orders))], dtype=np.int64)


def adaptive_histories(monkeypatch, capacity, batches, num_classes):
    """Exact distribution of the ids stored after each batch, under the adaptive quota."""
    found: Counter = Counter()
    paths = [()]
    while paths:
        path = paths.pop()
        choices = Choices(path)
        monkeypatch.setattr(policies, "_below", choices.below)
        memory, history, first = Memory(ClassReservoir(), num_classes, capacity), [], 0
        memory.state = SlotState(num_classes, capacity, np.zeros(num_classes, dtype=np.int64))
        for labels in map(np.array, batches):
            memory.state.admit(labels, choices, oldest_leave=False)
            memory.content[memory.state.labels < 0] = -1
            memory.add(np.arange(first, first + labels.size), labels)
            first += labels.size
            history.append(memory.stored())
            if choices.more:
                break
        if choices.more:
            paths += [(*path, choice) for choice in range(choices.more)]
        else:
            found[tuple(history)] += choices.weight
    return found


def histories_by_keys(capacity, batches):
    """The same of Avalanche's ``ClassBalancedBuffer``, by its definition.

    Each sample has a random key. A class keeps the samples of its largest keys, as many as its share of the capacity
    among the classes met so far. After a batch its classes keep the best by their share before it, then all classes
    the best by their share after it.
    """
    labels = [label for batch in batches for label in batch]
    classes = sorted(set(labels))
    orders = [list(permutations([i for i, label in enumerate(labels) if label == c])) for c in classes]
    found: Counter = Counter()
    for best_first in product(*orders):
        rank = {i: place for order in best_first for place, i in enumerate(order)}
        groups, shares, history, first = {}, {}, [], 0
        for batch in batches:
            new = {c: [first + k for k, label in enumerate(batch) if label == c] for c in sorted(set(batch))}
            first += len(batch)
            met = sorted(set(groups) | set(new))
            share, rest = divmod(capacity, len(met))
            sizes = {c: share + (place < rest) for place, c in enumerate(met)}
            for c, samples in new.items():
                whole = sorted(groups.get(c, []) + samples, key=rank.__getitem__)
                groups[c] = whole[: shares.get(c, sizes[c])]
            groups, shares = {c: kept[: sizes[c]] for c, kept in groups.items()}, sizes
            history.append(tuple(sorted(i for kept in groups.values() for i in kept)))
        found[tuple(history)] += 1
    count = sum(found.values())
    return {history: number / count for history, number in found.items()}


@pytest.mark.parametrize(
    ("capacity", "batches"),
    [
        (2, [[0], [0], [0], [1], [0, 1]]),
        (3, [[0, 0], [0], [0, 1], [1, 1]]),
        (3, [[1, 1, 1], [1, 0], [0, 0]]),
        (4, [[0, 0, 0, 0], [1, 2]]),
        (4, [[0, 0], [0, 1, 0], [1, 2]]),
        (2, [[2, 2], [0], [1, 2], [1, 0]]),
        (1, [[1], [0, 1], [1, 0]]),
        (5, [[0, 1, 0, 1], [1, 0, 1]]),
    ],
)
def test_class_reservoir_stores_what_avalanches_class_balanced_buffer_does(monkeypatch, capacity, batches):
    # What is stored after each batch, jointly: not only is each memory alike, but also the way from one to the next.
    num_classes = 1 + max(label for batch in batches for label in batch)
    found = adaptive_histories(monkeypatch, capacity, batches, num_classes)
    wanted = histories_by_keys(capacity, batches)
    assert set(found) == set(wanted)
    assert all(chance == pytest.approx(wanted[history]) for history, chance in found.items())


@pytest.mark.parametrize("steps", [[[0, 1, 2, 3]], [[0], [1, 2], [3]]])
def test_class_reservoir_is_a_reservoir_of_each_class(monkeypatch, steps):
    found = enumerated(monkeypatch, lambda: Memory(ClassReservoir(), 1, 2), steps)
    assert sorted(found.values()) == [pytest.approx(1 / 6)] * 6


@pytest.mark.parametrize(
    ("room", "first", "second"), [(1, 1, 1), (2, 2, 2), (2, 2, 1), (3, 2, 3), (3, 3, 2), (2, 1, 3)]
)
def test_nil_keeps_a_shuffled_choice(monkeypatch, room, first, second):
    # All ids of the first batch are stored (it has at most `room`), then each of the S + C stays with R / (S + C).
    steps = [list(range(first)), list(range(first, first + second))]
    found = enumerated(monkeypatch, lambda: Memory(Nil(8), 1, room), steps)
    subsets = torch.combinations(torch.arange(first + second), room).shape[0]
    assert len(found) == subsets
    assert all(chance == pytest.approx(1 / subsets) for chance in found.values())


def test_nil_takes_c_of_the_batch():
    for seed in range(50):
        memory = Memory(Nil(4), 2, 20, seed)
        assignment = memory.add(range(9), [0, 1, 0, 1, 0, 1, 0, 1, 0])
        assert assignment.rows.size == 4
        assert memory.state.offered.sum() == 4


def test_nil_stores_a_sample_again():
    memory = Memory(Nil(2), 1, 10)
    memory.add([5, 5])
    memory.add([5, 5])
    assert memory.stored() == (5, 5, 5, 5)


def test_class_balanced_appends_all_then_overwrites_c():
    memory = Memory(ClassBalanced(3), 2, 2000)
    assert memory.add(range(30), [0, 1] * 15).rows.size == 30
    memory.add(range(100, 4100), [0, 1] * 2000)
    assert memory.state.class_counts.tolist() == [1000, 1000]
    written, offered, steps, b = 0, 0, 3000, 12
    for step in range(steps):
        assignment = memory.add(np.arange(b) + 10_000 + b * step, [0, 1, 1] * 4)
        written += assignment.rows.size
        offered += int(assignment.offered.sum())
    # Binomial: mean c a batch; two of a batch on one of 1000 slots cost less than 0.2 %.
    sigma = (steps * b * (3 / b) * (1 - 3 / b)) ** 0.5
    assert abs(offered - 3 * steps) < 4 * sigma
    assert abs(written - 3 * steps) < 4 * sigma + 0.002 * 3 * steps


def test_class_balanced_overwrites_any_slot_alike():
    hits = np.zeros(5)
    for seed in range(2000):
        memory = Memory(ClassBalanced(1), 1, 5, seed)
        memory.add(range(5))
        hits[memory.add([9]).slots] += 1
    assert hits.sum() == 2000
    assert ((hits - 400) ** 2 / 400).sum() < 18.5  # chi-square, 4 degrees, p = 0.001


def test_class_balanced_with_c_of_b_or_more_takes_all():
    memory = Memory(ClassBalanced(64), 1, 100)
    memory.add(range(100))
    assert memory.add(range(100, 110)).offered.sum() == 10


def test_greedy_keeps_the_first_of_each_class():
    memory = Memory(Greedy(), 2, 4)
    memory.add([0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 0, 1])
    assert memory.stored() == (0, 1, 2, 5)
    assert memory.add(range(6, 30), [0, 1] * 12).slots.size == 0
    assert memory.state.offered.tolist() == [16, 14]


def test_fifo_lets_the_oldest_leave():
    memory = Memory(Fifo(8), 2, 6)
    for k in range(5):
        memory.add([k], [0])
    memory.add([50], [1])
    assert memory.stored() == (2, 3, 4, 50)
    memory.add([3], [0])  # stored: keeps its age
    memory.add([7, 8], [0, 0])
    assert set(memory.stored()) == {4, 7, 8, 50}
    memory.add(range(20, 28), [0] * 8)  # more than there is room for
    assert len(memory.stored()) == 4
    assert sum(20 <= k < 28 for k in memory.stored()) == 3


def test_reservoir_by_simulation_keeps_one_of_two_half_the_time():
    first = 0
    for seed in range(1000):
        memory = Memory(Reservoir(), 1, 1, seed)
        memory.add([0])
        memory.add([1])
        first += memory.stored() == (0,)
    assert abs(first - 500) < 4 * 250**0.5


@pytest.mark.parametrize(
    "policy", [ClassBalanced(4), Reservoir(), ClassReservoir(), Fifo(4), Greedy(), GreedyBalancing()]
)
def test_a_stored_sample_is_refreshed(policy):
    memory = Memory(policy, 2, 8)
    memory.add([3, 3, 3], [1, 1, 1])
    assert memory.stored() == (3,)
    slot = int(np.flatnonzero(memory.content == 3)[0])
    assignment = memory.add([4, 3], [1, 1])
    assert memory.stored() == (3, 4)
    assert memory.content[slot] == 3
    assert slot in assignment.slots.tolist()
    for size in (4, 6):  # samples without an id are never the same
        memory.add([-1, -1], [0, 0])
        assert memory.state.size == size


def test_rooms_share_with_what_is_left_in_a_fixed_order():
    assert class_quotas(25, ALL(10)).tolist() == [3] * 5 + [2] * 5
    assert class_quotas(2, ALL(3)).tolist() == [1, 1, 0]
    assert class_quotas(5, np.array([False, True, True])).tolist() == [0, 3, 2]
    assert class_quotas(5, ~ALL(3)).tolist() == [0, 0, 0]


def test_classes_without_room_store_nothing():
    for policy in (Nil(6), ClassBalanced(4), ClassReservoir(), Fifo(6), Greedy()):
        memory = Memory(policy, 3, 2)
        memory.add(range(6), [0, 1, 2] * 2)
        assert memory.state.class_counts.tolist() == [1, 1, 0]


def greedily_balanced(labels, capacity):
    """Rows of each class by algorithm 1 of Prabhu et al. 2020, sample by sample."""
    counts, seen = [0] * (max(labels) + 1), set()
    for label in labels:
        if label not in seen or counts[label] < capacity / len(seen):
            if sum(counts) >= capacity:
                counts[counts.index(max(counts))] -= 1
            seen.add(label)
            counts[label] += 1
    return counts


@pytest.mark.parametrize("batch", [1, 3, 10])
@pytest.mark.parametrize(
    "sizes", [[200, 200, 200, 200], [200, 10, 10, 200], [3, 200], [200, 3], [5, 5, 5], [40, 1, 30, 2, 20, 3, 10]]
)
@pytest.mark.parametrize("mixed", [False, True])
def test_greedy_balancing_is_the_papers_sampler(sizes, batch, mixed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    if mixed:
        labels = np.random.default_rng(0).permutation(labels)
    memory, seen, size = Memory(GreedyBalancing(), len(sizes), 100), 0, 0
    for low in range(0, len(labels), batch):
        part = labels[low : low + batch]
        memory.add(np.arange(low, low + len(part)), part)
        # A sample is in one slot, which is noted to be of its class, and the memory never shrinks.
        assert len(set(memory.stored())) == memory.state.size
        assert memory.state.size >= size
        size, held = memory.state.size, memory.content >= 0
        assert (labels[memory.content[held]] == memory.state.labels[held]).all()
        seen += len(part)
        balanced = greedily_balanced(labels[:seen].tolist(), 100)
        assert memory.state.class_counts[: len(balanced)].tolist() == balanced


def test_greedy_balancing_lets_any_row_of_the_largest_class_go():
    gone = np.zeros(4)
    for seed in range(2000):
        memory = Memory(GreedyBalancing(), 2, 4, seed)
        memory.add(range(4), [0] * 4)
        memory.add([4], [1])
        gone[sorted({0, 1, 2, 3} - set(memory.stored()))] += 1
    assert gone.sum() == 2000
    assert ((gone - 500) ** 2 / 500).sum() < 16.3  # chi-square, 3 degrees, p = 0.001


def test_greedy_balancing_in_a_buffer_draws_counts_and_comes_back():
    labels = torch.arange(3).repeat_interleave(torch.tensor([30, 4, 30]))
    make = lambda: RehearsalBuffer(  # noqa: E731
        3, 20, "greedy", "adaptive", None, RowStore({"y": torch.zeros(0, dtype=torch.int64)}, 20), num_samples=64
    )
    buffer, resumed = make(), make()
    for low in range(0, 64, 4):
        part = slice(low, low + 4)
        buffer.add({"y": labels[part]}, labels[part], torch.arange(64)[part])
        resumed.load_state_dict(buffer.state_dict())
        stored = buffer.slots_at(torch.arange(len(buffer)))
        resumed.store.insert(stored, buffer.store.gather(stored))
        buffer, resumed = resumed, buffer
    assert buffer.class_counts.tolist() == greedily_balanced(labels.tolist(), 20) == [9, 4, 7]
    slots = buffer.draw(20, torch.tensor([True, False, False]))
    assert buffer.labels_at(slots).bincount(minlength=3).tolist() == [0, 4, 7]
    assert torch.equal(buffer.store.gather(slots)["y"], buffer.labels_at(slots))


def of_first_task(policy, capacity, steps, seed):
    """How many of a full memory's rows are left after further batches of the same class."""
    memory = Memory(policy, 1, capacity, seed)
    for sample in range(capacity):
        memory.add([sample])
    for step in steps:
        memory.add(step)
    return sum(sample < capacity for sample in memory.stored())


# Task 1 brings ten new samples of task 0's class, in batches of two.
AGAIN = [[k, k + 1] for k in range(10, 20, 2)]


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        (Nil(2), 4 * (4 / 6) ** 5),
        (Nil(1), 4 * (4 / 5) ** 5),
        (ClassBalanced(20), 4 * (3 / 4) ** 10),
        (ClassBalanced(1), 4 * (1 - (1 / 2) / 4) ** 10),
        (Reservoir(), 4 * 4 / 14),
        (ClassReservoir(), 4 * 4 / 14),
        (Fifo(2), 0),
        (Greedy(), 4),
        (GreedyBalancing(), 4),
    ],
)
def test_what_is_left_of_a_task_whose_class_comes_again(policy, left):
    # As each policy's definition has it, in the mean.
    found = np.array([of_first_task(policy, 4, AGAIN, seed) for seed in range(3000)])
    assert abs(found.mean() - left) <= 4 * found.std() / len(found) ** 0.5


def test_make_policy():
    assert make_policy("nil", 3) == Nil(3)
    assert make_policy("reservoir", None) == Reservoir()
    assert make_policy("class_reservoir", None) == ClassReservoir()
    assert make_policy("greedy", None) == Greedy()
    assert make_policy("greedy", None, "adaptive") == GreedyBalancing()
    for name in ("reservoir", "class_reservoir", "greedy"):
        with pytest.raises(ConfigurationError, match="remove num_candidates=4"):
            make_policy(name, 4)
    for name, c in (("nil", None), ("fifo", 0), ("class_balanced", -1), ("ring", 1)):
        with pytest.raises(ConfigurationError, match=r"give"):
            make_policy(name, c)
