"""The rehearsal memory of one worker: a store, an insertion policy, and uniform draws."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from numpy.random import PCG64, Generator
from torch import Tensor

from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.functional.losses import nil_weights
from dcl_lightning.memory.policies import make_policy
from dcl_lightning.memory.pytree import num_rows
from dcl_lightning.memory.slots import Assignment, Integers, SlotState, class_quotas
from dcl_lightning.memory.storage import RowStore
from dcl_lightning.types import PyTree, StateDict

__all__ = ["RehearsalBuffer", "distinct", "split_total"]


def split_total(total: int, world_size: int, rank: int) -> int:
    """Return a worker's share of a number of rows; the remainder goes to the first workers.

    Args:
        total: rows over all workers.
        world_size: number of workers.
        rank: 0-based number of this worker.
    """
    return total // world_size + int(rank < total % world_size)


def distinct(bound: int, number: int, generator: Generator) -> Integers:
    """Draw distinct whole numbers from ``[0, bound)``; every ordered selection is equally likely.

    Args:
        bound: upper bound, exclusive.
        number: how many to draw; at most ``bound`` are drawn.
        generator: for the draw.

    Returns:
        ``(min(number, bound),)`` int64.
    """
    return generator.choice(bound, min(number, bound), replace=False)


class RehearsalBuffer:
    """A store of rows, the policy by which samples enter it, and uniform draws from it, all from one generator.

    Args:
        num_classes: K, classes of the whole stream; 1 for data without labels.
        capacity: number of rows, that of the store.
        policy: a key of ``POLICIES``.
        quota: ``fixed`` (capacity / K for each class) or ``adaptive`` (capacity / classes seen); makes no difference
            for ``reservoir``.
        num_candidates: c; None for policies to which all samples are offered.
        store: of the rows.
        seed: of the generator.
        num_samples: sample ids are below this number; if None, the map of ids grows as they come.

    Raises:
        ConfigurationError: a value is unknown or contradicts another one.
    """

    def __init__(
        self,
        num_classes: int,
        capacity: int,
        policy: str,
        quota: str,
        num_candidates: int | None,
        store: RowStore,
        seed: int = 0,
        num_samples: int | None = None,
    ) -> None:
        if quota not in ("fixed", "adaptive"):
            raise ConfigurationError(f"quota '{quota}': give fixed or adaptive")
        if store.capacity != capacity:
            raise ConfigurationError(f"memory of {capacity} rows in a store of {store.capacity}: make them equal")
        if num_classes < 1:
            raise ConfigurationError(f"memory for {num_classes} classes: give at least 1")
        self.policy_name, self.quota = policy, quota
        self.policy = make_policy(policy, num_candidates, quota)
        self.store = store
        self.generator = Generator(PCG64(seed))
        classes = np.full(num_classes, self.policy.owns_slots and quota == "fixed")
        ids_kept = (num_samples or 0) if self.policy.refreshes else 0
        self.state = SlotState(num_classes, capacity, class_quotas(capacity, classes), ids_kept)

    def __len__(self) -> int:
        """Return the number of rows stored."""
        return self.state.size

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows and of the state of the slots."""
        return self.store.num_bytes + self.state.num_bytes

    @property
    def class_counts(self) -> Tensor:
        """``(K,)`` int64, rows stored of each class; a copy."""
        return torch.from_numpy(self.state.class_counts.copy())

    def add(self, rows: PyTree, labels: Tensor | None = None, ids: Tensor | None = None) -> Assignment:
        """Offer a batch of b samples; the policy decides which enter.

        Args:
            rows: a nest like that of the store, b rows, on any device.
            labels: ``(b,)`` int64 in ``[0, K)``; None counts all as class 0.
            ids: ``(b,)`` int64, index of each sample in the data set, -1 for a sample without one; None if no sample
                has an id, so that a sample may be stored twice.

        Returns:
            The decision that was applied.

        Raises:
            DataError: a label lies outside ``[0, K)`` or lengths differ.
        """
        count = num_rows(rows)
        classes = np.zeros(count, dtype=np.int64) if labels is None else labels.detach().cpu().numpy()
        places = ids.detach().cpu().numpy() if ids is not None and self.policy.refreshes else None
        if classes.shape != (count,) or (places is not None and places.shape != (count,)):
            raise DataError(f"{count} rows come with labels of shape {classes.shape}: give one for each row")
        if count:
            # As unsigned, a negative label is the largest: one call checks both bounds.
            if np.maximum.reduce(classes.view(np.uint64)) >= self.state.num_classes:
                raise DataError(
                    f"labels from {classes.min()} to {classes.max()}: the memory is for 0 to "
                    f"{self.state.num_classes - 1}"
                )
            if self.policy.owns_slots and self.quota == "adaptive":
                self.state.admit(classes, self.generator, oldest_leave=self.policy.oldest_leave)
        assignment = self.policy.assign(self.state, classes, places, self.generator)
        if assignment.rows.size:
            self.store.insert(torch.from_numpy(assignment.slots), rows, torch.from_numpy(assignment.rows))
        self.state.apply(assignment, classes, places)
        return assignment

    def draw(self, number: int, exclude_classes: Tensor | None = None) -> Tensor:
        """Draw rows, uniformly and without replacement.

        Args:
            number: r; if fewer are stored, all are drawn, in random order.
            exclude_classes: ``(K,)`` bool, classes to leave out.

        Returns:
            ``(min(r, number of candidates),)`` int64, distinct slots.
        """
        if exclude_classes is None:
            return self._counted(self.state.filled[distinct(self.state.size, number, self.generator)])
        excluded = exclude_classes.cpu().numpy()
        counts = np.where(excluded, 0, self.state.class_counts)
        ends = counts.cumsum()
        allowed = int(ends[-1])
        if not self.policy.owns_slots:
            return self._counted(self._draw_checked(min(number, allowed), allowed, excluded))
        places = distinct(allowed, number, self.generator)
        classes = ends.searchsorted(places, side="right")
        offset = places - (ends - counts)[classes]
        return self._counted(self.state.table[self.state.start[classes] + offset])

    def _counted(self, slots: Integers) -> Tensor:
        self.state.drawn[slots] += 1
        return torch.from_numpy(slots)

    def count_drawn(self, slots: Tensor) -> None:
        """Count rows that were drawn by other means than ``draw``.

        Args:
            slots: ``(n,)`` int64, filled slots, possibly repeated.
        """
        np.add.at(self.state.drawn, slots.numpy(), 1)

    def _draw_checked(self, number: int, allowed: int, excluded: npt.NDArray[np.bool_]) -> Integers:
        """Draw if classes own no slots: draw more than needed and keep the rows of allowed classes."""
        size, labels = self.state.size, self.state.labels
        tries = 2 * number * size // max(allowed, 1) + 16
        if 4 * tries < size:
            slots = self.state.filled[distinct(size, tries, self.generator)]
            slots = slots[~excluded[labels[slots]]]
            if slots.size >= number:
                return slots[:number]
        filled = self.state.filled[:size]
        filled = filled[~excluded[labels[filled]]]
        return filled[distinct(allowed, number, self.generator)]

    def slots_at(self, places: Tensor) -> Tensor:
        """Return the slots of rows, which are numbered in the order in which their slots were first filled.

        A number below an earlier length still denotes the same slot, unless the adaptive quota has evicted rows since.

        Args:
            places: ``(n,)`` int64 in ``[0, len)``.
        """
        return torch.from_numpy(self.state.filled[places.numpy()])

    def labels_at(self, slots: Tensor) -> Tensor:
        """Return the labels of rows.

        Args:
            slots: ``(n,)`` int64, filled slots.

        Returns:
            ``(n,)`` int64.
        """
        return torch.from_numpy(self.state.labels[slots.numpy()])

    @property
    def offered(self) -> Tensor:
        """``(K,)`` int64, candidates of each class offered so far; a copy."""
        return torch.from_numpy(self.state.offered.copy())

    def weights(
        self, labels: Tensor, batch_size: int, offered: Tensor | None = None, stored: int | None = None
    ) -> Tensor:
        """Return NIL's weight of each representative, see ``nil_weights``.

        For policies that offer every sample c = b, so that ``n_y b / c`` is the number of samples of the class so far.

        Args:
            labels: ``(n,)`` int64, of rows drawn.
            batch_size: b, samples of a batch before rows are added.
            offered: ``(K,)`` int64, candidates of each class so far; this memory's if None.
            stored: rows stored; this memory's if None.

        Returns:
            ``(n,)`` float32.
        """
        candidates = batch_size if self.policy.candidates is None else min(self.policy.candidates, batch_size)
        offered = torch.from_numpy(self.state.offered) if offered is None else offered
        return nil_weights(offered, labels, self.state.size if stored is None else stored, batch_size, candidates)

    def state_dict(self) -> StateDict:
        """Return slots and generator as plain tensors, numbers and strings; rows are saved separately."""
        return {
            "policy": self.policy_name,
            "quota": self.quota,
            "slots": self.state.state_dict(),
            "generator": dict(self.generator.bit_generator.state),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restore all but the rows, which the caller writes into the store; draws continue as they would have.

        Raises:
            ConfigurationError: the state has another policy, quota, number of classes or capacity.
        """
        for name, ours in (("policy", self.policy_name), ("quota", self.quota)):
            if state[name] != ours:
                raise ConfigurationError(f"saved memory has {name} {state[name]}, this one {ours}: give the same")
        self.state.load_state_dict(state["slots"])
        self.generator.bit_generator.state = state["generator"]
