"""Redistributes the memories of a job over another number of workers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.random import PCG64, SeedSequence
from torch import Tensor

from dcl_lightning.memory.policies import policy_class
from dcl_lightning.memory.slots import Integers, class_quotas
from dcl_lightning.types import StateDict

__all__ = ["Dealt", "reshard"]

# Bookkeeping columns with one value per slot, and the value of an empty slot.
_OF_ROW = {"labels": -1, "ids": -1, "entered": 0, "drawn": 0}


class Dealt(NamedTuple):
    """One worker's share of a redistributed memory.

    Args:
        manager: state of its manager.
        rows: for each former worker, indices ``(m,)`` of rows in its file and their new slots ``(m,)``, int64.
    """

    manager: StateDict
    rows: list[tuple[Tensor, Tensor]]


def reshard(saved: list[StateDict], size: int, rank: int) -> Dealt:
    """Redistribute a job's rows over another number of workers; no row is lost, and the job's capacity stays.

    Rows are ordered by class, then by age if the policy evicts the oldest first, then by former worker and slot, and
    dealt round-robin to the workers. If classes own slots, the slots are dealt in the same way, so each row gets a slot
    of its class, and the workers' row counts of a class differ by at most one. Counters (samples seen, candidates
    offered) are split equally. Each worker draws from a newly seeded generator.

    Args:
        saved: state of each former worker's manager.
        size: new number of workers.
        rank: 0-based rank of this worker.
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
        # Under the adaptive quota the slots of a worker that has seen no sample belong to no class yet.
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
    """Return, for each count n, how many of 0 ... n-1 this worker gets when they are dealt round-robin."""
    return (counts + size - 1 - rank) // size


def _column(capacity: int, slots: Integers, values: Integers, empty: int) -> Integers:
    column = np.full(capacity, empty)
    column[slots] = values
    return column


def _arrays(state: StateDict) -> StateDict:
    return {name: v.numpy() if isinstance(v, Tensor) else v for name, v in state.items()}
