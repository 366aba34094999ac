"""Rehearsal for any module: representatives join each training batch, and the memory works in the background."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor

from dcl_lightning._lightning import datamodule_of, log_interval
from dcl_lightning.callbacks.evaluation import limited_ids, loader_batches, within_class
from dcl_lightning.callbacks.extras import ExtraColumns
from dcl_lightning.callbacks.hooks import before_first_layer, pass_through
from dcl_lightning.callbacks.references import AS_EVALUATED, References
from dcl_lightning.checkpoint.buffer_files import SavedMemories, refuse_another_memory, save_memory
from dcl_lightning.checkpoint.io import keep_side_files
from dcl_lightning.comm import Comm, comm_of, raise_together
from dcl_lightning.data.scenarios import seed_of_run
from dcl_lightning.data.stream import Stream
from dcl_lightning.distributed import ranks
from dcl_lightning.distributed.horovod.shutdown import requeue_between_steps
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.buffer import RehearsalBuffer, split_total
from dcl_lightning.memory.config import RehearsalConfig, ResolvedConfig, resolve
from dcl_lightning.memory.joining import Room, columns_of, join
from dcl_lightning.memory.manager import MemoryManager, Offer, Representatives
from dcl_lightning.memory.policies import policy_class
from dcl_lightning.memory.prefetch import MemoryEngine, nvtx_range
from dcl_lightning.memory.pytree import concat, flatten, map_tensors, num_rows
from dcl_lightning.memory.storage import RowStore, refuse_lack_of_space
from dcl_lightning.types import Batch, Task

__all__ = ["Rehearsal"]

_PRESET_ROWS = 60  # per class and worker, where no size is given: the original program's

_Made = TypeVar("_Made")


class _Prepared(NamedTuple):
    """Representatives, and the room for new inputs in front of theirs, where the background has made it."""

    drawn: Representatives
    room: Room | None = None


class Rehearsal(pl.Callback):
    """Adds representatives of earlier batches to every training batch.

    With an agent and a ``ContinualDataModule`` rows are stored as the loader gives them and augmented
    anew each time, unless ``store`` says otherwise. With any other module, batches may be any nest of
    tensors with a common first dimension; what the loader gave is stored, and joined to the batch once
    that is on the device.

    With another module the memory outlives a fit: one fit a task, with the same ``Rehearsal``, rehearses what the fits
    before have stored. ``clear`` empties it. Where a ``ContinualDataModule`` brings the tasks, the first of them begins
    with an empty memory.

    Args:
        config: size, policy, scope and execution of the memory; or a dict. What is not given is an agent's own value,
            or beside any other module that of plain replay, see ``RehearsalConfig``.
        label: with another module, where a batch has its labels: a key or a place; None where the policy
            needs none.
        num_classes: with ``label``, the number of classes.

    Attributes:
        given: what was given of ``config``.
    """

    _config: ResolvedConfig | None
    _own: tuple[tuple[RehearsalConfig, ...], Mapping[str, Any] | None, str] = (), None, ""

    def __init__(
        self,
        config: RehearsalConfig | Mapping[str, Any] | None = None,
        label: int | str | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if (label is None) != (num_classes is None):
            raise ConfigurationError(
                f"Rehearsal(label={label!r}, num_classes={num_classes}): give both, or neither where the policy needs "
                "no labels"
            )
        self.config = config
        self.label, self.num_classes = label, num_classes
        self.manager: MemoryManager | None = None
        self._engine: MemoryEngine[_Prepared | None] | None = None
        self._references: References | None = None
        self._extras: ExtraColumns | None = None
        self._in_flight: _Prepared | None = None
        self._offer: Offer | None = None
        self._weights: Tensor | None = None
        self._due = False  # whether this step's work was not given to the engine yet
        self._came = False  # whether this step's batch came past the hooks
        self._computed = False  # whether this step's loss was computed
        self._undo: list[Callable[[], None]] = []
        self._begins_late = False
        self.saved: SavedMemories | None = None
        self._wait_s = 0.0
        # Of the taskset that is offered at a task's end: the task, the rows of each worker so far, the workers.
        self._offered: tuple[int, int, int] | None = None

    # -- configuration -----------------------------------------------------------------------------

    @property
    def config(self) -> ResolvedConfig:
        """What the memory works with: what was given, completed; any configuration can be assigned between fits."""
        if self._config is None:
            own, required, owner = self._own
            self._config = resolve(self.given, *own, required=required, owner=owner)
        return self._config

    @config.setter
    def config(self, config: RehearsalConfig | Mapping[str, Any] | None) -> None:
        self.given = RehearsalConfig.of(config)
        self._config = None

    def complete(
        self, *own: RehearsalConfig, required: Mapping[str, Any] | None = None, owner: str = ""
    ) -> ResolvedConfig:
        """Return ``config``, from now on completed by an agent's own values, or by those of plain replay.

        Args:
            *own: the agent's, of which later ones win; none for plain replay.
            required: values without which the agent would be another method.
            owner: whose own they are, for messages.

        Raises:
            ConfigurationError: values contradict each other, or ``required``.
        """
        self._own, self._config = (own, required, owner), None
        return self.config

    # -- life --------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all that is stored: the next fit begins with an empty memory.

        Raises:
            RuntimeError: a fit is going on.
        """
        if self._engine is not None:
            raise RuntimeError("Rehearsal.clear: a fit is going on; call it between fits")
        self.manager = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what does not fit; with ``prefetch: batch`` let the data module prepare batches ahead."""
        keep_side_files(trainer.strategy)
        requeue_between_steps(trainer)
        if stage != "fit":
            return
        if getattr(pl_module, "rehearsal", None) is not self:
            self.complete()  # an agent that had it in an earlier fit has completed it by its own values
        data = datamodule_of(trainer)
        stream = getattr(data, "stream", None)
        self.saved = self._offered = None
        if isinstance(stream, Stream):
            self.manager = None  # the stream begins, or a checkpoint brings its memory
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ConfigurationError(
                f"{type(pl_module).__name__}.training_step(dataloader_iter) fetches batches itself, past the hooks by "
                "which representatives join them: give training_step(batch, batch_idx)"
            )
        if not getattr(pl_module, "weighs_rows", False):
            self.config.check_without_agent(self.label is not None, isinstance(stream, Stream))
        if isinstance(stream, Stream):
            self.config.check_stream(stream.classes_come_again, data.boundaries)
            if not data.concatenate_tasksets:
                self._warn_of_forgotten_tasks(stream)
        if self.config.prefetch == "batch":
            if not hasattr(data, "attach_replay"):
                raise ConfigurationError("rehearsal.prefetch=batch needs a ContinualDataModule: give prefetch=device")
            data.attach_replay(self)

    # What a data module asks whose batches are prepared ahead.
    replayed_per_batch = None
    loads_ahead = True

    def replayed_ids(self, task: int) -> Tensor:
        """Return no ids: representatives join a batch after it was loaded."""
        return torch.empty(0, dtype=torch.int64)

    def _warn_of_forgotten_tasks(self, stream: Stream) -> None:
        """Say so where tasks are of the same classes and the policy does not keep samples of all of them."""
        classes = [y for home in stream.homes for y in home]
        what = self.config.forgets_tasks()
        if what is not None and len(set(classes)) < len(classes):
            weights = ", weighting=none" if self.config.weighting == "nil" else ""
            rank_zero_warn(
                f"classes come again in later tasks, and rehearsal.policy={self.config.policy} {what}: "
                f"rehearsal.policy=reservoir{weights} keeps samples of all tasks alike"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the memory between the loader and the module; where rows are known already, make or restore it."""
        self._offer = self._in_flight = None
        self._due = self._came = self._computed = False
        self._wait_s = 0.0
        self._references = None
        _refuse_several_loaders(trainer)
        self._extras = ExtraColumns(pl_module)
        self._engine = MemoryEngine(self.config.execution != "inline", pl_module.device)
        data = datamodule_of(trainer)
        if isinstance(getattr(data, "stream", None), Stream):
            # Before the first batch, so that the clock ends a task that was cut off with the memory that it filled.
            self._build(trainer, pl_module, self._batch_without_rows(trainer, pl_module, data))
        elif self.manager is not None:
            self._go_on(trainer, pl_module)
        self._undo = [
            pass_through(trainer, pl_module, "on_before_batch_transfer", self._before(trainer, pl_module)),
            pass_through(
                trainer, pl_module, "on_after_batch_transfer", self._after(trainer, pl_module),
                behind=self.config.row_format == "augmented",
            ),
        ]  # fmt: skip
        # On a CPU the background begins when the backward pass has the first layer left. As PyTorch frees what the
        # forward pass made, layer by layer, it asks for Python, which the background holds while it works: it would be
        # waited for. The first layer's gradients are the last long stretch of a step that needs no Python.
        last = before_first_layer(pl_module) if pl_module.device.type == "cpu" else None
        self._begins_late = last is not None and self.config.execution != "inline"
        if last is not None and self._begins_late:
            self._undo.append(last.register_post_accumulate_grad_hook(lambda _: self._begin(trainer)).remove)

    def _batch_without_rows(self, trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> Batch:
        batch: Batch = trainer.precision_plugin.convert_input(data.batch_without_rows())
        if self.config.row_format == "augmented":
            batch = data.on_after_batch_transfer(move_data_to_device(batch, module.device), 0)
        return batch

    def _go_on(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Let the memory of an earlier fit go on in this one."""
        assert self.manager is not None
        refuse_another_memory(self.manager.config, self.config, "the memory was filled with", ("execution", "prefetch"))
        self.manager.config = self.config
        self.manager.connect(comm_of(trainer.strategy), module.device)
        self._refer(trainer, module)

    def _begin(self, trainer: pl.Trainer) -> None:
        if self._due:
            self._submit(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave nothing pending, also where an epoch ends amid its batches; the next one draws anew."""
        self._due = False
        self.wait(trainer)
        self._in_flight = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish pending work and take the memory out again."""
        self.wait(trainer)
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the memory out; a callback of a lone worker's that saves after this finds what the step has left."""
        drawn = None
        if comm_of(trainer.strategy).size == 1 and self._engine is not None:
            batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            self._due = self._due and batches.processed == batches.ready  # else this batch was not trained on
            with suppress(Exception):  # the memory's own error may be what ends the fit
                self.wait(trainer)
                drawn = self._in_flight
        self._due = False
        self._leave()
        self._in_flight = drawn

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no thread and no wrapped hook behind."""
        self._leave()

    def _leave(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._in_flight = self._offer = self._weights = self._extras = self._references = None
        engine, self._engine = self._engine, None
        if engine is not None and not engine.close():
            rank_zero_warn("the memory's work did not end with the fit: what it holds is given up")
            self.manager = None
        if self.manager is not None:
            self.manager.disconnect()

    def wait(self, trainer: pl.Trainer) -> None:
        """Wait until no work is pending, so that the memory may be read or changed; what was drawn is kept.

        Args:
            trainer: of the fit; every worker calls this.
        """
        if self._engine is None:
            return
        self._begin(trainer)
        if self._engine.pending:
            drawn = self._engine.flush()
            self._in_flight = self._in_flight if drawn is None else drawn

    # -- one step ----------------------------------------------------------------------------------

    def _before(self, trainer: pl.Trainer, module: pl.LightningModule) -> Callable[[Any], Any]:
        def add(batch: Any) -> Any:
            if self.config.row_format != "augmented":
                self._note(trainer, module, batch)
            return batch

        return add

    def _note(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        if self.manager is None:
            self._build(trainer, module, batch)
        self._offer = self._offer_of(batch, trainer.current_epoch)
        self._weights = batch.weights if isinstance(batch, Batch) else None

    def _after(self, trainer: pl.Trainer, module: pl.LightningModule) -> Callable[[Any], Any]:
        def add(batch: Any) -> Any:
            if self.config.row_format == "augmented":
                self._note(trainer, module, batch)
            ready = self._take(trainer)
            self._due, self._came, self._computed = True, True, not module.automatic_optimization
            more = self._extras is not None and self._extras.shapes
            if self.config.scope == "global" and self.config.execution != "inline" and not more:
                # What travels between workers does so before the gradients, and behind the whole step.
                self._submit(trainer)
            if ready is None or not (len(ready.drawn.labels) or ready.drawn.weight_share):
                # The module may write into its batch, of which the memory reads after the step.
                return batch._replace(inputs=batch.inputs.clone()) if isinstance(batch, Batch) else batch
            with nvtx_range("join", module.device):
                return self._join(batch, ready, module.device, trainer.global_step)

        return add

    def _join(self, batch: Any, ready: _Prepared, device: torch.device, step: int) -> Any:
        rows, weights, share = ready.drawn.rows, ready.drawn.weights, ready.drawn.weight_share
        if device.type != "cpu":
            rows, weights = move_data_to_device((rows, weights), device)
        if self._engine is not None and self._engine.stream is not None:
            _used_on(torch.cuda.current_stream(), rows)
        if not isinstance(batch, Batch):
            return concat(batch, rows)
        inputs = ready.room.beside(batch.inputs) if ready.room is not None else None
        more = self._extras.shapes if self._extras is not None else ()
        return join(batch, rows, weights, share, self.config.loss, step, inputs, more)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a batch that did not come past the hooks: it would be trained on without representatives.

        Raises:
            ConfigurationError: with the remedy.
        """
        if not self._came:
            raise ConfigurationError(
                "a batch came past on_after_batch_transfer, by which representatives join it: the strategy or the "
                "module moves batches by itself; leave Rehearsal out, or let Lightning move them"
            )
        self._came = False

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let the background begin, its kernels under the backward pass, where it does not begin late."""
        self._computed = True
        if self.config.execution != "inline" and not self._begins_late:
            self._begin(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do the memory's work now if it was not begun; at the end of an epoch leave nothing pending."""
        self._begin(trainer)
        if trainer.is_last_batch:
            self.wait(trainer)
            self._in_flight = None
        every = log_interval(trainer)
        if trainer.loggers and every and trainer.global_step % every == 0:
            self._log(trainer, every)

    def _take(self, trainer: pl.Trainer) -> _Prepared | None:
        """Return the representatives of this step; at the start of an epoch they are drawn now."""
        assert self._engine is not None
        if self._in_flight is not None:
            ready, self._in_flight = self._in_flight, None
            return ready
        if self.config.execution == "nonblocking":
            return self._engine.latest()
        if not self._engine.pending:
            assert self.manager is not None
            skipped = self._skipped(trainer)
            self._engine.submit(lambda: self._advance(None, True, skipped))
        return self._engine.collect()

    def _submit(self, trainer: pl.Trainer) -> None:
        assert self._engine is not None
        assert self.manager is not None
        self._due = False
        # Loaders that are not ours may differ in length: no worker leaves out an exchange that another waits for.
        draw = not trainer.is_last_batch or (self._weights is None and self.manager.exchange is not None)
        offer = self._offer if self.config.update == "step" else None
        skipped = self._skipped(trainer)
        if offer is not None and self._extras is not None and self._extras.shapes and self._weights is not None:
            # A step that the module left out has no columns.
            offer = self._extras.with_step(offer, self._weights) if self._computed else None
        if offer is not None and self._engine.stream is not None:
            _used_on(self._engine.stream, offer)
        self._engine.submit(lambda: self._advance(offer, draw, skipped))

    def _advance(self, offer: Offer | None, draw: bool, skipped: Tensor | None) -> _Prepared | None:
        assert self.manager is not None
        drawn = self.manager.advance(offer, draw, skipped)
        if drawn is None:
            return None
        if self._references is not None:
            drawn = drawn._replace(rows=self._references.complete(drawn.rows))
        if self.config.prefetch == "draw":
            return _Prepared(drawn)
        rows, device, room = drawn.rows, self.manager.device, None
        with nvtx_range("move", device):
            # Not if a step may meet these representatives again: new inputs would lie in front of them already.
            if self.config.execution == "blocking" and isinstance(rows, dict) and "sample_ids" in rows:
                room = Room(self.manager.batch_size, rows["inputs"], device)
                rows = {**rows, "inputs": room.rehearsed}
            if device.type != "cpu":
                rows = move_data_to_device(rows, device)
        return _Prepared(drawn._replace(rows=rows), room)

    def _skipped(self, trainer: pl.Trainer) -> Tensor | None:
        # Of the present task nothing is stored before its end, where rows enter at the ends of tasks.
        if self.config.draw_from == "seen" or self.config.update == "task_end":
            return None
        # Not what the agent says: resumed at the end of an epoch, it hears of its task after this batch came.
        clock: Any = datamodule_of(trainer).clock
        assert self.manager is not None
        skipped = torch.zeros(self.manager.buffer.state.num_classes, dtype=torch.bool)
        if clock is None:  # there is one task, and nothing before it
            return ~skipped
        skipped[list(clock.tasks[clock.task_at(trainer.current_epoch)].classes)] = True
        return skipped

    def on_task_end(self, trainer: pl.Trainer, agent: pl.LightningModule, task: Task) -> None:
        """With ``update: task_end`` offer the whole taskset, in random order."""
        if self.config.update != "task_end":
            return
        assert self.manager is not None
        assert self._extras is not None
        data = datamodule_of(trainer)
        ids = _shuffled(limited_ids(trainer, data.train_indices(task.index)), self.manager.seed + task.index)
        rows = 0
        if self._offered is not None and self._offered[0] == task.index:  # a signal had broken it off
            rows = self._offered[1]
            ids = ids[_places(ids, data.owners(self._offered[2]), self._offered[2]) >= rows]
        loader = data.train_eval_loader(ids)
        if self._references is not None and not self._extras.shapes:
            loader.inputs = torch.empty(len(data.train_targets), 0)  # none need be read
        workers = comm_of(trainer.strategy).size
        for batch in loader_batches(trainer, loader):
            batch = trainer.precision_plugin.convert_input(batch)
            offer = self._extras.with_evaluation(self._offer_of(batch), batch)
            self.manager.buffer.add(offer.rows, offer.labels, offer.ids)
            rows += loader.batch_size
            self._offered = (task.index, rows, workers)
        self._offered = None

    # -- rows --------------------------------------------------------------------------------------

    def _columns_of(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        return columns_of(batch) if self._references is None else self._references.columns(batch, epoch)

    def _offer_of(self, batch: Any, epoch: int = AS_EVALUATED) -> Offer:
        if isinstance(batch, Batch):
            columns = self._columns_of(batch, epoch)
            if not batch.weights.all():
                columns = {name: column[batch.weights > 0] for name, column in columns.items()}
            return Offer(columns, columns["targets"], columns["sample_ids"])
        count = num_rows(batch)
        labels = torch.zeros(count, dtype=torch.int64)
        if self.label is not None:
            labels = batch[self.label].long().cpu()
        assert self.manager is not None
        self.manager.buffer.store.check(batch)
        # A copy: the module may write into its batch while the memory reads. A sample's place is not known.
        return Offer(map_tensors(torch.clone, batch), labels, torch.full((count,), -1))

    def _build(self, trainer: pl.Trainer, module: Any, batch: Any) -> None:
        own = isinstance(batch, Batch)
        config, comm = self.config, comm_of(trainer.strategy)
        if config.execution == "nonblocking" and config.scope == "global" and comm.size > 1:
            raise ConfigurationError(
                "rehearsal.execution=nonblocking goes with scope=local: the exchange needs all workers in step"
            )
        if not own:
            num_rows(batch)  # what is no tensor is named
        data = datamodule_of(trainer)
        classes = data.num_classes if own else (self.num_classes or 1)
        samples = len(data.train_targets) if own else 0
        total = config.total(classes, comm.size, samples, _PRESET_ROWS * classes * comm.size)
        if self.saved is not None:  # also where sizes are given for each worker, and there are others now
            total = self.saved.capacity
        if total < comm.size or (own and policy_class(config.policy, config.quota).shares_by_class and total < classes):
            raise ConfigurationError(
                f"a memory of {total} rows is smaller than the {classes} classes: enlarge rehearsal.buffer_size"
            )
        self._refer(trainer, module)
        example = self._columns_of(batch, 0) if own else batch
        if own and self._extras is not None and self._extras.shapes:
            example = _no_rows(example) | self._extras.no_rows()
        capacity = split_total(total, comm.size, comm.rank)
        seed = seed_of_run(config.seed, "rehearsal.seed")
        on_host = min(comm.size, max(ranks.local_size(), trainer.num_devices))
        # All workers look before one of them takes its part.
        _together(comm, lambda: refuse_lack_of_space(example, capacity, config.storage, on_host))
        store = _together(comm, lambda: RowStore(example, capacity, config.storage))
        candidates = config.num_candidates
        if config.update == "task_end" and candidates is not None:  # every sample is a candidate
            candidates = data.eval_batch_size
        buffer = RehearsalBuffer(
            num_classes=classes,
            capacity=capacity,
            policy=config.policy,
            quota=config.quota,
            num_candidates=candidates,
            store=store,
            seed=seed * 1_000_003 + comm.rank,
            num_samples=samples or None,
        )
        size = data.batch_size if own else num_rows(batch)
        labels = torch.zeros(0, dtype=torch.int64)
        example = _no_rows(example)
        self.manager = MemoryManager(
            config, buffer, comm, size, (example, labels), module.device, seed, shares_weights=own
        )
        if self._references is not None:
            example = self._references.complete(example)
        self.manager.total = total
        if self.saved is not None:
            drawn, self.saved = self.saved.restore(self.manager, example), None
            self._in_flight = None if drawn is None else _Prepared(drawn)

    def _refer(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.config.row_format == "index":
            self._references = References(datamodule_of(trainer), module.device.type == "cuda")

    # -- reports -----------------------------------------------------------------------------------

    def _log(self, trainer: pl.Trainer, steps: int) -> None:
        assert self.manager is not None
        assert self._engine is not None
        buffer = self.manager.buffer
        waited, self._wait_s = self._engine.wait_s - self._wait_s, self._engine.wait_s
        figures = {
            "buffer/fill": len(buffer) / buffer.store.capacity,
            "buffer/bytes": float(buffer.num_bytes),
            "buffer/wait_ms": 1e3 * waited / steps,
            "buffer/staleness": float(self._engine.staleness),
        }
        if self.manager.exchange is not None:
            cost = self.manager.exchange.last
            figures["buffer/exchanged_bytes"] = float(cost.header_bytes + cost.note_bytes + cost.row_bytes)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step - 1)  # counted from 0, as by Lightning

    # -- checkpoint --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return how much of a taskset was offered where a signal has broken a task's end off."""
        return {} if self._offered is None else {"offered": list(self._offered)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        task, rows, workers = state_dict["offered"]
        self._offered = (task, rows, workers)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write this worker's memory, and what it has drawn for its next step, beside the checkpoint."""
        if self.manager is None and self.saved is not None:
            self.saved.save_again(trainer, checkpoint)
        elif self.manager is not None:
            self.wait(trainer)  # another callback may save, whose turn comes before ours
            drawn = None if self._in_flight is None else self._in_flight.drawn
            save_memory(trainer, checkpoint, self.config, self.manager, drawn)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at the saved memories, which are taken back as training starts, or with a module's first batch."""
        if trainer.state.fn == TrainerFn.FITTING:
            comm, kept = comm_of(trainer.strategy), self.manager
            self.manager, self.saved = None, SavedMemories.of(checkpoint, self.config, comm)
            if kept is not None and self.saved is not None and self.saved.fits(kept, comm):
                # At once: what a search for a rate or a batch size has put aside is gone when training starts.
                kept.connect(comm, pl_module.device)
                drawn = self.saved.restore(kept, kept.buffer.store.example)
                self._in_flight = None if drawn is None else _Prepared(drawn)
                self.manager, self.saved = kept, None


def _together(comm: Comm, make: Callable[[], _Made]) -> _Made:
    """Return what this worker makes; if one cannot, all raise that worker's error."""
    error, made = "", None
    try:
        made = make()
    except ConfigurationError as failed:
        error = str(failed)
    raise_together(comm, error, ConfigurationError)
    return cast(_Made, made)


def _refuse_several_loaders(trainer: pl.Trainer) -> None:
    loaders: Any = trainer.train_dataloader
    if isinstance(loaders, (Mapping, list, tuple)) and len(loaders) > 1:
        raise ConfigurationError(
            f"{len(loaders)} training loaders: what they give side by side are not the rows of one batch, which a "
            "memory stores together; give one loader, of a data set with all columns (torch.utils.data.StackDataset)"
        )


def _used_on(stream: torch.cuda.Stream, nest: Any) -> None:
    """Tell the allocator that tensors made on another stream are used on this one: it must not give them away early."""
    for _, tensor in flatten(nest):
        if tensor.is_cuda:
            tensor.record_stream(stream)


def _no_rows(nest: Any) -> Any:
    return map_tensors(lambda column: column[:0], nest)


def _places(ids: Tensor, owners: Tensor | None, workers: int) -> Tensor:
    """Return each row's place among those of its worker."""
    return torch.arange(len(ids)) // workers if owners is None else within_class(owners[ids])


def _shuffled(ids: Tensor, seed: int) -> Tensor:
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
