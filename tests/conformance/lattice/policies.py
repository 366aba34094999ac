"""How many rows of each class a memory holds, computed from the definitions of the policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.conformance.lattice.truth import Truth


@dataclass
class Counts:
    """What a policy stores: rows in all, if that is certain, and the least and the most of each class."""

    stored: int | None
    least: Tensor
    most: Tensor


def policy_counts(config: Any, truth: Truth, capacity: int, offers: list[list[int]]) -> Counts:
    """Return what a memory holds after batches of samples were offered, in their order.

    Args:
        config: the memory's configuration.
        truth: about the samples.
        capacity: rows of this worker's memory.
        offers: sample ids of each batch.
    """
    num_classes = truth.num_classes
    distinct = sorted({i for batch in offers for i in batch})
    labels = truth.labels[torch.tensor(distinct, dtype=torch.int64)]
    of_class = torch.bincount(labels, minlength=num_classes)
    if config.policy == "reservoir":
        # Appended while there is room, and nothing leaves but for another.
        return Counts(min(capacity, len(distinct)), torch.zeros_like(of_class), of_class)
    if config.policy == "greedy" and config.quota == "adaptive":
        return Counts(None, torch.zeros_like(of_class), of_class)  # see ``gdumb_counts``
    classes = torch.ones(num_classes, dtype=torch.bool) if config.quota == "fixed" else of_class > 0
    share, rest = divmod(capacity, max(int(classes.sum()), 1))
    room = torch.where(classes, share + (classes.cumsum(0) - 1 < rest).long(), 0)
    most = torch.minimum(room, of_class)
    if config.policy in ("class_balanced", "class_reservoir", "greedy"):
        # Every sample is offered, and a class with room takes it.
        return Counts(int(most.sum()), most, most)
    times = torch.bincount(truth.labels[torch.tensor([i for b in offers for i in b], dtype=torch.int64)],
                           minlength=num_classes)  # fmt: skip
    if config.policy == "nil":  # which may store a sample twice
        most = torch.minimum(room, times)
    candidates = config.num_candidates or 20
    chosen = sum(len(b) if config.update == "task_end" else min(candidates, len(b)) for b in offers)
    missing = sum(len(b) for b in offers) - chosen
    least = torch.minimum(most, (times - missing).clamp(min=0)) if config.policy == "nil" else torch.minimum(
        most, (of_class - missing).clamp(min=0))  # fmt: skip
    return Counts(None, least, most)


def gdumb_counts(truth: Truth, capacity: int, before: list[int], offers: list[list[int]]) -> Tensor:
    """Return how many rows of each class GDumb's sampler holds after the last of some batches.

    Prabhu et al., ECCV 2020, algorithm 1: a sample of a class with less than its share of the memory enters; where the
    memory is full a row of the largest class leaves, of several the first.

    Args:
        truth: about the samples.
        capacity: rows of the memory.
        before: samples that were stored before the last batch.
        offers: sample ids of each batch.
    """
    counts = torch.bincount(truth.labels[torch.tensor(before, dtype=torch.int64)], minlength=truth.num_classes)
    seen = {int(truth.labels[i]) for batch in offers[:-1] for i in batch}
    for sample in offers[-1]:
        label = int(truth.labels[sample])
        seen.add(label)
        if sample in before or counts[label] >= capacity / len(seen):
            continue
        if counts.sum() == capacity:
            counts[counts.argmax()] -= 1
        counts[label] += 1
    return counts
