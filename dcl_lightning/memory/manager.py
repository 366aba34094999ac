"""The memory manager: what happens to the memory in one step, in one order for every way to execute it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.comm import Comm
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.memory.exchange import GlobalExchange, RowLayout

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
    """

    def __init__(
        self,
        config: RehearsalConfig,
        buffer: RehearsalBuffer,
        comm: Comm,
        batch_size: int,
        example: Any,
        device: torch.device,
    ) -> None:
        self.config, self.buffer, self.comm = config, buffer, comm
        self.batch_size, self.device = batch_size, device
        self.steps = 0
        self.sizes = [0] * comm.size
        self.exchange: GlobalExchange | None = None
        if config.scope == "global":
            self.exchange = GlobalExchange(
                comm, self._at_positions, RowLayout(example), config.num_samples, config.seed
            )

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
            return self._draw_local(skipped) if draw else None
        if not draw:
            self._insert(offer)
            return None
        return self._draw_global(self.exchange, offer)

    def _insert(self, offer: Offer | None) -> None:
        if offer is not None and len(offer.labels):
            self.buffer.add(offer.rows, offer.labels, offer.ids)

    def _draw_local(self, skipped: Tensor | None) -> Representatives:
        slots = self.buffer.draw(self.config.num_samples, skipped)
        labels = self.buffer.state.labels.index_select(0, slots)
        nil = self.config.weighting == "nil"
        weights = self.buffer.weights(labels, self.batch_size) if nil else torch.ones(slots.numel())
        return self._share(self.buffer.store.gather(slots), labels, weights)

    def _draw_global(self, exchange: GlobalExchange, offer: Offer | None) -> Representatives:
        exchange.start(self.steps, self.sizes, len(self.buffer))
        counts = None
        if self.config.weighting == "nil":
            counts = self._to_all(self.buffer.state.offered, "offered")
        self._insert(offer)
        drawn = exchange.collect()
        self.sizes = drawn.sizes
        rows, labels = drawn.rows
        weights = torch.ones(len(labels))
        if counts is not None:
            # Counts and sizes of one moment, the start of this exchange.
            weights = self.buffer.weights(labels, self.batch_size, counts().sum(0), sum(drawn.sizes))
        return self._share(rows, labels, weights)

    def _share(self, rows: Any, labels: Tensor, weights: Tensor) -> Representatives:
        total = weights.double().sum()
        if self.comm.size > 1:
            total = self._to_all(total[None], "weights")().sum()
        return Representatives(rows, labels, weights, float(total) / self.comm.size)

    def _at_positions(self, positions: Tensor) -> Any:
        slots = self.buffer.slots_at(positions)
        return self.buffer.store.gather(slots), self.buffer.state.labels[slots]

    def _to_all(self, values: Tensor, name: str) -> Any:
        """Start to send a vector to every worker; what is returned waits and gives ``(workers, length)``."""
        row = values.contiguous().view(torch.uint8)[None]
        one_each = [1] * self.comm.size
        pending = self.comm.alltoall_async(row.repeat(self.comm.size, 1), one_each, one_each, name=name)
        return lambda: pending.wait().contiguous().view(values.dtype).view(self.comm.size, -1)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory and its place in the stream of draws."""
        return {"steps": self.steps, "sizes": list(self.sizes), "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state back."""
        self.steps, self.sizes = state_dict["steps"], list(state_dict["sizes"])
        self.buffer.load_state_dict(state_dict["buffer"])
