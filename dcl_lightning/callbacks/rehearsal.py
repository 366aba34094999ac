"""Rehearsal for any module: representatives join each training batch, and the memory works in the background."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from dcl_lightning._lightning import callbacks_of, datamodule_of, log_interval, step_is_open
from dcl_lightning.callbacks.evaluation import evaluation_batches, limited_ids, loader_batches, within_class
from dcl_lightning.callbacks.hooks import pass_through
from dcl_lightning.callbacks.progress import StreamProgress, show_memory
from dcl_lightning.callbacks.task_clock import TaskClock
from dcl_lightning.checkpoint.buffer_files import SavedMemories, refuse_another_memory, save_memory
from dcl_lightning.checkpoint.io import keep_side_files
from dcl_lightning.comm import comm_of
from dcl_lightning.data.datamodule import ContinualDataModule
from dcl_lightning.data.images import AS_EVALUATED
from dcl_lightning.data.scenarios import seed_of_run
from dcl_lightning.data.stream import Stream
from dcl_lightning.distributed import ranks
from dcl_lightning.distributed.horovod.shutdown import requeue_between_steps
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import RehearsalConfig, ResolvedConfig, resolve
from dcl_lightning.memory.manager import MemoryManager, build_manager
from dcl_lightning.memory.pytree import num_rows
from dcl_lightning.memory.replay import Replay
from dcl_lightning.memory.rows import BatchCodec, NestCodec, Representatives, RowCodec
from dcl_lightning.types import PyTree, StateDict, StoresExtraColumns, Task

__all__ = ["Rehearsal"]

_DEFAULT_ROWS = 60  # per class and worker, as in the original program


class Rehearsal(pl.Callback):
    """Adds representatives of earlier batches to every training batch.

    With a ``ContinualDataModule`` the memory stores samples as the loader gives them, and representatives are augmented
    anew in each step, unless ``row_format`` says otherwise. The first task begins with an empty memory.

    With any other data, a batch may be any nest of tensors with a common first dimension. The memory stores what the
    loader gives, and outlives a fit: with one fit per task and the same ``Rehearsal``, a fit rehearses what the fits
    before have stored. ``clear`` empties it.

    Args:
        config: size, policy, scope and execution of the memory, or a dict of these values. Values that are not given
            are the agent's own, or for other modules those of plain replay; see ``RehearsalConfig``.
        label: for other data, the key or position of the labels in a batch; None if the policy needs no labels.
        num_classes: for other data with ``label``, the number of classes.

    Attributes:
        given: the values of ``config`` that were given.
        manager: the memory; None before it is made.
        replay: the rehearsal of the present fit; None outside a fit.
        saved: memories of the checkpoint that the fit resumes from, until they are restored.
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
        self.replay: Replay | None = None
        self.saved: SavedMemories | None = None
        self._drawn: Representatives | None = None  # for the next step, while there is no ``replay``
        self._joined = False  # whether the present batch has passed the hooks
        self._undo: list[Callable[[], None]] = []
        # Of a taskset whose insertion at a task's end a signal has interrupted: task, rows per worker so far, workers.
        self._inserted: tuple[int, int, int] | None = None

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
        """Empty the memory.

        Raises:
            RuntimeError: during a fit.
        """
        if self.replay is not None:
            raise RuntimeError("Rehearsal.clear: a fit is going on; call it between fits")
        self.manager = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what does not fit together; with ``prefetch: batch`` let the data module prepare batches ahead."""
        keep_side_files(trainer.strategy)
        requeue_between_steps(trainer)
        if stage != "fit":
            return
        if getattr(pl_module, "rehearsal", None) is not self:
            self.complete()  # an agent that had it in an earlier fit has completed it with its own values
        data, stream = datamodule_of(trainer), _stream_of(trainer)
        self.saved = self._inserted = self._drawn = None
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ConfigurationError(
                f"{type(pl_module).__name__}.training_step(dataloader_iter) fetches batches itself, past the hooks by "
                "which representatives join them: give training_step(batch, batch_idx)"
            )
        if not getattr(pl_module, "weighs_rows", False):
            self.config.check_without_agent(self.label is not None, stream is not None)
        if stream is not None:
            self.manager = None  # the stream begins, or a checkpoint brings its memory
            self.config.check_stream(stream.classes_come_again, data.boundaries, data.scenario)
            if not data.concatenate_tasksets:
                self._warn_of_forgotten_tasks(stream)
        if self.config.prefetch == "batch":
            if not isinstance(data, ContinualDataModule):
                raise ConfigurationError("rehearsal.prefetch=batch needs a ContinualDataModule: give prefetch=device")
            data.attach_replay(self)

    # ``ReplaySource``, of the data module with ``prefetch: batch``.
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
        """Wrap the hooks of the batch; make, restore or reconnect the memory if the rows are known already."""
        self._joined = False
        _refuse_several_loaders(trainer)
        if _stream_of(trainer) is not None:
            # Before the first batch, since the clock may have to end an interrupted task with the restored memory.
            self._build_for_stream(trainer, pl_module)
        elif self.manager is not None:
            refuse_another_memory(
                self.manager.config, self.config, "the memory was filled with", ("execution", "prefetch")
            )
            self.manager.config = self.config
            self.manager.connect(comm_of(trainer.strategy), pl_module.device)
            self._start(trainer, pl_module, NestCodec(self.label))
        augmented = self.config.row_format == "augmented"

        def before(batch: PyTree) -> PyTree:
            if not augmented:
                self._observe(trainer, pl_module, batch)
            return batch

        def after(batch: PyTree) -> PyTree:
            if augmented:
                self._observe(trainer, pl_module, batch)
            assert self.replay is not None
            self._joined = True
            manual = not pl_module.automatic_optimization  # may go without ``on_before_backward``
            return self.replay.join(batch, trainer.global_step, trainer.is_last_batch, computed=manual)

        self._undo = [
            pass_through(trainer, pl_module, "on_before_batch_transfer", before),
            pass_through(trainer, pl_module, "on_after_batch_transfer", after, behind=augmented),
        ]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: PyTree, batch_idx: int
    ) -> None:
        """Refuse a batch that has not passed the hooks: it would be trained on without representatives.

        Raises:
            ConfigurationError: with the remedy.
        """
        if not self._joined:
            raise ConfigurationError(
                "a batch came past on_after_batch_transfer, by which representatives join it: the strategy or the "
                "module moves batches by itself; leave Rehearsal out, or let Lightning move them"
            )
        self._joined = False

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Begin the background work, which overlaps with the backward pass."""
        if self.replay is not None:
            self.replay.loss_computed()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: PyTree, batch_idx: int
    ) -> None:
        """Do the memory's work if it has not begun; at the end of an epoch leave none pending."""
        assert self.replay is not None
        self.replay.work()
        if trainer.is_last_batch:
            self.replay.end_epoch()
        every = log_interval(trainer)
        if trainer.loggers and every and trainer.global_step % every == 0:
            figures = self.replay.figures(every)
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step - 1)  # Lightning's, from 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave no work pending, also if the epoch ends before its last batch."""
        if self.replay is not None:
            self.replay.skip()
            self.replay.end_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish pending work and restore the hooks."""
        if self.replay is not None:
            self.replay.wait()
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the hooks; for a checkpoint that a callback saves after this, a lone worker finishes its work."""
        drawn = None
        if self.replay is not None and comm_of(trainer.strategy).size == 1:
            if step_is_open(trainer):
                self.replay.skip()
            with suppress(Exception):  # an error of the memory may be what ends the fit
                drawn = self.replay.wait()
        self._leave()
        self._drawn = drawn

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no thread and no wrapped hook."""
        self._leave()

    def _leave(self) -> None:
        while self._undo:
            self._undo.pop()()
        replay, self.replay = self.replay, None
        if replay is not None and not replay.close():
            rank_zero_warn("the memory's work did not end with the fit: the memory is dropped")
            self.manager = None
        if self.manager is not None:
            self.manager.disconnect()

    # -- the memory --------------------------------------------------------------------------------

    def _observe(self, trainer: pl.Trainer, module: pl.LightningModule, batch: PyTree) -> None:
        if self.replay is None:
            codec, classes = NestCodec(self.label), self.num_classes or 1
            candidates, size = self.config.num_candidates, num_rows(batch)
            self._build(trainer, module, codec, codec.example(batch), classes, candidates, size)
        assert self.replay is not None
        self.replay.observe(batch, trainer.current_epoch)

    def _build_for_stream(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        data = datamodule_of(trainer)
        batch = trainer.precision_plugin.convert_input(data.batch_without_rows())
        if self.config.row_format == "augmented":
            batch = data.on_after_batch_transfer(move_data_to_device(batch, module.device), 0)
        read = None
        if self.config.row_format == "index":
            read = data.read_samples
            read(batch.sample_ids, batch.sample_ids)  # refuses at once what it cannot read
        codec = BatchCodec(self.config.loss, module.row_shapes if isinstance(module, StoresExtraColumns) else {}, read)
        candidates = self.config.num_candidates
        if candidates is not None and self.config.update == "task_end":
            candidates = data.eval_batch_size  # every sample is a candidate
        self._build(
            trainer, module, codec, codec.example(batch), data.num_classes, candidates, data.batch_size,
            len(data.train_targets),
        )  # fmt: skip

    def _build(
        self, trainer: pl.Trainer, module: pl.LightningModule, codec: RowCodec, example: PyTree, num_classes: int,
        num_candidates: int | None, batch_size: int, num_samples: int | None = None,
    ) -> None:  # fmt: skip
        config, comm = self.config, comm_of(trainer.strategy)
        default = _DEFAULT_ROWS * num_classes * comm.size
        total = config.total(num_classes, comm.size, num_samples or 0, default)
        self.manager = build_manager(
            config,
            example,
            comm,
            module.device,
            num_classes=num_classes,
            num_samples=num_samples,
            num_candidates=num_candidates,
            batch_size=batch_size,
            # The saved capacity also if it was given per worker, and the number of workers has changed.
            total=total if self.saved is None else self.saved.capacity,
            seed=seed_of_run(config.seed, "rehearsal.seed"),
            workers_on_host=min(comm.size, max(ranks.local_size(), trainer.num_devices)),
            shares_weights=isinstance(codec, BatchCodec),
        )
        if self.saved is not None:
            self._drawn, self.saved = self.saved.restore(self.manager, codec.decode(example)), None
        self._start(trainer, module, codec)
        if not any(isinstance(callback, StreamProgress) for callback in callbacks_of(trainer)):
            show_memory(trainer, self.manager.buffer.store.capacity, self.manager.buffer.num_bytes)

    def _start(self, trainer: pl.Trainer, module: pl.LightningModule, codec: RowCodec) -> None:
        assert self.manager is not None
        clock = TaskClock.of(trainer)
        self.replay = Replay(
            self.manager,
            codec,
            exclude=lambda: self._present_classes(trainer),
            agent=module,
            stopwatch=None if clock is None else clock.stopwatch,
        )
        self.replay.resume(self._drawn)
        self._drawn = None

    def _present_classes(self, trainer: pl.Trainer) -> Tensor | None:
        """Return the present task's classes ``(K,)`` bool if draws leave them out, else None."""
        # With ``update: task_end`` nothing of the present task is stored yet.
        if self.config.draw_from == "seen" or self.config.update == "task_end":
            return None
        # By the clock, since the agent of a run resumed at the end of an epoch hears of its task after the first batch.
        clock = datamodule_of(trainer).clock
        assert self.manager is not None
        present = torch.zeros(self.manager.buffer.state.num_classes, dtype=torch.bool)
        if clock is None:  # a single task
            return ~present
        present[list(clock.tasks[clock.task_at(trainer.current_epoch)].classes)] = True
        return present

    def on_task_end(self, trainer: pl.Trainer, agent: pl.LightningModule, task: Task) -> None:
        """With ``update: task_end`` offer the whole taskset, in random order."""
        if self.config.update != "task_end":
            return
        assert self.manager is not None
        assert self.replay is not None
        codec, data = self.replay.codec, datamodule_of(trainer)
        assert isinstance(codec, BatchCodec)
        ids = _shuffled(limited_ids(trainer, data.train_indices(task.index)), self.manager.seed + task.index)
        rows = 0
        if self._inserted is not None and self._inserted[0] == task.index:
            rows = self._inserted[1]
            ids = ids[_places(ids, data.owners(self._inserted[2]), self._inserted[2]) >= rows]
        loader = data.train_eval_loader(ids)
        if not codec.stores_inputs and not codec.extra:
            loader.inputs = torch.empty(len(data.train_targets), 0)  # no input is needed
        world_size = comm_of(trainer.strategy).size
        for batch in loader_batches(trainer, loader):
            batch = trainer.precision_plugin.convert_input(batch)
            candidates = codec.encode(batch, AS_EVALUATED)
            if codec.extra:
                assert isinstance(agent, StoresExtraColumns)
                # Of the trained weights, not of averaged ones, as the columns of a step are.
                for ready in evaluation_batches(agent, [batch], averaged=False):
                    candidates = codec.add_columns(candidates, agent.columns_of(ready), batch.weights)
            self.manager.buffer.add(*candidates)
            rows += loader.batch_size
            self._inserted = (task.index, rows, world_size)
        self._inserted = None

    # -- checkpoint --------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Return how much of a taskset was inserted, if a signal has interrupted the end of a task."""
        return {} if self._inserted is None else {"offered": list(self._inserted)}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore it."""
        task, rows, world_size = state_dict["offered"]
        self._inserted = (task, rows, world_size)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: StateDict) -> None:
        """Write this worker's memory and the representatives of its next step to a file next to the checkpoint."""
        if self.manager is None and self.saved is not None:
            self.saved.save_again(trainer, checkpoint)
        elif self.manager is not None:
            # The callback that saves may come before this one, so the step's work may not have begun.
            drawn = self._drawn if self.replay is None else self.replay.wait()
            save_memory(trainer, checkpoint, self.config, self.manager, drawn)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: StateDict) -> None:
        """Check the saved memories, which are restored when training starts, or with the first batch of other data."""
        if trainer.state.fn == TrainerFn.FITTING:
            comm, kept = comm_of(trainer.strategy), self.manager
            self.manager, self.saved = None, SavedMemories.of(checkpoint, self.config, comm)
            if kept is not None and self.saved is not None and self.saved.fits(kept, comm):
                # At once: the files of Lightning's search for a rate or a batch size are gone when training starts.
                kept.connect(comm, pl_module.device)
                self._drawn = self.saved.restore(kept, kept.buffer.store.example)
                self.manager, self.saved = kept, None


def _stream_of(trainer: pl.Trainer) -> Stream | None:
    data = datamodule_of(trainer)
    return data.stream if isinstance(data, ContinualDataModule) else None


def _refuse_several_loaders(trainer: pl.Trainer) -> None:
    loaders: Any = trainer.train_dataloader
    if isinstance(loaders, (Mapping, list, tuple)) and len(loaders) > 1:
        raise ConfigurationError(
            f"{len(loaders)} training loaders: what they give side by side are not the rows of one batch, which a "
            "memory stores together; give one loader, of a data set with all columns (torch.utils.data.StackDataset)"
        )


def _places(ids: Tensor, owners: Tensor | None, workers: int) -> Tensor:
    """Return each row's place among those of its worker."""
    return torch.arange(len(ids)) // workers if owners is None else within_class(owners[ids])


def _shuffled(ids: Tensor, seed: int) -> Tensor:
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
