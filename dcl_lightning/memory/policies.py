"""Insertion policies: which samples of a batch enter the memory, and which slots they take.

Each policy is defined for samples that come one after another, and computed for a whole batch at once: a sample gets
the slot that it would have taken, and if several took the same slot, the last one keeps it. The cost of a batch depends
on its size and on the number of classes, not on the size of the memory. Two cases cost more: a new class under the
adaptive quota redistributes all slots, and ``GreedyBalancing`` searches the whole memory for each row that it evicts.

Each policy states what it does if a class comes again in a later task. Only the reservoirs keep samples of all tasks
alike.
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
    "POLICIES", "ClassBalanced", "ClassReservoir", "Fifo", "Greedy", "GreedyBalancing", "Nil", "Policy", "PolicyName",
    "Reservoir", "make_policy", "policy_class",
]  # fmt: skip


class Policy(ABC):
    """Decides which samples of a batch enter the memory, and where. A subclass sets the traits that differ from these.

    Attributes:
        candidates: c, the number of samples of a batch that are offered; None if all are.
        owns_slots: whether each class has its own slots, by the quota; otherwise any sample may take any slot.
        refreshes: whether a sample that is already stored is written to its slot again instead of being stored twice.
        shares_by_class: whether the quota gives each class a share of the memory.
        needs_labels: whether the policy requires labels.
        oldest_leave: whether rows leave in the order in which they entered.
        offers_all: whether all samples of a batch are offered, so that the policy takes no ``candidates``.
        forgets: the verb phrase of a warning about earlier tasks whose classes come again in later ones; None if the
            memory keeps all tasks alike.
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
        """Return the decision for a batch; the state is not changed.

        Args:
            state: of the memory.
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
    """Sort rows by class (stable); return them, their classes, and each row's position within its class."""
    classes = labels[rows]
    order = classes.argsort(kind="stable")
    classes = classes[order]
    return rows[order], classes, np.arange(rows.size) - classes.searchsorted(classes)


def _below(bounds: Integers, generator: Generator) -> Integers:
    """Draw a whole number from ``[0, bound)`` for each bound; 0 for the bound 0."""
    return (generator.random(bounds.size) * bounds).astype(np.int64)


def _split(
    state: SlotState, rows: Integers, labels: Integers, ids: Integers | None
) -> tuple[Integers, Integers, Integers]:
    """Split the rows of a batch; return the new ones, the stored ones, and the slots of the stored ones.

    If several rows of one batch have the same id, the last one counts.
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
    """Refresh stored rows first, then let new rows take their slots in order; return rows and distinct slots."""
    if stored.size:
        rows, slots = np.concatenate((stored, rows)), np.concatenate((stored_slots, slots))
    slots, last = _last(slots)
    return rows[last], slots


def _in_class(
    state: SlotState, rows: Integers, classes: Integers, place: Integers, enters: npt.NDArray[np.bool_]
) -> tuple[Integers, Integers]:
    """Return the rows that enter and their slots, given their places among the slots of their class."""
    return rows[enters], state.table[state.start[classes[enters]] + place[enters]]


_FIRST_COME = "keeps the first samples of each class, so that the memory takes none or few of the later tasks"


@dataclass(frozen=True)
class Nil(Policy):
    """Draws c candidates from the batch; each of their classes keeps R rows drawn from its stored rows and candidates.

    Computed as reservoir sampling that counts the S stored rows as seen: after C more, each of the S + C rows is kept
    with the same probability, which is the shuffle of the paper. A sample may be stored twice, since its id is not
    looked up. A stored row of a full class survives m batches with C_1 ... C_m candidates of its class with probability
    ``prod_i R / (R + C_i)``: if the class comes again, rows of earlier tasks soon vanish.

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
    """Appends a sample if its class has room; otherwise it takes a random slot of its class with probability c / b.

    A sample counts as offered with probability c / b, appended or not, so that c of a batch are offered as under the
    other policies. A stored row of a full class survives m samples of its class that are not stored with probability
    ``(1 - min(c / b, 1) / R)^m``: if the class comes again, rows of earlier tasks soon vanish.

    Args:
        candidates: c, the expected number of overwrites per batch once all classes are full.

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
    """Stores each of the n samples seen so far with probability capacity / n.

    Exact if each sample comes once; a stored sample that comes again counts as seen and keeps its slot. Classes make no
    difference: tasks share the memory in proportion to their numbers of samples, also if classes come again.

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
class ClassReservoir(Policy):
    """A reservoir for each class: each of its n samples seen so far is stored with probability R / n.

    Exact under the adaptive quota, too, where a class loses random rows when others come: they are a reservoir of the
    smaller size. A stored sample that comes again counts as seen and keeps its slot.

    Source: Vitter, ACM TOMS 11 (1985), algorithm R, for each class; Avalanche's ``ClassBalancedBuffer`` (Carta et al.,
    JMLR 24 (2023) 363), which keeps the samples of the largest random keys, has the same distribution.
    """

    candidates = None
    offers_all: ClassVar[bool] = True
    forgets: ClassVar[str | None] = None

    def assign(self, state: SlotState, labels: Integers, ids: Integers | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        rows, stored, slots = _split(state, np.arange(labels.size), labels, ids)
        order, _, position = _by_class(np.arange(labels.size), labels)
        seen = np.empty_like(labels)  # of its class, up to each row
        seen[order] = position + 1
        seen += state.offered[labels]
        rows, classes, rank = _by_class(rows, labels)
        before, room = state.class_counts[classes] + rank, state.room[classes]
        place = np.where(before < room, before, _below(seen[rows], generator))
        offered = np.bincount(labels, minlength=state.num_classes)
        rows, taken = _in_class(state, rows, classes, place, place < room)
        rows, slots = _settle(rows, taken, stored, slots)
        return Assignment(rows, slots, offered, None, labels.size)


@dataclass(frozen=True)
class Greedy(Policy):
    """Appends a sample if its class has room, and never overwrites.

    The first samples of each class stay for good: once a class is full, no sample of a later task enters.
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
    """GDumb's sampler: a sample enters if its class has fewer rows than its share of the memory.

    A share is capacity / classes seen, not rounded. Once the memory is full, each sample that enters evicts a random
    row of the largest class (the first of several). A class that has its share takes no sample of a later task.

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
    """Draws c candidates from the batch, which enter; of a full class the oldest row leaves.

    A refreshed row keeps its age. After R further candidates of a class, none of its earlier rows is left: if the class
    comes again, an earlier task is forgotten completely.

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


# To add a policy, write its class and add its name to both.
PolicyName = Literal[
    "nil",
    "class_balanced",
    "reservoir",
    "class_reservoir",
    "greedy",
    "fifo",
]
POLICIES: dict[str, type[Policy]] = {
    "nil": Nil,
    "class_balanced": ClassBalanced,
    "reservoir": Reservoir,
    "class_reservoir": ClassReservoir,
    "greedy": Greedy,
    "fifo": Fifo,
}


def policy_class(name: str, quota: str) -> type[Policy]:
    """Return the class of a policy.

    Args:
        name: a key of ``POLICIES``.
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
        ConfigurationError: the name is unknown, or c is missing, below 1, or given although every sample is offered.
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
