"""How samples enter the memory: which of a batch, and which slots they take.

Every policy is written as if the samples came one after another, and computed for the whole batch at once: each sample
gets the slot that it would have taken, and of several that took the same slot the last one has it. A batch costs the
samples in it and the number of classes, whatever the size of the memory; only a class that is new under the adaptive
quota has the slots dealt out anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.slots import Assignment, Integers, SlotState

__all__ = ["ClassBalanced", "Fifo", "Greedy", "Nil", "Policy", "Reservoir", "make_policy"]


class Policy(Protocol):
    """Decides which samples of a batch enter and where."""

    @property
    def refreshes(self) -> bool:
        """Whether a sample that is stored is written to its slot again instead of being stored twice."""
        ...

    @property
    def candidates(self) -> int | None:
        """Number c of a batch that is offered; None if all are."""
        ...

    def assign(self, state: SlotState, labels: Integers, ids: Integers | None, generator: Generator) -> Assignment:
        """Decide; the state stays as it is.

        Args:
            state: what is stored.
            labels: ``(b,)`` int64, in ``[0, K)``.
            ids: ``(b,)`` int64, -1 for a sample without one; None for no ids.
            generator: for all draws.
        """
        ...


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


@dataclass(frozen=True)
class Nil:
    """c candidates drawn from the batch; each class among them keeps R drawn from its stored rows and candidates.

    Computed as reservoir sampling that starts with the S stored rows as seen: after C more each of the S + C is kept
    with the same probability, which is the shuffle. Stored samples are not looked for: one may be stored twice.

    Args:
        candidates: c.

    Source: Muñoz et al., Knowledge-Based Systems 208 (2020) 106460.
    """

    candidates: int
    refreshes = False

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
class ClassBalanced:
    """All b are offered: one whose class has room is appended, else it takes a random slot of it with chance c / b.

    Counted as offered are those that the chance fell on, appended or not: c of a batch, as under the other policies.

    Args:
        candidates: c, the expected number of overwrites a batch once all classes are full.

    Source: Bouvier et al., CCGrid 2024, algorithm 1.
    """

    candidates: int
    refreshes = True

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
class Reservoir:
    """All b are offered; after n samples each of them is stored with probability capacity / n.

    Exact as long as each sample comes once. One that is stored and comes again counts as seen and keeps its slot.

    Source: Vitter, ACM TOMS 11 (1985), algorithm R.
    """

    candidates = None
    refreshes = True

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
class Greedy:
    """All b are offered: one whose class has room is appended, and nothing is overwritten.

    With the adaptive quota a new class makes the others give up rows drawn at random: GDumb's sampler.

    Source: Prabhu, Torr and Dokania, ECCV 2020, algorithm 1.
    """

    candidates = None
    refreshes = True

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
class Fifo:
    """c candidates drawn from the batch enter; of a full class the oldest leaves. A refreshed row keeps its age.

    Args:
        candidates: c.
    """

    candidates: int
    refreshes = True

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


def make_policy(name: str, num_candidates: int | None) -> Policy:
    """Return a policy by its name.

    Args:
        name: ``nil``, ``class_balanced``, ``reservoir``, ``greedy`` or ``fifo``.
        num_candidates: c, at least 1; None for ``reservoir`` and ``greedy``.

    Raises:
        ConfigurationError: the name is unknown, or c is missing, below 1, or given where every sample is offered.
    """
    if name not in ("nil", "class_balanced", "reservoir", "greedy", "fifo"):
        raise ConfigurationError(f"policy '{name}': give one of nil, class_balanced, reservoir, greedy, fifo")
    if name in ("reservoir", "greedy"):
        if num_candidates is not None:
            raise ConfigurationError(f"policy {name} offers every sample: num_candidates={num_candidates} must go")
        return Reservoir() if name == "reservoir" else Greedy()
    if num_candidates is None or num_candidates < 1:
        raise ConfigurationError(f"policy {name}: num_candidates={num_candidates}: give a whole number of at least 1")
    if name == "nil":
        return Nil(num_candidates)
    return Fifo(num_candidates) if name == "fifo" else ClassBalanced(num_candidates)
