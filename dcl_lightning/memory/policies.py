"""Insertion policies: which samples of a batch enter the memory, and which slots they take.

Every policy is written as if the samples came one after another, and computed for the whole batch at once: each sample
gets the slot that it would have taken, and of several that took the same slot the last one has it. A batch costs the
samples in it and the number of classes, whatever the size of the memory; only a class that is new under the adaptive
quota has the slots dealt out anew, and each sample for which ``GreedyBalancing`` lets another go looks for it in all.

What a policy does where a class comes again in a later task is said with each: only ``Reservoir`` keeps samples of all
tasks alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.slots import Assignment, Integers, SlotState

__all__ = [
    "POLICIES", "ClassBalanced", "Fifo", "Greedy", "GreedyBalancing", "Nil", "Policy", "PolicyName", "Reservoir",
    "make_policy", "policy_class",
]  # fmt: skip


class Policy(ABC):
    """Decides which samples of a batch enter and where; a policy states the traits in which it differs from these.

    Attributes:
        candidates: number c of a batch that is offered; None if all are.
        owns_slots: whether each class has slots of its own, a share of all by the quota; else any sample may take any
            slot.
        refreshes: whether a sample that is stored is written to its slot again instead of being stored twice.
        shares_by_class: whether the quota gives each class a share of the memory.
        needs_labels: whether it can do nothing without labels.
        oldest_leave: whether rows leave in the order in which they came.
        offers_all: whether all samples of a batch are offered, so that it takes no ``candidates``.
        forgets: what becomes of earlier tasks whose classes come again in later ones, in words; None if the memory
            keeps all tasks alike.
    """

    candidates: int | None
    owns_slots: ClassVar[bool] = True
    refreshes: ClassVar[bool] = True
    shares_by_class: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    oldest_leave: ClassVar[bool] = False
    offers_all: ClassVar[bool] = False
    forgets: ClassVar[str | None] = (
        "lets a class's new samples overwrite its stored ones, so that little or nothing of the earlier tasks is left "
        "in the memory"
    )

    @abstractmethod
    def assign(self, state: SlotState, labels: Integers, ids: Integers | None, generator: Generator) -> Assignment:
        """Decide; the state stays as it is.

        Args:
            state: what is stored.
            labels: ``(b,)`` int64, in ``[0, K)``.
            ids: ``(b,)`` int64, -1 for a sample without one; None for no ids.
            generator: for all draws.
        """


def _last(keys: Integers) -> tuple[Integers, Integers]:
    """Return the distinct keys, ascending, and the last place of each."""
    order = keys.argsort(kind="stable")
    ordered = keys[order]
    last = np.empty(ordered.size, dtype=np.bool_)
    last[-1:] = True
    np.not_equal(ordered[1:], ordered[:-1], out=last[:-1])
    return ordered[last], order[last]


def _by_class(rows: Integers, labels: Integers) -> tuple[Integers, Integers, Integers]:
    """Order rows by class, else as they were; return them, their classes, and how many of the class precede each."""
    classes = labels[rows]
    order = classes.argsort(kind="stable")
    classes = classes[order]
    return rows[order], classes, np.arange(rows.size) - classes.searchsorted(classes)


def _below(bounds: Integers, generator: Generator) -> Integers:
    """Return for each bound a whole number drawn from ``[0, bound)``; 0 for the bound 0."""
    return (generator.random(bounds.size) * bounds).astype(np.int64)


def _split(
    state: SlotState, rows: Integers, labels: Integers, ids: Integers | None
) -> tuple[Integers, Integers, Integers]:
    """Part the rows of a batch into new ones and stored ones; return new, stored, and the latter's slots.

    Of rows with the same id in one batch the last counts.
    """
    if ids is None:
        return rows, rows[:0], rows[:0]
    asked = ids[rows]
    order = asked.argsort(kind="stable")
    ordered = asked[order]
    again = ordered[1:] == ordered[:-1]
    if again.any():
        last = ordered < 0
        last[-1:] = True
        last[:-1] |= ~again
        rows = rows[np.sort(order[last])]
        asked = ids[rows]
    found = state.find(asked, labels[rows])
    stored = found >= 0
    return rows[~stored], rows[stored], found[stored]


def _settle(rows: Integers, slots: Integers, stored: Integers, stored_slots: Integers) -> tuple[Integers, Integers]:
    """Let stored rows be refreshed first, then new ones take their slots in order; return rows and distinct slots."""
    if stored.size:
        rows, slots = np.concatenate((stored, rows)), np.concatenate((stored_slots, slots))
    slots, last = _last(slots)
    return rows[last], slots


def _in_class(
    state: SlotState, rows: Integers, classes: Integers, place: Integers, enters: npt.NDArray[np.bool_]
) -> tuple[Integers, Integers]:
    """Return the rows that enter and their slots, given by their places among those of their class."""
    return rows[enters], state.table[state.start[classes[enters]] + place[enters]]


_FIRST_COME = "keeps the first samples of each class, so that the memory takes none or few of the later tasks"


@dataclass(frozen=True)
class Nil(Policy):
    """c candidates drawn from the batch; each class among them keeps R drawn from its stored rows and candidates.

    Computed as reservoir sampling that starts with the S stored rows as seen: after C more each of the S + C is kept
    with the same probability, which is the shuffle. Stored samples are not looked for: one may be stored twice.
    A row stored before stays through m batches with C_1 ... C_m candidates of its full class with probability
    ``prod_i R / (R + C_i)``: where the class comes again, of earlier tasks' rows soon none is left.

    Args:
        candidates: c.

    Source: Muñoz et al., Knowledge-Based Systems 208 (2020) 106460.
    """

    candidates: int
    refreshes: ClassVar[bool] = False

    def assign(self, state: SlotState, labels: Integers, ids: Integers | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        drawn = generator.permutation(labels.size)[: self.candidates]
        rows, classes, rank = _by_class(drawn, labels)
        before, room = state.class_counts[classes] + rank, state.room[classes]
        place = np.where(before < room, before, _below(before + 1, generator))
        offered = np.bincount(classes, minlength=state.num_classes)
        rows, slots = _in_class(state, rows, classes, place, place < room)
        slots, last = _last(slots)
        return Assignment(rows[last], slots, offered, None, labels.size)


@dataclass(frozen=True)
class ClassBalanced(Policy):
    """All b are offered: one whose class has room is appended, else it takes a random slot of it with chance c / b.

    Counted as offered are those that the chance fell on, appended or not: c of a batch, as under the other policies.
    A row stays through m samples of its full class that are not stored with probability ``(1 - min(c / b, 1) / R)^m``:
    where the class comes again, of earlier tasks' rows soon none is left.

    Args:
        candidates: c, the expected number of overwrites a batch once all classes are full.

    Source: Bouvier et al., CCGrid 2024, algorithm 1.
    """

    candidates: int

    def assign(self, state: SlotState, labels: Integers, ids: Integers | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        rows, stored, slots = _split(state, np.arange(labels.size), labels, ids)
        rows, classes, rank = _by_class(rows, labels)
        before, room = state.class_counts[classes] + rank, state.room[classes]
        appends = before < room
        place = np.where(appends, before, _below(room, generator))
        chosen = generator.random(labels.size) * labels.size < self.candidates
        enters = appends | (chosen[rows] & (room > 0))
        offered = np.bincount(labels[chosen], minlength=state.num_classes)
        rows, taken = _in_class(state, rows, classes, place, enters)
        rows, slots = _settle(rows, taken, stored, slots)
        return Assignment(rows, slots, offered, None, labels.size)


@dataclass(frozen=True)
class Reservoir(Policy):
    """All b are offered; after n samples each of them is stored with probability capacity / n.

    Exact as long as each sample comes once. One that is stored and comes again counts as seen and keeps its slot. Which
    class a sample is of makes no difference: tasks share the memory by their numbers of samples, also where classes
    come again.

    Source: Vitter, ACM TOMS 11 (1985), algorithm R.
    """

    candidates = None
    owns_slots: ClassVar[bool] = False
    shares_by_class: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    offers_all: ClassVar[bool] = True
    forgets: ClassVar[str | None] = None

    def assign(self, state: SlotState, labels: Integers, ids: Integers | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        rows, stored, slots = _split(state, np.arange(labels.size), labels, ids)
        following = state.size + np.arange(rows.size)
        place = np.where(following < state.capacity, following, _below(state.seen + rows + 1, generator))
        enters = place < state.capacity
        offered = np.bincount(labels, minlength=state.num_classes)
        rows, slots = _settle(rows[enters], place[enters], stored, slots)
        return Assignment(rows, slots, offered, None, labels.size)


@dataclass(frozen=True)
class Greedy(Policy):
    """All b are offered: one whose class has room is appended, and nothing is overwritten.

    The first samples of each class stay for good: where it is full, none of a later task enters.
    """

    candidates = None
    offers_all: ClassVar[bool] = True
    forgets: ClassVar[str | None] = _FIRST_COME

    def assign(self, state: SlotState, labels: Integers, ids: Integers | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        rows, stored, slots = _split(state, np.arange(labels.size), labels, ids)
        rows, classes, rank = _by_class(rows, labels)
        place = state.class_counts[classes] + rank
        offered = np.bincount(labels, minlength=state.num_classes)
        rows, taken = _in_class(state, rows, classes, place, place < state.room[classes])
        rows, slots = _settle(rows, taken, stored, slots)
        return Assignment(rows, slots, offered, None, labels.size)


@dataclass(frozen=True)
class GreedyBalancing(Policy):
    """All b are offered: one whose class has fewer rows than its share of the memory enters, GDumb's sampler.

    A share is capacity / classes seen, not rounded. While the memory has room, nothing leaves it; once it is full, a
    row of the largest class (of several the first), drawn at random, leaves for each sample that enters. A class that
    has its share takes none of a later task.

    Source: Prabhu, Torr and Dokania, ECCV 2020, algorithm 1.
    """

    candidates = None
    owns_slots: ClassVar[bool] = False
    offers_all: ClassVar[bool] = True
    forgets: ClassVar[str | None] = _FIRST_COME

    def assign(self, state: SlotState, labels: Integers, ids: Integers | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        new, stored, stored_slots = _split(state, np.arange(labels.size), labels, ids)
        offered = np.bincount(labels, minlength=state.num_classes)
        counts, size = state.class_counts.copy(), state.size
        seen = (state.offered > 0) | (counts > 0)
        classes, held = int(seen.sum()), state.labels.copy()
        rows, slots = [], []
        for row in new.tolist():
            label = labels[row]
            if not seen[label]:
                seen[label], classes = True, classes + 1
            if counts[label] * classes >= state.capacity:
                continue
            slot = size
            if size < state.capacity:
                size += 1
            else:
                largest = counts.argmax()
                counts[largest] -= 1
                slot = int(generator.choice(np.flatnonzero(held == largest)))
            counts[label] += 1
            held[slot] = label
            rows.append(row)
            slots.append(slot)
        taken = np.array(rows, dtype=np.int64), np.array(slots, dtype=np.int64)
        return Assignment(*_settle(*taken, stored, stored_slots), offered, None, labels.size)


@dataclass(frozen=True)
class Fifo(Policy):
    """c candidates drawn from the batch enter; of a full class the oldest leaves. A refreshed row keeps its age.

    After R further candidates of a class none of its earlier rows is left: where it comes again, an earlier task is
    forgotten whole.

    Args:
        candidates: c.
    """

    candidates: int
    needs_labels: ClassVar[bool] = False
    oldest_leave: ClassVar[bool] = True

    def assign(self, state: SlotState, labels: Integers, ids: Integers | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        drawn = generator.permutation(labels.size)[: self.candidates]
        rows, stored, slots = _split(state, drawn, labels, ids)
        rows, classes, rank = _by_class(rows, labels)
        room = state.room[classes]
        place = (state.cursor[classes] + rank) % np.maximum(room, 1)
        offered = np.bincount(labels[drawn], minlength=state.num_classes)
        entered = np.bincount(classes, minlength=state.num_classes)
        rows, taken = _in_class(state, rows, classes, place, room > 0)
        rows, slots = _settle(rows, taken, stored, slots)
        return Assignment(rows, slots, offered, entered, labels.size)


PolicyName = Literal["nil", "class_balanced", "reservoir", "greedy", "fifo"]
# A policy is added with its class, its name above and its line here.
POLICIES: dict[str, type[Policy]] = {
    "nil": Nil, "class_balanced": ClassBalanced, "reservoir": Reservoir, "greedy": Greedy, "fifo": Fifo,
}  # fmt: skip


def policy_class(name: str, quota: str) -> type[Policy]:
    """Return the class of a policy.

    Args:
        name: ``nil``, ``class_balanced``, ``reservoir``, ``greedy`` or ``fifo``.
        quota: ``fixed`` or ``adaptive``, with which ``greedy`` is ``GreedyBalancing``.

    Raises:
        ConfigurationError: the name is unknown.
    """
    if name not in POLICIES:
        raise ConfigurationError(f"policy '{name}': give one of {', '.join(POLICIES)}")
    return GreedyBalancing if name == "greedy" and quota == "adaptive" else POLICIES[name]


def make_policy(name: str, num_candidates: int | None, quota: str = "fixed") -> Policy:
    """Return a policy by its name.

    Args:
        name: see ``policy_class``.
        num_candidates: c, at least 1; None for a policy that is offered all samples.
        quota: see ``policy_class``.

    Raises:
        ConfigurationError: the name is unknown, or c is missing, below 1, or given where every sample is offered.
    """
    kind = policy_class(name, quota)
    make: Callable[..., Policy] = kind
    if kind.offers_all:
        if num_candidates is not None:
            raise ConfigurationError(f"policy {name} offers every sample: remove num_candidates={num_candidates}")
        return make()
    if num_candidates is None or num_candidates < 1:
        raise ConfigurationError(f"policy {name}: num_candidates={num_candidates}: give a whole number of at least 1")
    return make(num_candidates)
