"""The global draw: each worker draws uniformly from all workers' memories, with one all-to-all per step.

Which rows every worker draws follows from the seed, the step and each worker's number of rows, which all workers know.
So each worker computes which rows it sends to whom, and no request travels. Whatever else the workers have to agree on
in a step, such as the sum of the weights, is part of the same message.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dcl_lightning.comm import Comm, Pending
from dcl_lightning.memory.pytree import flatten, map_tensors, rebuild
from dcl_lightning.types import PyTree

__all__ = [
    "HEADER_BYTES", "Exchanged", "GlobalExchange", "Plan", "ReceivedRows", "RowLayout", "SentRows", "plan_draws",
    "plan_of",
]  # fmt: skip

# Sent to every worker: the sender's number of rows, its step, and the sum of the weights of the rows that it sends.
_HEADER = np.dtype([("size", "<i4"), ("step", "<i4"), ("weight_sum", "<f8")])
HEADER_BYTES = _HEADER.itemsize
_FAILED = -1
_WORD = (1 << 64) - 1


def plan_draws(sizes: Sequence[int], r: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """Return which rows each worker draws: ``(number of workers, min(r, all rows))``.

    Row i of worker k has the number ``sum(sizes[:k]) + i``. The draws of one worker are distinct, every selection is
    equally likely, and workers draw independently of each other.

    Args:
        sizes: number of rows of each worker, the same list on all workers.
        r: rows that each worker draws.
        seed: the same on all workers.
        step: the same on all workers; each step has its own draws.
    """
    workers, total = len(sizes), sum(sizes)
    count = min(r, total)
    if count == 0:
        return np.zeros((workers, 0), dtype=np.int64)
    # The raw words of Philox are the same in every version of NumPy; the draws of a Generator are not guaranteed to be.
    key = np.array([seed & _WORD, step & _WORD], dtype=np.uint64)
    if total < 4 * r:
        # Sort the rows by random keys; the last bits of a key are the number of its row.
        bits = np.uint64((1 << (total - 1).bit_length()) - 1)
        words = np.random.Philox(key=key).random_raw(workers * total).reshape(workers, total)
        keys = (words & ~bits) | np.arange(total, dtype=np.uint64)
        return (np.sort(keys, axis=1)[:, :count] & bits).astype(np.int64)
    # Draw more than needed and keep the first distinct ones. How many are distinct is independent of which ones are, so
    # starting again with more draws favours no row.
    shift = (count + count // 2 + 7).bit_length()
    while True:
        many = 1 << shift
        words = np.random.Philox(key=key).random_raw(workers * many).reshape(workers, many)
        rows = (words % np.uint64(total)).astype(np.int64)
        ordered = np.sort((rows << shift) | np.arange(many), axis=1)
        repeats = (ordered[:, 1:] >> shift) == (ordered[:, :-1] >> shift)
        first = np.ones((workers, many), dtype=np.bool_)
        worker, place = np.nonzero(repeats)
        first[worker, ordered[worker, place + 1] & (many - 1)] = False
        number = np.cumsum(first, axis=1)
        if number[:, -1].min() >= count:
            return rows[first & (number <= count)].reshape(workers, count)
        shift += 1


class Plan(NamedTuple):
    """One worker's part in an exchange.

    Args:
        positions: int64, rows of its own memory that it sends, those for worker 0 first.
        send: number of rows that it sends to each worker.
        receive: number of rows that it receives from each worker.
    """

    positions: Tensor
    send: list[int]
    receive: list[int]


def plan_of(rank: int, sizes: Sequence[int], draws: npt.NDArray[np.int64]) -> Plan:
    """Return one worker's part in an exchange.

    Args:
        rank: 0-based number of the worker.
        sizes: number of rows of each worker.
        draws: result of ``plan_draws`` for these sizes.
    """
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    start = int(ends[rank]) - sizes[rank]
    mine = (draws >= start) & (draws < ends[rank])
    owners = np.searchsorted(ends, draws[rank], side="right")
    return Plan(
        torch.from_numpy(draws[mine] - start),
        mine.sum(axis=1).tolist(),
        np.bincount(owners, minlength=len(sizes)).tolist(),
    )


class RowLayout:
    """Turns a nest of columns into rows of bytes and back.

    Args:
        columns: a nest of tensors with a common first dimension, possibly without rows; its structure, dtypes and
            shapes are kept.
    """

    def __init__(self, columns: PyTree) -> None:
        leaves = _leaves(columns)
        self._names = [name for name, _ in leaves]
        self._example = map_tensors(lambda leaf: leaf[:0].detach().to("meta"), columns)
        self._types = [(leaf.dtype, leaf.shape[1:]) for _, leaf in leaves]
        self._widths = [shape.numel() * dtype.itemsize for dtype, shape in self._types]
        self.row_bytes = sum(self._widths)

    def pack(self, columns: PyTree) -> Tensor:
        """Return the rows as contiguous uint8 ``(n, row_bytes)``, on the device of the columns.

        Args:
            columns: a nest like the constructor's, with any number of rows.
        """
        leaves = _leaves(columns)
        if [name for name, _ in leaves] != self._names:
            raise ValueError(f"rows have the columns {[name for name, _ in leaves]}, the memory has {self._names}")
        count, parts = leaves[0][1].shape[0], []
        for (name, leaf), (dtype, shape), width in zip(leaves, self._types, self._widths, strict=True):
            if leaf.dtype != dtype or leaf.shape[1:] != shape or leaf.shape[0] != count:
                found = f"{leaf.shape[0]} rows of {leaf.dtype} {list(leaf.shape[1:])}"
                raise ValueError(f"column '{name}' has {found}, not {count} of {dtype} {list(shape)}")
            if width and count:
                parts.append(leaf.detach().reshape(count, shape.numel()).contiguous().view(torch.uint8))
        return torch.cat(parts, 1) if parts else leaves[0][1].new_empty((count, self.row_bytes), dtype=torch.uint8)

    def unpack(self, rows: Tensor) -> PyTree:
        """Return the nest of columns from packed rows.

        Args:
            rows: result of ``pack``.
        """
        count, leaves = rows.shape[0], []
        for part, (dtype, shape), width in zip(rows.split(self._widths, dim=1), self._types, self._widths, strict=True):
            if width:
                # A copy, since a column within packed rows may not be aligned to its dtype.
                leaves.append(part.clone(memory_format=torch.contiguous_format).view(dtype).view(count, *shape))
            else:
                leaves.append(torch.empty((count, *shape), dtype=dtype, device=rows.device))
        return rebuild(self._example, leaves)


@dataclass(frozen=True)
class Exchanged:
    """What the last exchange cost this worker.

    Args:
        header_bytes: headers sent, including the one to itself.
        count_bytes: class counts sent, likewise.
        row_bytes: rows sent, likewise.
        rows_sent: number of these rows.
        wait_seconds: time that ``collect`` waited.
    """

    header_bytes: int
    count_bytes: int
    row_bytes: int
    rows_sent: int
    wait_seconds: float


class SentRows(NamedTuple):
    """Rows that one worker contributes to an exchange.

    Args:
        rows: nest of columns, ``(n, ...)`` each.
        weight_sum: sum of their weights; every worker receives the sum over all workers.
    """

    rows: PyTree
    weight_sum: float = 0.0


class ReceivedRows(NamedTuple):
    """Result of one exchange.

    Args:
        rows: nest of columns, ``min(r, sum(sizes))`` rows, grouped by the worker that sent them.
        sizes: every worker's number of rows when it started this exchange, for the next one.
        weight_sum: sum of the weights of the rows that all workers sent.
        class_counts: ``(N, num_counts)`` int64, every worker's counts.
    """

    rows: PyTree
    sizes: list[int]
    weight_sum: float
    class_counts: Tensor


class GlobalExchange:
    """Draws r rows per step from the union of all workers' memories.

    All workers call ``start`` and ``collect`` alternately, equally often. The sizes for a step are those received in
    the step before, so the draw lags by one step; the first step's sizes are zeros, and only headers travel. A row that
    was overwritten in between is sent as it is now. A memory that loses rows, as at the end of a task, starts again
    with zeros.

    Args:
        comm: collectives between workers.
        gather: returns copies of the rows at given positions of this worker's memory.
        layout: how rows are packed.
        r: rows that each worker draws per step.
        seed: the same on all workers.
        num_counts: number of int64 class counts that each worker sends to all others in each step.
        device: where ``gather`` returns rows.
        name: of the all-to-all; two exchanges over one ``comm`` need different names.
    """

    def __init__(
        self,
        comm: Comm,
        gather: Callable[[Tensor], SentRows],
        layout: RowLayout,
        r: int,
        seed: int,
        num_counts: int = 0,
        device: torch.device | None = None,
        name: str = "rehearsal",
    ) -> None:
        if r * layout.row_bytes + HEADER_BYTES + 8 * num_counts >= 1 << 31:
            raise ValueError(f"r={r} rows of {layout.row_bytes} bytes: one exchange holds less than 2 GiB a worker")
        self.comm, self._gather, self._layout = comm, gather, layout
        self._r, self.seed, self._name = r, seed, name
        self._fixed_bytes = HEADER_BYTES + 8 * num_counts  # of a message, whatever rows are in it
        self._device = device
        self._step = 0
        self._plan: Plan | None = None
        self._pending: Pending | None = None
        self._error: Exception | None = None
        self.last = Exchanged(0, 0, 0, 0, 0.0)

    def start(self, step: int, sizes: Sequence[int], size: int, class_counts: Tensor | None = None) -> None:
        """Send the rows that the workers drew from this memory, without waiting.

        A failure to read this memory raises in ``collect``, here and on all other workers.

        Args:
            step: number of the step, the same on all workers.
            sizes: number of rows of each worker, the same on all workers; zeros at first.
            size: present number of rows of this memory, for the next draw.
            class_counts: ``(num_counts,)`` int64, for all workers; None if ``num_counts`` is 0.
        """
        if self._plan is not None:
            raise RuntimeError("an exchange is pending: collect it before the next one starts")
        if len(sizes) != self.comm.size:
            raise ValueError(f"sizes {list(sizes)}: give one for each of {self.comm.size} workers")
        fixed = torch.zeros(0, dtype=torch.int64) if class_counts is None else class_counts
        if 8 * fixed.numel() + HEADER_BYTES != self._fixed_bytes:
            raise ValueError(f"{fixed.numel()} class counts, expected {(self._fixed_bytes - HEADER_BYTES) // 8}")
        draws = plan_draws(sizes, self._r, self.seed, step)
        self._plan, self._step, self._error = plan_of(self.comm.rank, sizes, draws), step, None
        try:
            if sizes[self.comm.rank] > size:
                raise RuntimeError(f"the memory has {size} rows, fewer than the {sizes[self.comm.rank]} drawn from")
            sent = self._gather(self._plan.positions)
            rows, weight_sum = self._layout.pack(sent.rows), sent.weight_sum
            if len(rows) != len(self._plan.positions):
                raise RuntimeError(f"gather returned {len(rows)} rows for {len(self._plan.positions)} positions")
        except Exception as error:
            # Send placeholder rows with an error flag, so that the peers do not block.
            self._error, size, weight_sum = error, _FAILED, 0.0
            shape = (len(self._plan.positions), self._layout.row_bytes)
            rows = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        header = torch.from_numpy(np.array([(size, step, weight_sum)], dtype=_HEADER).view(np.uint8))
        try:
            self._pending = self._send(rows, torch.cat((header, fixed.contiguous().view(torch.uint8))), self._plan)
        except Exception as error:
            self._error = self._error or error

    def _send(self, rows: Tensor, fixed: Tensor, plan: Plan) -> Pending:
        fixed, width = fixed.to(rows.device), self._layout.row_bytes
        parts: list[Tensor] = []
        for part in rows.view(-1).split([n * width for n in plan.send]):
            parts += (fixed, part)
        message = torch.cat(parts)[:, None]
        sent, received = ([self._fixed_bytes + n * width for n in counts] for counts in (plan.send, plan.receive))
        return self.comm.alltoall_async(message, sent, received, self._name)

    def collect(self) -> ReceivedRows:
        """Wait for the exchange; return this worker's rows, and the sizes for the next exchange."""
        plan, pending, error = self._plan, self._pending, self._error
        if plan is None:
            raise RuntimeError("no exchange is pending: start one first")
        self._plan = self._pending = self._error = None
        message: Tensor | None = None
        started = time.perf_counter()
        try:
            message = pending.wait() if pending is not None else None
        except Exception as failure:
            error = error or failure
        waited = time.perf_counter() - started
        if error is not None:
            raise error
        assert message is not None
        width, workers = self._layout.row_bytes, len(plan.send)
        count_bytes = self._fixed_bytes - HEADER_BYTES
        self.last = Exchanged(
            HEADER_BYTES * workers, count_bytes * workers, width * sum(plan.send), sum(plan.send), waited
        )
        parts = message.view(-1).split([m for n in plan.receive for m in (HEADER_BYTES, count_bytes, n * width)])
        headers = torch.cat(parts[0::3]).cpu().numpy().view(_HEADER)
        for worker, (size, step) in enumerate(zip(headers["size"].tolist(), headers["step"].tolist(), strict=True)):
            if step != self._step:
                raise RuntimeError(f"worker {worker} is at step {step} of the exchange, this one at {self._step}")
            if size == _FAILED:
                raise RuntimeError(f"worker {worker} could not read its memory; its own traceback says why")
        rows = torch.cat(parts[2::3]).view(sum(plan.receive), width)
        class_counts = torch.cat(parts[1::3]).cpu().view(torch.int64).view(workers, -1)
        weight_sum = math.fsum(headers["weight_sum"].tolist())
        return ReceivedRows(self._layout.unpack(rows), headers["size"].tolist(), weight_sum, class_counts)


def _leaves(columns: PyTree) -> list[tuple[str, Tensor]]:
    leaves = flatten(columns)
    if not leaves or not all(leaf.ndim for _, leaf in leaves):
        raise ValueError("rows are a nest of tensors with a first dimension, at least one")
    return leaves
