"""The memory manager: insertion and draw of a step, in one order for every way of execution."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.comm import Comm, SingleProcessComm
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.config import ResolvedConfig
from dcl_lightning.memory.exchange import GlobalExchange, RowLayout, Served
from dcl_lightning.memory.prefetch import nvtx_range
from dcl_lightning.types import MemoryRows

__all__ = ["MemoryManager", "Offer", "Representatives"]


class Offer(NamedTuple):
    """New samples of one step, offered to the memory.

    Args:
        rows: nest of columns, ``(b, ...)`` each.
        labels: ``(b,)`` int64 model ids; zeros where there are no labels.
        ids: ``(b,)`` int64 ids of the samples.
    """

    rows: Any
    labels: Tensor
    ids: Tensor


class Representatives(NamedTuple):
    """What the memory gives to one step.

    Args:
        rows: nest of columns, ``(r', ...)`` each, r' at most r.
        labels: ``(r',)`` int64.
        weights: ``(r',)`` float32.
        weight_share: the weights of all workers' representatives, divided by the number of workers.
    """

    rows: Any
    labels: Tensor
    weights: Tensor
    weight_share: float


class MemoryManager:
    """Inserts a step's candidates and draws for the next step.

    With ``scope: local`` the candidates enter first, then the draw is made from this worker's memory.
    With ``scope: global`` the draw is made first, from all workers' memories as they were at the end of
    the step before, and travels while the candidates enter.

    Args:
        config: what the memory was told.
        buffer: this worker's memory.
        comm: the cluster; the manager starts asynchronous operations alone, which may run beside others.
        batch_size: b, new samples a step and worker.
        example: a nest like the stored rows, for their layout.
        device: where representatives are needed.
        seed: of a global draw, the same on all workers.
        shares_weights: whether the loss is divided by the weights of all workers' representatives. If it is not, a
            local draw sends no message.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        buffer: RehearsalBuffer,
        comm: Comm,
        batch_size: int,
        example: Any,
        device: torch.device,
        seed: int = 0,
        shares_weights: bool = True,
    ) -> None:
        self.seed, self._shares_weights = seed, shares_weights
        self.config, self.buffer, self.comm = config, buffer, comm
        self.batch_size, self.device = batch_size, device
        self.steps = 0
        self.total = buffer.store.capacity  # rows of the whole job
        # What all workers hold, and have offered of each class, as the last exchange told.
        self.sizes = [0] * comm.size
        self.offered = torch.zeros_like(buffer.offered)
        self.exchange: GlobalExchange | None = None
        if config.scope == "global":
            self.exchange = GlobalExchange(
                comm,
                self._serve,
                RowLayout(example),
                config.num_samples,
                seed,
                note_length=len(self.offered) if config.weighting == "nil" else 0,
                device=buffer.store.device,
            )

    def connect(self, comm: Comm, device: torch.device) -> None:
        """Go on in another fit.

        Args:
            comm: the cluster.
            device: where representatives are needed.

        Raises:
            ConfigurationError: it has another number of workers.
        """
        if comm.size != len(self.sizes):
            raise ConfigurationError(
                f"the memory was filled on {len(self.sizes)} workers, and this fit has {comm.size}: give as many, or "
                "empty it with Rehearsal.clear()"
            )
        self.comm, self.device = comm, device
        if self.exchange is not None:
            self.exchange.comm = comm

    def disconnect(self) -> None:
        """Let go of the cluster, which ends with the fit."""
        self.comm = SingleProcessComm()
        if self.exchange is not None:
            self.exchange.comm = self.comm

    def advance(self, offer: Offer | None, draw: bool, skipped: Tensor | None = None) -> Representatives | None:
        """Do the memory's work of one step.

        Args:
            offer: the step's new samples; None to draw alone.
            draw: whether to draw for the next step.
            skipped: ``(K,)`` bool, classes that are not drawn.
        """
        self.steps += 1
        if self.exchange is None:
            self._insert(offer)
            if not draw:
                return None
            with nvtx_range("draw", self.device):
                return self._draw_local(skipped)
        if not draw:
            self._insert(offer)
            return None
        return self._draw_global(self.exchange, offer)

    def _insert(self, offer: Offer | None) -> None:
        if offer is not None and len(offer.labels):
            with nvtx_range("insert", self.device):
                self.buffer.add(offer.rows, offer.labels, offer.ids)

    def _draw_local(self, skipped: Tensor | None) -> Representatives:
        slots = self.buffer.draw(self.config.num_samples, skipped)
        labels = self.buffer.labels_at(slots)
        weights = self._weights(labels, None, None)
        total = _sum(weights)
        if self.comm.size > 1 and self._shares_weights:
            total = self._sum_over_workers(total)
        return Representatives(self.buffer.store.gather(slots), labels, weights, total / self.comm.size)

    def _draw_global(self, exchange: GlobalExchange, offer: Offer | None) -> Representatives:
        note = self.buffer.offered if self.config.weighting == "nil" else None
        with nvtx_range("draw", self.device):
            exchange.start(self.steps, self.sizes, len(self.buffer), note)
        self._insert(offer)
        with nvtx_range("exchange", self.device):
            drawn = exchange.collect()
        rows, labels = drawn.rows
        weights = self._weights(labels, self.offered, sum(self.sizes))
        self.sizes = drawn.sizes
        if note is not None:
            self.offered = drawn.notes.sum(0)
        return Representatives(rows, labels, weights, drawn.amount / self.comm.size)

    def _serve(self, positions: Tensor) -> Served:
        """Return rows that other workers drew; their weights are those that the other workers will compute."""
        slots = self.buffer.slots_at(positions)
        self.buffer.count_drawn(slots)
        labels = self.buffer.labels_at(slots)
        weights = self._weights(labels, self.offered, sum(self.sizes))
        store = self.buffer.store
        return Served((store.gather(slots), labels.to(store.device)), _sum(weights))

    def _weights(self, labels: Tensor, offered: Tensor | None, stored: int | None) -> Tensor:
        if self.config.weighting == "none":
            return torch.ones(len(labels), dtype=torch.float32)
        return self.buffer.weights(labels, self.batch_size, offered, stored)

    def _sum_over_workers(self, value: float) -> float:
        sent = torch.tensor([value], dtype=torch.float64).view(torch.uint8)[None].repeat(self.comm.size, 1)
        one_each = [1] * self.comm.size
        received = self.comm.alltoall_async(sent, one_each, one_each, name="weights").wait()
        return float(received.contiguous().view(torch.float64).sum())

    def memory_rows(self) -> MemoryRows | None:
        """Return what this worker's memory holds, for reports; None of rows without sample ids."""
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

    def bookkeeping(self) -> dict[str, Any]:
        """Return the place in the stream of draws, and all of the memory but its rows."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "sizes": list(self.sizes),
            "offered": self.offered.clone(),
            "buffer": self.buffer.bookkeeping(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the memory and its place in the stream of draws."""
        return self.bookkeeping() | {"buffer": self.buffer.state_dict()}

    def take_bookkeeping(self, state_dict: dict[str, Any]) -> None:
        """Take back all but the rows, which have to be written into the store besides."""
        self.seed = state_dict["seed"]
        if self.exchange is not None:
            self.exchange.seed = self.seed
        self.steps, self.sizes = state_dict["steps"], list(state_dict["sizes"])
        self.offered = state_dict["offered"].clone()
        self.buffer.take_bookkeeping(state_dict["buffer"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state back."""
        self.take_bookkeeping(state_dict)
        self.buffer.store.load_state_dict(state_dict["buffer"]["rows"])


def _sum(weights: Tensor) -> float:
    return float(weights.numpy().sum(dtype=np.float64))
