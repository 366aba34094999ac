"""Redistributes the memories of a job over another number of workers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import PCG64, SeedSequence
from torch import Tensor

from dcl_lightning.memory.policies import policy_class
from dcl_lightning.memory.slots import Integers, class_quotas

__all__ = ["Dealt", "reshard"]

# What is kept of each row, and what stands where there is none.
_OF_ROW = {"labels": -1, "ids": -1, "entered": 0, "drawn": 0}


class Dealt(NamedTuple):
    """What one worker of the new number gets.

    Args:
        manager: its manager's bookkeeping.
        rows: for each former worker, which rows of its file ``(m,)`` and into which slots ``(m,)``, int64.
    """

    manager: dict[str, Any]
    rows: list[tuple[Tensor, Tensor]]


def reshard(saved: list[dict[str, Any]], size: int, rank: int) -> Dealt:
    """Deal the rows of a job out to another number of workers: none is lost, and the capacity of the job is kept.

    Rows go class by class, within a class by former worker and slot, or by age where the oldest rows leave first: to
    worker 0, 1, ... and 0 again. Where classes own slots these are dealt in the same way, so that each row finds one of
    its class, and workers' numbers of rows of a class differ by one at most. What was counted (samples seen, candidates
    offered) is shared equally. Draws go on from generators of their own.

    Args:
        saved: bookkeeping of each former worker's manager.
        size: number of workers now.
        rank: 0-based number of this one.
    """
    buffer = saved[0]["buffer"]
    states = [_arrays(manager["buffer"]["slots"]) for manager in saved]
    slots_of = [state["filled"][: state["size"]] for state in states]
    former = np.repeat(np.arange(len(states)), [slots.size for slots in slots_of])
    place = np.concatenate([np.arange(slots.size) for slots in slots_of])
    of_row = {name: np.concatenate([s[name][t] for s, t in zip(states, slots_of, strict=True)]) for name in _OF_ROW}
    policy = policy_class(buffer["policy"], buffer["quota"])
    age = of_row["entered"] if policy.oldest_leave else np.zeros_like(place)
    order = np.lexsort((np.concatenate(slots_of), former, age, of_row["labels"]))
    label = of_row["labels"][order]

    admitted = np.any([state["admitted"] for state in states], axis=0)
    capacity = sum(state["labels"].size for state in states)
    position, room = np.arange(label.size), np.zeros(admitted.size, dtype=np.int64)
    if policy.owns_slots:
        room = np.sum([state["room"] for state in states], axis=0)
        # Under the adaptive quota a worker that met no sample yet gave its slots to no class.
        room = room + class_quotas(capacity - int(room.sum()), admitted)
        position += (room.cumsum() - room)[label] - label.searchsorted(label)
    # Each slot of the job, counted class by class, goes to one worker.
    owner = position % size
    mine = owner == rank
    chosen, label, position = order[mine], label[mine], position[mine]

    ends = room.cumsum()
    own_room = _share(ends, size, rank) - _share(ends - room, size, rank)
    slots = _share(position, size, rank)
    own_capacity = int(_share(np.array(capacity), size, rank))
    state = {
        "table": np.arange(own_capacity),
        "room": own_room,
        "start": own_room.cumsum() - own_room,
        "class_counts": np.bincount(label, minlength=admitted.size),
        "offered": _share(np.sum([s["offered"] for s in states], axis=0), size, rank),
        "cursor": np.bincount(label, minlength=admitted.size),
        "admitted": admitted,
        "filled": _column(own_capacity, np.arange(slots.size), slots, 0),
    } | {name: _column(own_capacity, slots, of_row[name][chosen], empty) for name, empty in _OF_ROW.items()}
    counts = {
        "size": slots.size,
        "seen": int(_share(np.array(sum(s["seen"] for s in states)), size, rank)),
        "offers": max(s["offers"] for s in states),
    }
    steps = max(manager["steps"] for manager in saved)
    manager = {
        "seed": saved[0]["seed"],
        "steps": steps,
        "sizes": np.bincount(owner, minlength=size).tolist(),
        "offered": saved[0]["offered"],
        "buffer": {
            "policy": buffer["policy"],
            "quota": buffer["quota"],
            "slots": {name: torch.from_numpy(values) for name, values in state.items()} | counts,
            "generator": dict(PCG64(SeedSequence([saved[0]["seed"], steps, size, rank])).state),
        },
    }
    own = [former[chosen] == worker for worker in range(len(states))]
    return Dealt(manager, [(torch.from_numpy(place[chosen][o]), torch.from_numpy(slots[o])) for o in own])


def _share(counts: Integers, size: int, rank: int) -> Integers:
    """Return how many of the numbers below each count are the worker's, dealt out to 0, 1, ... and 0 again."""
    return (counts + size - 1 - rank) // size


def _column(capacity: int, slots: Integers, values: Integers, empty: int) -> Integers:
    column = np.full(capacity, empty)
    column[slots] = values
    return column


def _arrays(state: dict[str, Any]) -> dict[str, Any]:
    return {name: v.numpy() if isinstance(v, Tensor) else v for name, v in state.items()}
