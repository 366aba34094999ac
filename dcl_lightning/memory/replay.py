"""One step of rehearsal without Lightning: observe the batch, join representatives to it, start the memory's work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.memory.prefetch import MemoryEngine, nvtx_range
from dcl_lightning.memory.pytree import flatten, map_tensors
from dcl_lightning.memory.rows import BatchBuffer, BatchCodec, Candidates, NestCodec, Representatives, RowCodec
from dcl_lightning.stopwatch import Stopwatch
from dcl_lightning.types import Batch, PyTree, StoresExtraColumns

__all__ = ["Replay"]


class _Prepared(NamedTuple):
    drawn: Representatives
    buffer: BatchBuffer | None = None


class Replay:
    """Rehearsal of one fit, called at each step in this order: ``observe``, ``join``, ``loss_computed``, ``work``.

    ``work`` is the one place where the memory's work of a step begins: the step's samples are inserted and the
    representatives of the next step are drawn, on the calling thread (``execution: inline``) or by an engine in the
    background. Whoever reads or changes the memory calls ``wait`` first.

    Args:
        manager: the memory; with its configuration and device.
        codec: turns batches into rows and back.
        exclude: returns the classes ``(K,)`` bool that the next draw leaves out; None for a draw from all.
        agent: gives the extra columns of a step, if the codec has any.
        stopwatch: of the calling thread, with the phase ``rehearse``; see ``MemoryEngine``.
    """

    def __init__(
        self,
        manager: MemoryManager,
        codec: RowCodec,
        exclude: Callable[[], Tensor | None] = lambda: None,
        agent: object = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.manager, self.codec, self.config = manager, codec, manager.config
        self._exclude, self._agent = exclude, agent
        self._in_background = self.config.execution != "inline"
        self._engine: MemoryEngine[_Prepared | None] = MemoryEngine(self._in_background, manager.device, stopwatch)
        self._prepared: _Prepared | None = None
        self._batch: PyTree = None
        self._candidates: Candidates | None = None
        self._due = self._last = self._computed = False
        self._logged_wait_s = 0.0

    # -- a step ------------------------------------------------------------------------------------

    def observe(self, batch: PyTree, epoch: int) -> None:
        """Take the new samples of a step, as the memory shall store them; only the last pass over them has any.

        Args:
            batch: as the loader gave it, or as the network gets it.
            epoch: number of the epoch, counted over the whole stream.

        Raises:
            DataError: its rows are not like those of the memory.
        """
        self._batch = batch
        if isinstance(batch, Batch) and batch.passes_left:
            self._candidates = None
            return
        self._candidates = self.codec.encode(batch, epoch)
        if isinstance(self.codec, NestCodec):  # the rows of a ``Batch`` match by construction
            self.manager.buffer.store.check(self._candidates.rows)

    def join(self, batch: PyTree, step: int, last: bool, computed: bool = False) -> PyTree:
        """Return the batch with this step's representatives appended.

        Args:
            batch: the observed one, on the device.
            step: number of the step, counted over the whole run.
            last: whether it is the last of its epoch, after which nothing is drawn.
            computed: whether ``loss_computed`` may not be called, as with manual optimization.
        """
        prepared = self._take()
        self._due, self._last, self._computed = True, last, computed
        if self.config.scope == "global" and self._in_background and not self.codec.extra:
            self.work()  # so that rows travel between workers before gradients do, and during the whole step
        # Without rows of its own, a worker still needs the others' share of the normalizer.
        if prepared is None or not (len(prepared.drawn.labels) or prepared.drawn.weight_share):
            return self.codec.join(batch, None, step)
        device = self.manager.device
        with nvtx_range("join", device):
            drawn = prepared.drawn
            rows, weights = _moved((drawn.rows, drawn.weights), device)
            if self._engine.stream is not None:
                _record(torch.cuda.current_stream(), rows)
            return self.codec.join(batch, drawn._replace(rows=rows, weights=weights), step, prepared.buffer)

    def loss_computed(self) -> None:
        """Note that the step's loss was computed, so that the agent has its extra columns; begin background work."""
        self._computed = True
        if self._in_background:
            self.work()

    def work(self) -> None:
        """Begin the memory's work of this step, if it has not begun."""
        if not self._due:
            return
        self._due = False
        # Loaders of other packages may differ in length, and no worker may leave out an exchange that another awaits.
        draw = not self._last or (isinstance(self.codec, NestCodec) and self.manager.exchange is not None)
        candidates = self._candidates if self.config.update == "step" else None
        if candidates is not None and self.codec.extra:
            # A step that the module left out has no columns.
            candidates = self._with_columns(candidates) if self._computed else None
        if candidates is not None and self._engine.stream is not None:
            _record(self._engine.stream, candidates)
        self._submit(candidates, draw)

    def skip(self) -> None:
        """Insert nothing of the present batch: it was not trained on."""
        self._due = False

    def wait(self) -> Representatives | None:
        """Start this step's work if it has not begun, wait for all work, and return the next step's representatives.

        None if they were not drawn.
        """
        self.work()
        if self._engine.pending:
            self._prepared = self._engine.flush() or self._prepared
        return None if self._prepared is None else self._prepared.drawn

    def end_epoch(self) -> None:
        """Wait until no work is pending and drop what was drawn: the next epoch draws anew."""
        self.wait()
        self._prepared = None

    def resume(self, drawn: Representatives | None) -> None:
        """Begin with the representatives that a saved run had drawn for its next step."""
        self._prepared = None if drawn is None else _Prepared(drawn)

    def close(self) -> bool:
        """End the background work; return whether all of it has ended, else the memory must not be used any more."""
        self._prepared = self._batch = self._candidates = None
        return self._engine.close()

    def _take(self) -> _Prepared | None:
        """Return the representatives of this step; at the start of an epoch they are drawn now."""
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            return prepared
        if self.config.execution == "nonblocking":
            return self._engine.latest()
        if not self._engine.pending:
            self._submit(None, draw=True)
        return self._engine.collect()

    def _with_columns(self, candidates: Candidates) -> Candidates:
        assert isinstance(self.codec, BatchCodec)
        assert isinstance(self._batch, Batch)
        assert isinstance(self._agent, StoresExtraColumns)
        return self.codec.add_columns(candidates, self._agent.columns_of_step(), self._batch.weights)

    def _submit(self, candidates: Candidates | None, draw: bool) -> None:
        excluded = self._exclude()
        self._engine.submit(lambda: self._advance(candidates, draw, excluded))

    def _advance(self, candidates: Candidates | None, draw: bool, excluded: Tensor | None) -> _Prepared | None:
        drawn = self.manager.advance(candidates, draw, excluded)
        if drawn is None:
            return None
        rows, device, buffer = self.codec.decode(drawn.rows), self.manager.device, None
        if self.config.prefetch != "draw":
            with nvtx_range("move", device):
                # Not with ``nonblocking``: a step may meet these representatives again, with other new inputs in front.
                if self.config.execution == "blocking" and isinstance(self.codec, BatchCodec):
                    buffer = BatchBuffer(self.manager.batch_size, rows["inputs"], device)
                    rows = {**rows, "inputs": buffer.rehearsed}
                rows = _moved(rows, device)
        return _Prepared(drawn._replace(rows=rows), buffer)

    # -- reports -----------------------------------------------------------------------------------

    def figures(self, steps: int) -> dict[str, float]:
        """Return what loggers show of the memory.

        Args:
            steps: since the call before.
        """
        buffer, engine = self.manager.buffer, self._engine
        waited, self._logged_wait_s = engine.wait_s - self._logged_wait_s, engine.wait_s
        figures = {
            "buffer/fill": len(buffer) / buffer.store.capacity,
            "buffer/bytes": float(buffer.num_bytes),
            "buffer/wait_ms": 1e3 * waited / steps,
            "buffer/staleness": float(engine.staleness),
        }
        if self.manager.exchange is not None:
            cost = self.manager.exchange.last
            figures["buffer/exchanged_bytes"] = float(cost.header_bytes + cost.count_bytes + cost.row_bytes)
        return figures


def _moved(nest: PyTree, device: torch.device) -> PyTree:
    if device.type == "cpu":  # rows are there already
        return nest
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), nest)


def _record(stream: torch.cuda.Stream, nest: PyTree) -> None:
    """Let the allocator know that tensors made on another stream are in use on this one."""
    for _, tensor in flatten(nest):
        if tensor.is_cuda:
            tensor.record_stream(stream)
