"""The memory manager: a step's insertions and draw, in the same order for every ``execution``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.comm import Comm, SingleProcessComm, raise_together, sum_async
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.buffer import RehearsalBuffer, split_total
from dcl_lightning.memory.config import ResolvedConfig
from dcl_lightning.memory.exchange import GlobalExchange, RowLayout, SentRows
from dcl_lightning.memory.policies import policy_class
from dcl_lightning.memory.prefetch import nvtx_range
from dcl_lightning.memory.rows import Candidates, Representatives
from dcl_lightning.memory.storage import RowStore, refuse_lack_of_space
from dcl_lightning.types import MemoryRows, PyTree, StateDict

__all__ = ["MemoryManager", "build_manager"]

_Made = TypeVar("_Made")


class MemoryManager:
    """Inserts a step's candidates and draws for the next step.

    With ``scope: local`` the candidates enter first, then the draw is made from this worker's memory.
    With ``scope: global`` the draw is made first, from all workers' memories as they were at the end of
    the step before, and travels while the candidates enter.

    Args:
        config: of the memory.
        buffer: this worker's memory.
        comm: collectives between workers; the manager starts asynchronous ones only, which may overlap with others.
        batch_size: b, new samples per step and worker.
        example: a pair like ``(rows, labels)`` of representatives, for their layout.
        device: where representatives are needed.
        seed: of a global draw, the same on all workers.
        shares_weights: whether the loss is divided by the weights of all workers' representatives. If it is not, a
            local draw sends no message.

    Attributes:
        total: capacity over all workers.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        buffer: RehearsalBuffer,
        comm: Comm,
        batch_size: int,
        example: PyTree,
        device: torch.device,
        seed: int = 0,
        shares_weights: bool = True,
    ) -> None:
        self.seed, self._shares_weights = seed, shares_weights
        self.config, self.buffer, self.comm = config, buffer, comm
        self.batch_size, self.device = batch_size, device
        self.steps = 0
        self.total = buffer.store.capacity
        # Rows stored by each worker, and candidates of each class that all have offered, by the last exchange.
        self.sizes = [0] * comm.size
        self.offered = torch.zeros_like(buffer.offered)
        self.exchange: GlobalExchange | None = None
        if config.scope == "global":
            self.exchange = GlobalExchange(
                comm,
                self._send,
                RowLayout(example),
                config.num_samples,
                seed,
                num_counts=len(self.offered) if config.weighting == "nil" else 0,
                device=buffer.store.device,
            )
        comm.prepare_async()

    def connect(self, comm: Comm, device: torch.device) -> None:
        """Continue in another fit.

        Args:
            comm: of the fit.
            device: where representatives are needed.

        Raises:
            ConfigurationError: the fit has another number of workers.
        """
        if comm.size != len(self.sizes):
            raise ConfigurationError(
                f"the memory was filled on {len(self.sizes)} workers, and this fit has {comm.size}: give as many, or "
                "empty it with Rehearsal.clear()"
            )
        comm.prepare_async()
        self.comm, self.device = comm, device
        if self.exchange is not None:
            self.exchange.comm = comm

    def disconnect(self) -> None:
        """Drop ``comm``, which ends with the fit."""
        self.comm = SingleProcessComm()
        if self.exchange is not None:
            self.exchange.comm = self.comm

    def advance(
        self, candidates: Candidates | None, draw: bool, excluded: Tensor | None = None
    ) -> Representatives | None:
        """Do the memory's work of one step.

        Args:
            candidates: the step's new samples; None to draw only.
            draw: whether to draw for the next step.
            excluded: ``(K,)`` bool, classes that a local draw leaves out.
        """
        self.steps += 1
        if self.exchange is None:
            self._insert(candidates)
            if not draw:
                return None
            with nvtx_range("draw", self.device):
                return self._draw_local(excluded)
        if not draw:
            self._insert(candidates)
            return None
        return self._draw_global(self.exchange, candidates)

    def _insert(self, candidates: Candidates | None) -> None:
        if candidates is not None and len(candidates.labels):
            with nvtx_range("insert", self.device):
                self.buffer.add(*candidates)

    def _draw_local(self, excluded: Tensor | None) -> Representatives:
        slots = self.buffer.draw(self.config.num_samples, excluded)
        labels = self.buffer.labels_at(slots)
        weights = self._weights(labels, None, None)
        total = _sum(weights)
        if self.comm.size > 1 and self._shares_weights:
            total = float(sum_async(torch.tensor(total, dtype=torch.float64), self.comm, "weights")())
        return Representatives(self.buffer.store.gather(slots), labels, weights, total / self.comm.size)

    def _draw_global(self, exchange: GlobalExchange, candidates: Candidates | None) -> Representatives:
        class_counts = self.buffer.offered if self.config.weighting == "nil" else None
        with nvtx_range("draw", self.device):
            exchange.start(self.steps, self.sizes, len(self.buffer), class_counts)
        self._insert(candidates)
        with nvtx_range("exchange", self.device):
            received = exchange.collect()
        rows, labels = received.rows
        weights = self._weights(labels, self.offered, sum(self.sizes))
        self.sizes = received.sizes
        if class_counts is not None:
            self.offered = received.class_counts.sum(0)
        return Representatives(rows, labels, weights, received.weight_sum / self.comm.size)

    def _send(self, positions: Tensor) -> SentRows:
        """Return rows that other workers drew, with the weights that those workers compute for them."""
        slots = self.buffer.slots_at(positions)
        self.buffer.count_drawn(slots)
        labels = self.buffer.labels_at(slots)
        weights = self._weights(labels, self.offered, sum(self.sizes))
        store = self.buffer.store
        return SentRows((store.gather(slots), labels.to(store.device)), _sum(weights))

    def _weights(self, labels: Tensor, offered: Tensor | None, stored: int | None) -> Tensor:
        if self.config.weighting == "none":
            return torch.ones(len(labels), dtype=torch.float32)
        return self.buffer.weights(labels, self.batch_size, offered, stored)

    def memory_rows(self) -> MemoryRows | None:
        """Return the contents of this worker's memory, for reports; None if its rows have no sample ids."""
        buffer, state = self.buffer, self.buffer.state
        if "sample_ids" not in buffer.store.names:
            return None
        slots = torch.from_numpy(state.filled[: len(buffer)].copy())
        return MemoryRows(
            capacity=buffer.store.capacity,
            num_bytes=buffer.num_bytes,
            sample_ids=buffer.store.column("sample_ids", slots),
            ages=state.offers - torch.from_numpy(state.entered)[slots],
            drawn=torch.from_numpy(state.drawn)[slots],
            shared=False,
        )

    def state_dict(self) -> StateDict:
        """Return the position in the stream of draws and the state of the buffer; rows are saved separately."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "sizes": list(self.sizes),
            "offered": self.offered.clone(),
            "buffer": self.buffer.state_dict(),
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore all but the rows, which the caller writes into the store."""
        self.seed = state_dict["seed"]
        if self.exchange is not None:
            self.exchange.seed = self.seed
        self.steps, self.sizes = state_dict["steps"], list(state_dict["sizes"])
        self.offered = state_dict["offered"].clone()
        self.buffer.load_state_dict(state_dict["buffer"])


def build_manager(
    config: ResolvedConfig,
    example: PyTree,
    comm: Comm,
    device: torch.device,
    *,
    num_classes: int,
    num_samples: int | None,
    num_candidates: int | None,
    batch_size: int,
    total: int,
    seed: int,
    workers_on_host: int,
    shares_weights: bool,
) -> MemoryManager:
    """Return the manager of an empty memory of this worker; all workers call this.

    Args:
        config: of the memory.
        example: a nest like the stored rows, without rows.
        comm: collectives between workers.
        device: where representatives are needed.
        num_classes: K, classes of the whole stream; 1 for data without labels.
        num_samples: training samples of the whole stream, if their ids are below it.
        num_candidates: c; None where every sample is offered.
        batch_size: b, new samples per step and worker.
        total: capacity over all workers.
        seed: the same on all workers.
        workers_on_host: number of workers that share this host's storage.
        shares_weights: as for ``MemoryManager``.

    Raises:
        ConfigurationError: the memory is too small, or does not fit on one worker's host; the same on all workers.
    """
    if config.execution == "nonblocking" and config.scope == "global" and comm.size > 1:
        raise ConfigurationError(
            "rehearsal.execution=nonblocking goes with scope=local: the exchange needs all workers in step"
        )
    by_class = num_samples is not None and policy_class(config.policy, config.quota).shares_by_class
    if total < comm.size or (by_class and total < num_classes):
        raise ConfigurationError(
            f"a memory of {total} rows is smaller than the {num_classes} classes: enlarge rehearsal.buffer_size"
        )
    capacity = split_total(total, comm.size, comm.rank)
    # Every worker looks at the free space before any of them takes its part.
    _together(comm, lambda: refuse_lack_of_space(example, capacity, config.storage, workers_on_host))
    store = _together(comm, lambda: RowStore(example, capacity, config.storage))
    buffer = RehearsalBuffer(
        num_classes=num_classes,
        capacity=capacity,
        policy=config.policy,
        quota=config.quota,
        num_candidates=num_candidates,
        store=store,
        seed=seed * 1_000_003 + comm.rank,
        num_samples=num_samples,
    )
    layout = example, torch.zeros(0, dtype=torch.int64)
    manager = MemoryManager(config, buffer, comm, batch_size, layout, device, seed, shares_weights)
    manager.total = total
    return manager


def _together(comm: Comm, make: Callable[[], _Made]) -> _Made:
    """Return what this worker makes; if one cannot, all raise that worker's error."""
    error, made = "", None
    try:
        made = make()
    except ConfigurationError as failed:
        error = str(failed)
    raise_together(comm, error, ConfigurationError)
    return cast(_Made, made)


def _sum(weights: Tensor) -> float:
    return float(weights.numpy().sum(dtype=np.float64))
