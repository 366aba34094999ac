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
import torch
from torch import Generator, Tensor

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.slots import Assignment, SlotState

__all__ = ["ClassBalanced", "Fifo", "Nil", "Policy", "Reservoir", "make_policy"]


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

    def assign(self, state: SlotState, labels: Tensor, ids: Tensor | None, generator: Generator) -> Assignment:
        """Decide; the state stays as it is.

        Args:
            state: what is stored.
            labels: ``(b,)`` int64, in ``[0, K)``.
            ids: ``(b,)`` int64, -1 for a sample without one; None for no ids.
            generator: for all draws.
        """
        ...


def _last(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct keys, ascending, and the last place of each."""
    ordered, order = keys.sort(stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=last[:-1])
    if bool(last.all()):
        return ordered, order
    return ordered[last], order[last]


def _by_class(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order rows by class, else as they were; return them, their classes, and how many of the class precede each."""
    classes, order = labels.index_select(0, rows).sort(stable=True)
    rank = torch.arange(rows.numel()) - torch.searchsorted(classes, classes)
    return rows.index_select(0, order), classes, rank


def _below(bounds: Tensor, generator: Generator) -> Tensor:
    """Return for each bound a whole number drawn from ``[0, bound)``; 0 for the bound 0."""
    return (torch.rand(bounds.shape, dtype=torch.float64, generator=generator) * bounds).long()


def _split(state: SlotState, rows: Tensor, labels: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Part the rows of a batch into new ones and stored ones; return new, stored, and the latter's slots.

    Of rows with the same id in one batch the last counts.
    """
    if ids is None:
        return rows, rows[:0], rows[:0]
    asked = ids.index_select(0, rows)
    ordered, order = asked.sort(stable=True)
    again = ordered[1:] == ordered[:-1]
    if bool(again.any()):
        last = ordered < 0
        last[-1:] = True
        last[:-1] |= ~again
        rows = rows[order[last].sort().values]
        asked = ids[rows]
    found = state.find(asked, labels.index_select(0, rows))
    stored = found >= 0
    if not bool(stored.any()):
        return rows, rows[:0], rows[:0]
    return rows[~stored], rows[stored], found[stored]


def _settle(rows: Tensor, slots: Tensor, stored: Tensor, stored_slots: Tensor) -> tuple[Tensor, Tensor]:
    """Let stored rows be refreshed first, then new ones take their slots in order; return rows and distinct slots."""
    if stored.numel():
        rows, slots = torch.cat((stored, rows)), torch.cat((stored_slots, slots))
    slots, last = _last(slots)
    return rows.index_select(0, last), slots


def _in_class(state: SlotState, rows: Tensor, classes: Tensor, place: Tensor, enters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that enter and their slots, given by their places among those of their class."""
    kept = enters.nonzero().flatten()
    start = state.start.index_select(0, classes.index_select(0, kept))
    return rows.index_select(0, kept), state.table.index_select(0, start + place.index_select(0, kept))


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

    def assign(self, state: SlotState, labels: Tensor, ids: Tensor | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        # In NumPy: on so few numbers its calls take a third of the time, which is Python's lock withheld from training.
        rows = torch.randperm(labels.numel(), generator=generator)[: self.candidates].numpy()
        classes = labels.numpy()[rows]
        order = classes.argsort(kind="stable")
        rows, classes = rows[order], classes[order]
        rank = np.arange(rows.size) - classes.searchsorted(classes)
        before, room = state.class_counts.numpy()[classes] + rank, state.room.numpy()[classes]
        place = np.where(before < room, before, _below(torch.from_numpy(before + 1), generator).numpy())
        offered = np.bincount(classes, minlength=state.num_classes)
        enters = place < room
        rows = rows[enters]
        slots = state.table.numpy()[state.start.numpy()[classes[enters]] + place[enters]]
        # Of several that took one slot the last one has it.
        order = slots.argsort(kind="stable")
        slots = slots[order]
        last = np.append(slots[1:] != slots[:-1], True)[: slots.size]
        return Assignment(
            torch.from_numpy(rows[order[last]]),
            torch.from_numpy(slots[last]),
            torch.from_numpy(offered),
            None,
            labels.numel(),
        )


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

    def assign(self, state: SlotState, labels: Tensor, ids: Tensor | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        rows, stored, slots = _split(state, torch.arange(labels.numel()), labels, ids)
        rows, classes, rank = _by_class(rows, labels)
        before, room = state.class_counts.index_select(0, classes) + rank, state.room.index_select(0, classes)
        appends = before < room
        place = torch.where(appends, before, _below(room, generator))
        chance = torch.rand(labels.shape, dtype=torch.float64, generator=generator) * labels.numel()
        chosen = chance < self.candidates
        enters = appends | (chosen.index_select(0, rows) & (room > 0))
        offered = torch.bincount(labels[chosen], minlength=state.num_classes)
        rows, taken = _in_class(state, rows, classes, place, enters)
        rows, slots = _settle(rows, taken, stored, slots)
        return Assignment(rows, slots, offered, None, labels.numel())


@dataclass(frozen=True)
class Reservoir:
    """All b are offered; after n samples each of them is stored with probability capacity / n.

    Exact as long as each sample comes once. One that is stored and comes again counts as seen and keeps its slot.

    Source: Vitter, ACM TOMS 11 (1985), algorithm R.
    """

    candidates = None
    refreshes = True

    def assign(self, state: SlotState, labels: Tensor, ids: Tensor | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        rows, stored, slots = _split(state, torch.arange(labels.numel()), labels, ids)
        following = state.size + torch.arange(rows.numel())
        place = torch.where(following < state.capacity, following, _below(state.seen + rows + 1, generator))
        enters = place < state.capacity
        offered = torch.bincount(labels, minlength=state.num_classes)
        kept = enters.nonzero().flatten()
        rows, slots = _settle(rows.index_select(0, kept), place.index_select(0, kept), stored, slots)
        return Assignment(rows, slots, offered, None, labels.numel())


@dataclass(frozen=True)
class Fifo:
    """c candidates drawn from the batch enter; of a full class the oldest leaves. A refreshed row keeps its age.

    Args:
        candidates: c.
    """

    candidates: int
    refreshes = True

    def assign(self, state: SlotState, labels: Tensor, ids: Tensor | None, generator: Generator) -> Assignment:
        """See :meth:`Policy.assign`."""
        drawn = torch.randperm(labels.numel(), generator=generator)[: self.candidates]
        rows, stored, slots = _split(state, drawn, labels, ids)
        rows, classes, rank = _by_class(rows, labels)
        room = state.room.index_select(0, classes)
        place = (state.cursor.index_select(0, classes) + rank) % room.clamp_min(1)
        offered = torch.bincount(labels[drawn], minlength=state.num_classes)
        entered = torch.bincount(classes, minlength=state.num_classes)
        rows, taken = _in_class(state, rows, classes, place, room > 0)
        rows, slots = _settle(rows, taken, stored, slots)
        return Assignment(rows, slots, offered, entered, labels.numel())


def make_policy(name: str, num_candidates: int | None) -> Policy:
    """Return a policy by its name.

    Args:
        name: ``nil``, ``class_balanced``, ``reservoir`` or ``fifo``.
        num_candidates: c, at least 1; None for ``reservoir``.

    Raises:
        ConfigurationError: the name is unknown, or c is missing, below 1, or given to ``reservoir``.
    """
    if name not in ("nil", "class_balanced", "reservoir", "fifo"):
        raise ConfigurationError(f"policy '{name}': give one of nil, class_balanced, reservoir, fifo")
    if name == "reservoir":
        if num_candidates is not None:
            raise ConfigurationError(f"policy reservoir offers every sample: num_candidates={num_candidates} must go")
        return Reservoir()
    if num_candidates is None or num_candidates < 1:
        raise ConfigurationError(f"policy {name}: num_candidates={num_candidates}: give a whole number of at least 1")
    if name == "nil":
        return Nil(num_candidates)
    return Fifo(num_candidates) if name == "fifo" else ClassBalanced(num_candidates)
