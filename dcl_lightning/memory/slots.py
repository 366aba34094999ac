"""The slots of the memory: which are filled, with which sample, and to which class they belong.

All in NumPy: on so few numbers its calls take a third of the time of torch's, and what the memory's thread does in
Python the training thread waits for.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from numpy.random import Generator

from dcl_lightning.errors import ConfigurationError, DataError

__all__ = ["Assignment", "Integers", "SlotState", "class_quotas"]

Integers: TypeAlias = npt.NDArray[np.int64]

_MAX_ID = 2**31


class Assignment(NamedTuple):
    """What a policy decided for a batch of b samples.

    Args:
        rows: ``(m,)`` int64, places in the batch of the samples to write.
        slots: ``(m,)`` int64, distinct, where to write them.
        offered: ``(K,)`` int64, samples of each class that were offered.
        entered: ``(K,)`` int64, new samples of each class that took a slot, also if a later one took it from them;
            None where age does not count.
        seen: number of samples that the policy was shown, b.
    """

    rows: Integers
    slots: Integers
    offered: Integers
    entered: Integers | None
    seen: int


def class_quotas(capacity: int, classes: npt.NDArray[np.bool_]) -> Integers:
    """Share the capacity among classes, what is left over going to the first ones.

    Args:
        capacity: number of slots.
        classes: ``(K,)`` bool, the classes that get some: all for the fixed quota, those seen for the adaptive one.

    Returns:
        ``(K,)`` int64, slots of each class, in all the capacity (0 if no class gets any).
    """
    share, rest = divmod(capacity, max(int(classes.sum()), 1))
    place = classes.cumsum(0) - 1
    return np.where(classes, share + (place < rest), 0)


class SlotState:
    """What is stored where; it changes in :meth:`apply` and :meth:`admit` alone.

    The slots of a class y are ``table[start[y] : start[y] + room[y]]``, the first ``class_counts[y]`` of them filled.
    (Under a policy whose classes own no slots, ``table``, ``start`` and ``room`` mean nothing.)

    Args:
        num_classes: K.
        capacity: number of slots.
        room: ``(K,)`` int64, slots that each class owns.
        num_samples: ids are below this number; without it the map from id to slot grows as larger ones come.
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
        # For reports: the offer in which a slot's sample came, and how often it was drawn since.
        self.entered = np.zeros(capacity, dtype=np.int64)
        self.drawn = np.zeros(capacity, dtype=np.int64)
        self.size = 0
        self.seen = 0
        self.offers = 0
        # The last entry stands for "no id", -1, and is never a slot.
        self.slot_of = np.full(num_samples + 1, -1)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays of the state."""
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, np.ndarray))

    def find(self, ids: Integers, labels: Integers) -> Integers:
        """Return ``(n,)`` int64, the slot in which each sample is stored with this label, else -1.

        Args:
            ids: ``(n,)`` int64, -1 for a sample without one.
            labels: ``(n,)`` int64.

        Raises:
            DataError: an id cannot be the place of a sample in a data set.
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
        """Note what a policy decided.

        Args:
            assignment: its decision on the batch.
            labels: ``(b,)`` int64 of the batch.
            ids: ``(b,)`` int64 of the batch, -1 for a sample without one; None if stored samples are not looked for.
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
            # A stored sample that is written again stays the same one.
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
        """Adaptive quota: share the capacity among the classes seen so far and those of a batch.

        Rows stay in their slots. A class with more rows than room loses some, drawn at random.

        Args:
            labels: ``(b,)`` int64.
            generator: for the draw.
            oldest_leave: the oldest rows leave instead.
        """
        classes = np.bincount(labels, minlength=self.num_classes) > 0
        if not (classes & ~self.admitted).any():
            return
        self.admitted |= classes
        room = class_quotas(self.capacity, self.admitted)
        start = room.cumsum() - room
        slots, owner = self._members(generator, oldest_leave)
        # `rank`: place among the rows of its class, those that leave first.
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
        """Return the filled slots and their classes, class by class, within a class by age or at random."""
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

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the tensors and the three counts."""
        tensors = {name: torch.from_numpy(getattr(self, name).copy()) for name in self._SAVED}
        return {**tensors, "size": self.size, "seen": self.seen, "offers": self.offers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Raises:
            ConfigurationError: it is of another number of classes or another capacity.
        """
        for name in self._SAVED:
            if state[name].shape != getattr(self, name).shape:
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
