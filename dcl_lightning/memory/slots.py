"""Bookkeeping of the memory's slots: which are filled, with which sample, and to which class they belong.

In NumPy, whose calls on small arrays take a third of the time of torch's: the memory's thread holds the GIL meanwhile,
and the training thread waits for it.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from numpy.random import Generator

from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.types import StateDict

__all__ = ["Assignment", "Integers", "SlotState", "class_quotas"]

Integers: TypeAlias = npt.NDArray[np.int64]

_MAX_ID = 2**31


class Assignment(NamedTuple):
    """A policy's decision for a batch of b samples.

    Args:
        rows: ``(m,)`` int64, positions in the batch of the samples to write.
        slots: ``(m,)`` int64, distinct, the slots to write them to.
        offered: ``(K,)`` int64, samples of each class that were offered.
        entered: ``(K,)`` int64, new samples of each class that took a slot, including those that a later sample of the
            batch replaced; None unless the policy keeps a cursor among each class's slots.
        seen: number of samples in the batch, b.
    """

    rows: Integers
    slots: Integers
    offered: Integers
    entered: Integers | None
    seen: int


def class_quotas(capacity: int, classes: npt.NDArray[np.bool_]) -> Integers:
    """Divide the capacity among classes; the remainder goes to the first ones.

    Args:
        capacity: number of slots.
        classes: ``(K,)`` bool, the classes with a share: all for the fixed quota, those seen for the adaptive one.

    Returns:
        ``(K,)`` int64, slots of each class; their sum is the capacity, or 0 if no class has a share.
    """
    share, rest = divmod(capacity, max(int(classes.sum()), 1))
    place = classes.cumsum(0) - 1
    return np.where(classes, share + (place < rest), 0)


class SlotState:
    """Contents of the slots; only :meth:`apply` and :meth:`admit` change it.

    The slots of a class y are ``table[start[y] : start[y] + room[y]]``; the first ``class_counts[y]`` of them are
    filled. If the policy's classes own no slots, ``table``, ``start`` and ``room`` are unused.

    Args:
        num_classes: K.
        capacity: number of slots.
        room: ``(K,)`` int64, slots that each class owns.
        num_samples: ids are below this number; if 0, the map from ids to slots grows as larger ids come.
    """

    def __init__(self, num_classes: int, capacity: int, room: Integers, num_samples: int = 0) -> None:
        self.num_classes = num_classes
        self.capacity = capacity
        self.labels = np.full(capacity, -1)
        self.ids = np.full(capacity, -1)
        self.table = np.arange(capacity)
        self.room = room.copy()
        self.start = room.cumsum() - room
        self.class_counts = np.zeros(num_classes, dtype=np.int64)
        self.offered = np.zeros(num_classes, dtype=np.int64)
        self.cursor = np.zeros(num_classes, dtype=np.int64)
        self.admitted = np.zeros(num_classes, dtype=np.bool_)
        self.filled = np.zeros(capacity, dtype=np.int64)
        # For reports and resharding: the batch in which a slot's sample entered, and how often it was drawn since.
        self.entered = np.zeros(capacity, dtype=np.int64)
        self.drawn = np.zeros(capacity, dtype=np.int64)
        self.size = 0
        self.seen = 0
        self.offers = 0
        # Indexed by id. The last entry belongs to the id -1, "no id", and is never a slot.
        self.slot_of = np.full(num_samples + 1, -1)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays of the state."""
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, np.ndarray))

    def find(self, ids: Integers, labels: Integers) -> Integers:
        """Return ``(n,)`` int64, the slot that holds each sample with this label; -1 if it is not stored.

        Args:
            ids: ``(n,)`` int64, -1 for a sample without one.
            labels: ``(n,)`` int64.

        Raises:
            DataError: an id is out of range.
        """
        smallest, largest = (int(ids.min()), int(ids.max())) if ids.size else (-1, -1)
        if smallest < -1 or largest >= _MAX_ID:
            raise DataError(f"sample ids from {smallest} to {largest}: ids are places in the data set, or -1 for none")
        known = self.slot_of.size - 1
        if largest >= known:
            grown = np.full(max(2 * known, largest + 1) + 1, -1)
            grown[:known] = self.slot_of[:-1]
            self.slot_of = grown
        slots = self.slot_of[ids]
        return np.where(self.labels[slots] == labels, slots, -1)

    def apply(self, assignment: Assignment, labels: Integers, ids: Integers | None) -> None:
        """Apply a policy's decision.

        Args:
            assignment: the decision on the batch.
            labels: ``(b,)`` int64 of the batch.
            ids: ``(b,)`` int64 of the batch, -1 for a sample without one; None if ids are not looked up.
        """
        rows, slots = assignment.rows, assignment.slots
        self.offers += 1
        self.seen += assignment.seen
        self.offered += assignment.offered
        if assignment.entered is not None:
            self.cursor += assignment.entered
        if not slots.size:
            return
        old, new = self.labels[slots], labels[rows]
        changed = old != new
        if changed.any():
            self._recount(slots[changed], old[changed], new[changed])
        if ids is None:
            self.entered[slots], self.drawn[slots] = self.offers, 0
        else:
            entering = ids[rows]
            # A stored sample that is written again keeps its age and its number of draws.
            other = slots[(self.ids[slots] != entering) | (entering < 0)]
            self.entered[other], self.drawn[other] = self.offers, 0
            self._forget(slots)
            self.ids[slots] = entering
            self.slot_of[entering] = slots
            self.slot_of[-1] = -1

    def _recount(self, slots: Integers, old: Integers, new: Integers) -> None:
        appended = slots[old < 0]
        self.filled[self.size : self.size + appended.size] = appended
        self.size += appended.size
        self.class_counts += np.bincount(new, minlength=self.num_classes)
        self.class_counts -= np.bincount(old + 1, minlength=self.num_classes + 1)[1:]
        self.labels[slots] = new

    def _forget(self, slots: Integers) -> None:
        leaving = self.ids[slots]
        self.slot_of[leaving[self.slot_of[leaving] == slots]] = -1

    def admit(self, labels: Integers, generator: Generator, oldest_leave: bool) -> None:
        """With the adaptive quota, divide the capacity among the classes seen so far, including those of a batch.

        Rows stay in their slots. A class with more rows than its share loses random ones.

        Args:
            labels: ``(b,)`` int64.
            generator: for the draw.
            oldest_leave: whether a class loses its oldest rows instead.
        """
        classes = np.bincount(labels, minlength=self.num_classes) > 0
        if not (classes & ~self.admitted).any():
            return
        self.admitted |= classes
        room = class_quotas(self.capacity, self.admitted)
        start = room.cumsum() - room
        slots, owner = self._members(generator, oldest_leave)
        # `rank` is a row's position within its class; the first ones leave.
        rank = np.arange(slots.size) - (self.class_counts.cumsum() - self.class_counts)[owner]
        surplus = np.maximum(self.class_counts - room, 0)
        place = rank - surplus[owner]
        stays = place >= 0

        gone = slots[~stays]
        self._forget(gone)
        self.labels[gone] = -1
        self.ids[gone] = -1
        self.class_counts -= surplus
        self.cursor = self.class_counts.copy()
        order = self.filled[: self.size]
        order = order[self.labels[order] >= 0]
        self.size = order.size
        self.filled[: self.size] = order

        table = np.full_like(self.table, -1)
        table[(start[owner] + place)[stays]] = slots[stays]
        table[table < 0] = np.flatnonzero(self.labels < 0)
        self.table, self.room, self.start = table, room, start

    def _members(self, generator: Generator, by_age: bool) -> tuple[Integers, Integers]:
        """Return the filled slots and their classes, sorted by class, then by age or randomly."""
        if by_age:
            owner = np.repeat(np.arange(self.num_classes), self.room)
            offset = np.arange(owner.size) - self.start[owner]
            filled = offset < self.class_counts[owner]
            slots = self.table[: owner.size][filled]
            age = ((offset - self.cursor[owner]) % self.room[owner])[filled]
            slots = slots[age.argsort(kind="stable")]
        else:
            slots = generator.permutation(self.filled[: self.size])
        owner = self.labels[slots]
        order = owner.argsort(kind="stable")
        return slots[order], owner[order]

    _SAVED = (
        "labels", "ids", "table", "room", "start", "class_counts", "offered", "cursor", "admitted", "filled", "entered",
        "drawn",
    )  # fmt: skip

    def state_dict(self) -> StateDict:
        """Return copies of the arrays, as tensors, and the three counts."""
        tensors = {name: torch.from_numpy(vars(self)[name].copy()) for name in self._SAVED}
        return {**tensors, "size": self.size, "seen": self.seen, "offers": self.offers}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore a state.

        Raises:
            ConfigurationError: it has another number of classes or another capacity.
        """
        for name in self._SAVED:
            if state[name].shape != vars(self)[name].shape:
                raise ConfigurationError(
                    f"saved memory has {state['class_counts'].numel()} classes and {state['labels'].numel()} slots, "
                    f"this one {self.num_classes} and {self.capacity}: give the values it had"
                )
        for name in self._SAVED:
            setattr(self, name, state[name].numpy().copy())
        self.size, self.seen, self.offers = int(state["size"]), int(state["seen"]), int(state["offers"])
        self.slot_of = np.full(max(self.slot_of.size, int(self.ids.max()) + 2), -1)
        self.slot_of[self.ids] = np.arange(self.capacity)
        self.slot_of[-1] = -1
