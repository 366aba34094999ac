"""A data set as a stream of tasks, for one ``fit``."""

from __future__ import annotations

import os
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dcl_lightning.data import scenarios, sources, transforms
from dcl_lightning.data.ahead import AheadLoader
from dcl_lightning.data.class_orders import named_class_order
from dcl_lightning.data.images import ImageFiles
from dcl_lightning.data.loader import TaskLoader
from dcl_lightning.data.readers import Readers
from dcl_lightning.data.seeds import seed_of_run
from dcl_lightning.distributed.place import place, worker_threads
from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.types import Batch, Clock, InputSpec, Task

__all__ = ["ContinualDataModule"]


class ContinualDataModule(pl.LightningDataModule):
    """Steps through the tasks of a data set; images travel as uint8 and become float on the device.

    Args:
        dataset: ``digits``, ``digits_dev``, ``synthetic``, ``mnist``, ``cifar10``, ``cifar100``, ``tinyimagenet``,
            ``imagenet``, ``imagenet_blurred``, ``imagenet100``, ``imagenet100small``, ``core50``, ``candle``;
            ``folder`` for images in ``<root>/train/<class>/`` and ``<root>/test/<class>/`` (or ``val``); the class
            path of a continuum data set of arrays; or in Python ``(x_train, y_train, x_test, y_test)`` or two
            continuum data sets, of training and of test.
        root: folder of the data sets, or of the images for ``folder``; symbolic links are followed.
        download: whether a missing data set may be fetched.
        scenario: ``class`` (classes arrive task by task), ``domain`` or ``instance`` (all classes in every
            task), ``none`` (one task).
        initial_increment: classes of the first task of a class scenario; ``increment`` if None.
        increment: classes of each further task, or a list with one number for each task.
        num_tasks: tasks of a domain scenario.
        class_order: original labels in the order of their appearance, or a published order of CIFAR-100,
            ``icarl_1993`` or ``icarl_list``; ascending if None.
        concatenate_tasksets: whether task t trains on the data of tasks 0..t.
        val_ratio: share of each class of each task that is held out of training for validation, in [0, 1).
        select_on_test: allow callbacks to select on test data where nothing is held out.
        batch_size: training samples a step and worker.
        eval_batch_size: evaluation samples a step and worker; ``batch_size``, but at least 256, if None.
        num_workers: processes that read images from files, of each worker: 0 to read in the training process, one
            for each of its cores but at most 8 if None. Data sets of arrays need none.
        augment: crop and mirror training images; what suits the data set if None.
        seed: seed of order, augmentation and hold-outs, the same on all workers; the one given to
            ``seed_everything`` if None, 0 without any.
        source_options: ``num_classes``, ``size``, ``per_class``, ``seed`` of ``synthetic``; ``size``, the side of an
            image, and ``num_classes``, where only a part is at hand, of sets of image files.

    Attributes:
        load_ahead: whether a thread prepares each training batch one ahead.
        extra_indices: for a task, sample ids that are trained on beside its own (iCaRL's exemplars).
        extra_per_step: None, and these are part of the task's training set; or how many of them join each batch.
    """

    def __init__(
        self,
        dataset: str | tuple[Any, ...] = "digits",
        root: str = "datasets",
        download: bool = False,
        scenario: Literal["class", "domain", "instance", "none"] = "class",
        initial_increment: int | None = None,
        increment: int | list[int] = 2,
        num_tasks: int = 5,
        class_order: list[int] | list[str] | str | None = None,
        concatenate_tasksets: bool = False,
        val_ratio: float = 0.0,
        select_on_test: bool = False,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        augment: bool | None = None,
        seed: int | None = None,
        source_options: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("num_tasks", num_tasks),
        ):
            if value is not None and value < 1:
                raise ConfigurationError(f"data.{name}={value}: give at least 1")
        if not 0 <= val_ratio < 1:
            raise ConfigurationError(f"data.val_ratio={val_ratio}: give a share from 0 to below 1")
        self.root, self.download, self.scenario = root, download, scenario
        self.concatenate_tasksets, self.select_on_test = concatenate_tasksets, select_on_test
        self.val_ratio, self.batch_size = val_ratio, batch_size
        self.seed = seed_of_run(seed)
        self.eval_batch_size = eval_batch_size or max(batch_size, 256)
        if num_workers is not None and num_workers < 0:
            raise ConfigurationError(f"data.num_workers={num_workers}: give 0 or more")
        self.num_workers = num_workers
        self._readers = Readers(0)
        self.source_options = source_options
        self.dataset_name = dataset if isinstance(dataset, str) else "arrays"
        sources.check_options(self.dataset_name, source_options or {})
        self._source = sources.SOURCES.get(self.dataset_name)
        self._splits = sources.from_arrays(dataset) if not isinstance(dataset, str) else None
        if self._splits is None and (self._source is None or self._source.num_classes is None):
            # A folder, or the class of a continuum data set, says nothing of its size: it has to be looked at.
            self._splits = sources.load(self.dataset_name, root, download, source_options)
        self._class_order = named_class_order(class_order) if isinstance(class_order, str) else class_order
        self._increment, self._initial_increment, self._num_parts = increment, initial_increment, num_tasks
        self.augment = augment if augment is not None else bool(self._source and self._source.augment)
        self.num_classes = self._count_classes()
        self._task_classes = self._make_task_classes()
        self.num_tasks = len(self._task_classes)
        self.task_id = 0
        self.load_ahead = False
        self.extra_indices: dict[int, Tensor] = {}
        self.extra_per_step: int | None = None
        self.original_labels: list[scenarios.Label] = []
        self._clock: Clock | None = None
        self._train_loader: TaskLoader | None = None
        self._ready = False

    # -- known before any file is read -------------------------------------------------------------

    def _count_classes(self) -> int:
        if self._splits is not None:
            return len(np.unique(self._splits.train_labels))
        options = self.source_options or {}
        assert self._source is not None
        assert self._source.num_classes is not None
        return options.get("num_classes", self._source.num_classes)

    @property
    def input_spec(self) -> InputSpec:
        """Shape of one input."""
        if self._source is None:
            inputs = self._splits.train_inputs if self._splits is not None else self.train_inputs
            return InputSpec(*inputs.shape[1:])
        size = (self.source_options or {}).get("size")
        return self._source.input_spec if size is None else InputSpec(self._source.input_spec.channels, size, size)

    def _make_task_classes(self) -> list[list[int]]:
        everything = list(range(self.num_classes))
        if self.scenario == "class":
            return scenarios.class_tasks(self.num_classes, self._increment, self._initial_increment)
        return [everything] * (1 if self.scenario == "none" else self._num_parts)

    # -- set-up ------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Refuse a missing data set before anything is created, or fetch it if asked to.

        Lightning calls this in one process of each host.
        """
        if self._splits is not None or self._ready:
            return
        sources.check_files(self.dataset_name, self.root, self.download)
        if self.download or sources.SOURCES[self.dataset_name].cached:
            # ``setup`` of this process need not read it again.
            self._splits = sources.load(self.dataset_name, self.root, True, self.source_options)

    def setup(self, stage: str | None = None) -> None:
        """Read the data and cut them into tasks, once."""
        self._readers.num_workers = self._processes()
        if self._ready:
            return
        splits = self._splits or sources.load(self.dataset_name, self.root, False, self.source_options)
        self._check_count(len(np.unique(splits.train_labels)))
        classes = scenarios.order_classes(splits.train_labels, self._class_order)
        self.original_labels = classes
        train = scenarios.encode(splits.train_labels, classes)
        test = scenarios.encode(splits.test_labels, classes)
        train_parts, test_parts = self._parts(train), self._parts(test)
        self.train_inputs, self.test_inputs = splits.train_inputs, splits.test_inputs
        for inputs in (self.train_inputs, self.test_inputs):
            if isinstance(inputs, ImageFiles):
                inputs.readers = self._readers
        self.train_targets, self.test_targets = torch.from_numpy(train), torch.from_numpy(test)
        self._train_parts, self._test_parts = torch.from_numpy(train_parts), torch.from_numpy(test_parts)
        self._hold_out()
        self._splits, self._ready = None, True
        for task in range(self.num_tasks):
            if not len(self.train_indices(task)):
                raise ConfigurationError(f"task {task} has no training samples: give fewer tasks than {self.num_tasks}")

    def _check_count(self, found: int) -> None:
        if self._source is None or found == self.num_classes:
            return
        part = f"set data.source_options.num_classes={found} to use a part of it"
        raise DataError(
            f"data set '{self.dataset_name}' in {os.path.abspath(self._source.path(self.root))} has "
            f"training samples of {found} classes, expected {self.num_classes}: "
            + (part if "num_classes" in self._source.options else "fetch it anew")
        )

    def _hold_out(self) -> None:
        targets, parts = self.train_targets.numpy(), self._train_parts.numpy()
        self._held = torch.from_numpy(scenarios.hold_out(targets, parts, self.val_ratio, self.seed))

    def _processes(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        local = max(place("local_size"), getattr(self.trainer, "num_devices", 1))
        return min(worker_threads(local), 8)

    def _parts(self, targets: np.ndarray) -> np.ndarray:
        if self.scenario == "class":
            task_of_class = np.repeat(np.arange(self.num_tasks), [len(c) for c in self._task_classes])
            return task_of_class[targets]
        return scenarios.part_of_samples(targets, self.num_tasks)

    def attach_clock(self, clock: Clock) -> None:
        """Let the clock say which task an epoch belongs to."""
        self._clock = clock

    def tasks(self, epochs: list[int]) -> list[Task]:
        """Return the stream, given each task's number of epochs."""
        self.setup()
        return [
            Task(
                index=t,
                num_tasks=self.num_tasks,
                classes=tuple(classes),
                labels=tuple(self.original_labels[y] for y in classes),
                num_samples=len(self.train_indices(t)),
                epochs=epochs[t],
            )
            for t, classes in enumerate(self._task_classes)
        ]

    def train_indices(self, task: int) -> Tensor:
        """Return the sample ids of a task's own training samples, hold-outs left out."""
        return torch.nonzero((self._train_parts == task) & ~self._held).flatten()

    # -- loaders -----------------------------------------------------------------------------------

    def train_dataloader(self) -> TaskLoader | AheadLoader:
        """Return the one training loader, set to the present epoch's task."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        self.task_id = self._clock.task_at(epoch) if self._clock is not None else self.task_id
        first = 0 if self.concatenate_tasksets else self.task_id
        own = torch.cat([self.train_indices(t) for t in range(first, self.task_id + 1)])
        extra = self.extra_indices.get(self.task_id, own[:0])
        extra = extra[~torch.isin(extra, own)]
        indices = torch.cat([own, extra]) if self.extra_per_step is None else own
        rank, size = self._place()
        if self._train_loader is None:
            self._train_loader = TaskLoader(
                self.train_inputs, self.train_targets, self._train_parts, self.batch_size, indices, rank, size,
                train=True, seed=self.seed,
            )  # fmt: skip
        # Another trainer, or Lightning's search for a batch size, may have changed these since the last call.
        self._train_loader.rank, self._train_loader.size = rank, size
        self._train_loader.batch_size = self.batch_size
        self._train_loader.augment = self.augment
        self._train_loader.pin_memory = self._on_gpu()
        self._train_loader.visit(indices, epoch, extra, self.extra_per_step or 0)
        return AheadLoader(self._train_loader) if self.load_ahead else self._train_loader

    def val_dataloader(self) -> list[TaskLoader]:
        """Return a loader for each task so far: its hold-outs, or its test set where nothing is held out."""
        if self.val_ratio == 0:
            return _for_all(self.test_loaders(self.task_id))
        held = [torch.nonzero((self._train_parts == t) & self._held).flatten() for t in range(self.task_id + 1)]
        return _for_all([self.train_eval_loader(indices) for indices in held])

    def test_dataloader(self) -> list[TaskLoader]:
        """Return a loader for each task's test set."""
        return _for_all(self.test_loaders(self.num_tasks - 1))

    def predict_dataloader(self) -> list[TaskLoader]:
        """Return a loader for each task's test set."""
        return self.test_dataloader()

    def test_loaders(self, last_task: int) -> list[TaskLoader]:
        """Return the test sets of tasks 0..last_task, each sample on exactly one worker."""
        parts = [torch.nonzero(self._test_parts == t).flatten() for t in range(last_task + 1)]
        return [self._eval_loader(self.test_inputs, self.test_targets, self._test_parts, p) for p in parts]

    def train_eval_loader(self, indices: Tensor) -> TaskLoader:
        """Return training samples as evaluation sees them, each on exactly one worker."""
        return self._eval_loader(self.train_inputs, self.train_targets, self._train_parts, indices)

    def _eval_loader(self, inputs: Tensor | ImageFiles, targets: Tensor, parts: Tensor, indices: Tensor) -> TaskLoader:
        rank, size = self._place()
        loader = TaskLoader(inputs, targets, parts, self.eval_batch_size, indices, rank, size)
        loader.pin_memory = self._on_gpu()
        return loader

    def teardown(self, stage: str) -> None:
        """End the processes that read images.

        Args:
            stage: what has ended.
        """
        self._readers.close()

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    # -- checkpoint --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the seed and what must be the same when a run is resumed."""
        return {"seed": self.seed, "stream": self._stream()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the run's seed back, and refuse another stream than the one that the run was started with.

        Raises:
            ConfigurationError: data set, scenario, class order, tasks or hold-outs differ; both values are named.
        """
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        present = self._stream()
        for name, saved in state_dict["stream"].items():
            if saved != present[name]:
                raise ConfigurationError(
                    f"the checkpoint's run had {name} {saved}, this one has {present[name]}: resume with the "
                    "data options that the run was started with"
                )
        self.seed = state_dict["seed"]
        self._hold_out()
        self._train_loader = None

    def _stream(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset_name,
            "scenario": self.scenario,
            "class_order": list(self.original_labels),
            "classes of the tasks": [list(classes) for classes in self._task_classes],
            "val_ratio": self.val_ratio,
        }

    # -- on the device -----------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn a batch into float and normalise it; augment it in training."""
        assert self.trainer is not None
        return self.prepare_batch(batch, train=bool(self.trainer.training), epoch=self.trainer.current_epoch)

    def prepare_batch(self, batch: Batch, train: bool, epoch: int) -> Batch:
        """Return the batch as the network takes it, on the device that it is on."""
        inputs = batch.inputs
        if train and self.augment:
            pad = self._source.pad if self._source is not None else 4
            inputs = transforms.augment(inputs, batch.draw_ids, self.seed, epoch, pad)
        inputs = transforms.to_float(inputs)
        if self._source is not None:
            inputs = transforms.normalise(inputs, self._source.mean, self._source.std)
        return batch._replace(inputs=inputs)


def _for_all(loaders: list[TaskLoader]) -> list[TaskLoader]:
    """Return the loaders, each with a batch on every worker: Lightning's loops have to be run by all."""
    for loader in loaders:
        loader.for_all = True
    return loaders
