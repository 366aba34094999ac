"""Rehearsal for any module: representatives join each training batch, managed beside the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from dcl_lightning.callbacks.extras import ExtraColumns
from dcl_lightning.callbacks.hooks import before_first_layer, log_interval, pass_through
from dcl_lightning.callbacks.memory_checkpoint import SavedMemories, save_memory
from dcl_lightning.callbacks.references import AS_EVALUATED, References
from dcl_lightning.data.seeds import seed_of_run
from dcl_lightning.data.stream import Stream
from dcl_lightning.distributed.checkpoint_io import keep_side_files
from dcl_lightning.distributed.comm import comm_of
from dcl_lightning.distributed.slurm import requeue_between_steps
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.buffer import RehearsalBuffer, split_total
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.memory.engine import MemoryEngine
from dcl_lightning.memory.joining import Rooms, columns_of, join
from dcl_lightning.memory.manager import MemoryManager, Offer, Representatives
from dcl_lightning.memory.nests import concat, flatten, map_tensors, num_rows
from dcl_lightning.memory.ranges import stage
from dcl_lightning.memory.storage import RowStore
from dcl_lightning.types import Batch, Task

__all__ = ["Rehearsal"]

_PRESET_ROWS = 60  # per class and worker, where no size is given: the original program's


class Rehearsal(pl.Callback):
    """Adds representatives of earlier batches to every training batch.

    With an agent and a ``ContinualDataModule`` rows are stored as the loader gives them and augmented
    anew each time, unless ``store`` says otherwise. With any other module, batches may be any nest of
    tensors with a common first dimension; what the loader gave is stored, and joined to the batch once
    that is on the device.

    Args:
        config: size, policy, scope and execution of the memory.
        label: with another module, where a batch has its labels: a key or a place; None where the policy
            needs none.
        num_classes: with ``label``, the number of classes.
    """

    def __init__(
        self, config: RehearsalConfig | None = None, label: int | str | None = None, num_classes: int | None = None
    ) -> None:
        super().__init__()
        if (label is None) != (num_classes is None):
            raise ConfigurationError(
                f"Rehearsal(label={label!r}, num_classes={num_classes}): give both, or neither where the policy needs "
                "no labels"
            )
        self.config = config or RehearsalConfig()
        self.label, self.num_classes = label, num_classes
        self.manager: MemoryManager | None = None
        self._engine: MemoryEngine[Representatives | None] | None = None
        self._rooms: Rooms | None = None
        self._references: References | None = None
        self._extras: ExtraColumns | None = None
        self._in_flight: Representatives | None = None
        self._offer: Offer | None = None
        self._weights: Tensor | None = None
        self._due = False  # whether this step's work was not given to the engine yet
        self._undo: list[Callable[[], None]] = []
        self._begins_late = False
        self.saved: SavedMemories | None = None
        self._example: Any = None
        self._wait_s = 0.0

    # -- life --------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a stream that does not fit; with ``stage: load`` let the data module prepare batches ahead."""
        stream = getattr(getattr(trainer, "datamodule", None), "stream", None)
        keep_side_files(trainer.strategy)
        requeue_between_steps(trainer)
        if stage == "fit":
            self.saved = self.manager = None
        if stage == "fit" and isinstance(stream, Stream):
            self.config.check_stream(stream.classes_come_again, trainer.datamodule.boundaries)  # type: ignore[attr-defined]
        if stage == "fit" and self.config.stage == "load":
            data: Any = getattr(trainer, "datamodule", None)
            if not hasattr(data, "load_ahead"):
                raise ConfigurationError("rehearsal.stage=load needs a ContinualDataModule: give stage=assemble")
            data.load_ahead = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the memory between the loader and the module."""
        self._in_flight = self._offer = None
        self._due = False
        self._wait_s = 0.0
        self.manager = self._rooms = self._references = None
        self._extras = ExtraColumns(pl_module)
        self._engine = MemoryEngine(self.config.execution != "inline", pl_module.device)
        self._undo = [
            pass_through(trainer, pl_module, "on_before_batch_transfer", self._before(trainer, pl_module)),
            pass_through(
                trainer, pl_module, "on_after_batch_transfer", self._after(trainer, pl_module),
                behind=self.config.store == "transformed",
            ),
        ]  # fmt: skip
        # On a CPU the background begins when the backward pass has the first layer left. As PyTorch frees what the
        # forward pass made, layer by layer, it asks for Python, which the background holds while it works: it would be
        # waited for. The first layer's gradients are the last long stretch of a step that needs no Python.
        last = before_first_layer(pl_module) if pl_module.device.type == "cpu" else None
        self._begins_late = last is not None and self.config.execution != "inline"
        if last is not None and self._begins_late:
            self._undo.append(last.register_post_accumulate_grad_hook(lambda _: self._begin(trainer)).remove)

    def _begin(self, trainer: pl.Trainer) -> None:
        if self._due:
            self._submit(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish pending work and take the memory out again."""
        if self._engine is not None:
            self._engine.flush()
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the memory out without waiting for the result of pending work."""
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no thread and no wrapped hook behind."""
        self._leave()

    def _leave(self) -> None:
        while self._undo:
            self._undo.pop()()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    # -- one step ----------------------------------------------------------------------------------

    def _before(self, trainer: pl.Trainer, module: pl.LightningModule) -> Callable[[Any], Any]:
        def add(batch: Any) -> Any:
            if self.config.store != "transformed":
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
            if self.config.store == "transformed":
                self._note(trainer, module, batch)
            drawn = self._take(trainer)
            self._due = True
            more = self._extras is not None and self._extras.shapes
            if self.config.scope == "global" and self.config.execution != "inline" and not more:
                # What travels between workers does so before the gradients, and behind the whole step.
                self._submit(trainer)
            if drawn is None or not (len(drawn.labels) or drawn.weight_share):
                return batch
            with stage("join", module.device):
                return self._join(batch, drawn, module.device, trainer.global_step)

        return add

    def _join(self, batch: Any, drawn: Representatives, device: torch.device, step: int) -> Any:
        rows, weights = drawn.rows, drawn.weights
        if device.type != "cpu":
            rows, weights = move_data_to_device((rows, weights), device)
        if self._engine is not None and self._engine.stream is not None:
            _used_on(torch.cuda.current_stream(), rows)
        if not isinstance(batch, Batch):
            return concat(batch, rows)
        inputs = self._rooms.beside(batch.inputs, rows["inputs"]) if self._rooms is not None else None
        more = self._extras.shapes if self._extras is not None else ()
        return join(batch, rows, weights, drawn.weight_share, self.config.loss, step, inputs, more)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let the background begin, its kernels under the backward pass, where it does not begin late."""
        if self.config.execution != "inline" and not self._begins_late:
            self._begin(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do the memory's work now if it was not begun; at the end of an epoch leave nothing pending."""
        assert self._engine is not None
        self._begin(trainer)
        if trainer.is_last_batch:
            self._engine.flush()
            self._in_flight = None
        every = log_interval(trainer)
        if trainer.loggers and every and trainer.global_step % every == 0:
            self._log(trainer, every)

    def _take(self, trainer: pl.Trainer) -> Representatives | None:
        """Return the representatives of this step; at the start of an epoch they are drawn now."""
        assert self._engine is not None
        if self._in_flight is not None:
            drawn, self._in_flight = self._in_flight, None
            return drawn
        if self.config.execution == "nonblocking":
            return self._engine.latest()
        if not self._engine.pending:
            assert self.manager is not None
            skipped = self._skipped(trainer)
            self._engine.submit(lambda: self._advance(None, True, skipped))
        return self._engine.collect()

    def _submit(self, trainer: pl.Trainer) -> None:
        assert self._engine is not None
        self._due = False
        draw = not trainer.is_last_batch
        offer = self._offer if self.config.update == "step" else None
        skipped = self._skipped(trainer)
        if offer is not None and self._extras is not None and self._weights is not None:
            offer = self._extras.with_step(offer, self._weights)
        if offer is not None and self._engine.stream is not None:
            _used_on(self._engine.stream, offer)
        self._engine.submit(lambda: self._advance(offer, draw, skipped))

    def _advance(self, offer: Offer | None, draw: bool, skipped: Tensor | None) -> Representatives | None:
        assert self.manager is not None
        drawn = self.manager.advance(offer, draw, skipped)
        if drawn is not None and self._references is not None:
            drawn = drawn._replace(rows=self._references.complete(drawn.rows))
        if drawn is None or self.config.stage == "sample":
            return drawn
        rows, device = drawn.rows, self.manager.device
        with stage("move", device):
            if self._rooms is not None:
                rows = {**rows, "inputs": self._rooms.settle(rows["inputs"])}
            if device.type != "cpu":
                rows = move_data_to_device(rows, device)
        return drawn._replace(rows=rows)

    def _skipped(self, trainer: pl.Trainer) -> Tensor | None:
        # Of the present task nothing is stored before its end, where rows enter at the ends of tasks.
        if self.config.rehearse == "seen" or self.config.update == "task_end":
            return None
        # Not what the agent says: resumed at the end of an epoch, it hears of its task after this batch came.
        clock: Any = trainer.lightning_module.clock
        assert self.manager is not None
        skipped = torch.zeros(self.manager.buffer.state.num_classes, dtype=torch.bool)
        skipped[list(clock.tasks[clock.task_at(trainer.current_epoch)].classes)] = True
        return skipped

    def on_task_end(self, trainer: pl.Trainer, agent: pl.LightningModule, task: Task) -> None:
        """With ``update: task_end`` offer the whole taskset, in random order."""
        if self.config.update != "task_end" or self.manager is None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.train_eval_loader(_shuffled(data.train_indices(task.index), self.manager.seed + task.index))
        assert self._extras is not None
        if self._references is not None and not self._extras.shapes:
            loader.inputs = torch.empty(len(data.train_targets), 0)  # none need be read
        for batch in map(trainer.precision_plugin.convert_input, loader):
            offer = self._extras.with_evaluation(self._offer_of(batch), batch, data)
            self.manager.buffer.add(offer.rows, offer.labels, offer.ids)

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
            config.check_without_agent(self.label is not None)
            num_rows(batch)  # what is no tensor is named
        classes = module.num_classes if own else (self.num_classes or 1)
        samples = len(trainer.datamodule.train_targets) if own else 0  # type: ignore[attr-defined]
        total = config.total(classes, comm.size, samples, _PRESET_ROWS * classes * comm.size)
        if self.saved is not None:  # also where sizes are given for each worker, and there are others now
            total = self.saved.capacity
        if total < comm.size or (own and config.policy != "reservoir" and total < classes):
            raise ConfigurationError(
                f"a memory of {total} rows is smaller than the {classes} classes: enlarge rehearsal.buffer_size"
            )
        if config.store == "reference":
            self._references = References(getattr(trainer, "datamodule", None), module.device.type == "cuda")
        example = self._columns_of(batch, 0) if own else batch
        if own and self._extras is not None and self._extras.shapes:
            example = _no_rows(example) | self._extras.no_rows()
        capacity = split_total(total, comm.size, comm.rank)
        seed = seed_of_run(config.seed)
        candidates = config.candidates
        if config.update == "task_end" and candidates is not None:  # every sample is a candidate
            candidates = trainer.datamodule.eval_batch_size  # type: ignore[attr-defined]
        buffer = RehearsalBuffer(
            num_classes=classes,
            capacity=capacity,
            policy=config.policy,
            quota=config.quota,
            num_candidates=candidates,
            store=RowStore(example, capacity, config.storage),
            seed=seed * 1_000_003 + comm.rank,
            num_samples=samples or None,
        )
        size = trainer.datamodule.batch_size if own else num_rows(batch)  # type: ignore[attr-defined]
        labels = torch.zeros(0, dtype=torch.int64)
        self._example = _no_rows(example)
        self.manager = MemoryManager(config, buffer, comm, size, (self._example, labels), module.device, seed)
        if self._references is not None:
            self._example = self._references.complete(self._example)
        if own and config.stage != "sample":
            self._rooms = Rooms(size, config.num_samples, module.device)
        self.manager.total = total
        if self.saved is not None:
            self._in_flight, self.saved = self.saved.restore(self.manager, self._example), None

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

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write this worker's memory, and what it has drawn for its next step, beside the checkpoint."""
        if self.manager is not None:
            self._begin(trainer)  # another callback saves, whose turn comes before ours
            if self._engine is not None and self._engine.pending:
                self._in_flight = self._engine.flush()
            save_memory(trainer, checkpoint, self.config, self.manager, self._in_flight)
        elif self.saved is not None:
            self.saved.save_again(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at the saved memories, which are taken back once the first batch has come."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.saved = SavedMemories.of(checkpoint, self.config, comm_of(trainer.strategy))


def _used_on(stream: torch.cuda.Stream, nest: Any) -> None:
    """Tell the allocator that tensors made on another stream are used on this one: it must not give them away early."""
    for _, tensor in flatten(nest):
        if tensor.is_cuda:
            tensor.record_stream(stream)


def _no_rows(nest: Any) -> Any:
    return map_tensors(lambda column: column[:0], nest)


def _shuffled(ids: Tensor, seed: int) -> Tensor:
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
