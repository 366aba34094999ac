"""A data set as a stream of tasks, for one ``fit``."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_type_hints

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dcl_lightning.data import transforms
from dcl_lightning.data.images import AS_EVALUATED, ImageFiles, ReaderPool
from dcl_lightning.data.loader import Inputs, PrefetchLoader, TaskLoader, draw_ids_of, for_all
from dcl_lightning.data.scenarios import Label, TaskSplit, count_tasks, seed_of_run
from dcl_lightning.data.sources import table as sources
from dcl_lightning.data.sources.continuum import splits_of_scenario
from dcl_lightning.data.stream import Stream, refuse_another_stream
from dcl_lightning.data.transforms import GivenTransforms, Normalisation, TransformedInputs
from dcl_lightning.distributed import ranks
from dcl_lightning.distributed.ranks import worker_threads
from dcl_lightning.errors import ConfigurationError, check_words, whole_number
from dcl_lightning.paths import absolute
from dcl_lightning.types import Batch, Clock, InputSpec, NetworkInputs, ReplaySource, StateDict, Task

__all__ = ["ContinualDataModule"]

# Named elsewhere in reports, or other on each machine.
_PLACES = ("dataset", "root", "download", "stage_to", "num_workers")
_MOST_PASSES = 10_000  # which their draws tell apart


class ContinualDataModule(pl.LightningDataModule):
    """Steps through the tasks of a data set; images travel as uint8 and become float on the device.

    Args:
        dataset: ``digits``, ``digits_dev``, ``synthetic``, ``mnist``, ``mnist5k``, ``cifar10``, ``cifar100``,
            ``tinyimagenet``, ``imagenet``, ``imagenet_blurred``, ``imagenet100``, ``imagenet100small``, ``core50``,
            ``candle``; ``folder`` for images in ``<root>/train/<class>/`` and ``<root>/test/<class>/`` (or ``val``);
            the class path of a continuum data set; or in Python ``(x_train, y_train, x_test, y_test)``, the same with
            task ids as third of each split, or two data sets, PyTorch's or continuum's, of training and of test.
        root: folder of the data sets, or of the images for ``folder``; symbolic links are followed.
        download: whether a missing data set may be fetched.
        scenario: ``class`` (classes arrive task by task), ``domain`` or ``instance`` (every task has all classes),
            ``blurry`` (as ``class``, but a share of each class leaks into the other tasks' training sets), ``none``
            (one task), ``given`` (by the data's task ids); the class path of a continuum scenario, or
            ``{class_path: ..., init_args: ...}``; in Python also two scenario objects with their data, one for training
            and one for test.
        blurriness: share of each class that leaks in a blurry scenario, in [0, 1); 0.1 if None.
        sample_order: how a domain scenario splits the samples of a class into tasks: ``in_order`` of the data, or
            ``shuffled`` by ``seed``.
        initial_increment: classes of the first task of a class scenario; ``increment`` if None.
        increment: classes of each further task, or a list with one number for each task.
        num_tasks: tasks of a domain or instance scenario; 5 if None.
        class_order: original labels in the order in which they arrive; ``random`` for an order by ``seed``, a number
            for an order by that seed; a published order of CIFAR-100, ``icarl_1993`` or ``icarl_list``; ascending if
            None.
        concatenate_tasksets: whether task t trains on the data of tasks 0..t.
        val_ratio: share of each class of each task that is held out of training for validation, in [0, 1).
        validate_on: what the fit is validated on, as often as the trainer says: ``held_out`` samples, or ``test``
            samples to watch their accuracy. If None, on hold-outs where there are any beside what is evaluated, on what
            is evaluated with ``select_on_test``, else not at all: no callback reads it, and each validation takes as
            long as the evaluation of a task's end.
        evaluate_on: what the accuracy matrix, the report, ``test`` and ``predict`` are of: the ``test`` samples, or in
            their place the ``held_out`` ones of ``val_ratio``, which are training samples of the data set.
        select_on_test: allow callbacks to select on the samples that the report is of: on test samples if nothing is
            held out, or on hold-outs with ``evaluate_on: held_out``.
        boundaries: whether agent and callbacks are notified of the start and end of each task (``known``), or nothing
            in training depends on them (``hidden``) and the optimizer is not reset. The report covers each task either
            way.
        sharding: whether samples are dealt to the workers anew each ``epoch``, or stay on one worker for the whole run
            (``fixed``), so that memories are disjoint.
        batch_size: training samples of a step and worker.
        passes: how many times in a row each training batch is trained on, as in online learning. Each pass has its own
            random crops and its own representatives; the memory gets the samples after the last one.
        eval_batch_size: evaluation samples of a step and worker; ``batch_size``, but at least 256, if None.
        num_workers: processes of each worker that read image files; 0 reads in the training process; if None, one for
            each of the worker's cores, at most 8. Data sets of arrays need none.
        augment: whether training images are cropped and mirrored; the data set's default if None.
        crop_fill: value of the pixels around an image that ``augment`` crops, in [0, 1], one number or one for each
            channel; ``mean`` for the mean that images are normalised with, which makes it 0 for the network; black,
            that is 0, if None.
        transform: transforms of your own of training images on the device, in place of these: ``class_path`` and
            ``init_args`` of one of ``torchvision.transforms.v2``, a list of them, or in Python any callables.
        eval_transform: likewise, of images in evaluation.
        normalize: what inputs are normalised with: the mean and deviation of the ``dataset`` (arrays have none);
            ``none``, so that images are floats in [0, 1]; or ``{mean: ..., std: ...}`` in units of [0, 1], each one
            number or one for each channel. If None, those that a pretrained network brings, else the data set's.
        stage_to: folder on the host's own disk to which each host copies the data set once, to read it from there.
        seed: seed of order, augmentation and hold-outs, the same on all workers; if None, the seed of
            ``seed_everything``, or 0.
        source_options: ``num_classes``, ``size``, ``per_class``, ``seed`` of ``synthetic``; of sets of image files
            ``size``, the side of an image, and ``num_classes`` if only a part of the set is there.

    Attributes:
        task_id: 0-based task of the latest training loader.
        options: arguments other than their defaults, as far as they are words, numbers and lists; no paths.
        network: what the network of the present run takes, see ``fit_inputs_to``; None for inputs as they are.
    """

    def __init__(
        self,
        dataset: str | tuple[Any, ...] = "digits",
        root: str = "datasets",
        download: bool = False,
        scenario: str | dict[str, Any] | tuple[Any, Any] = "class",
        initial_increment: int | None = None,
        increment: int | list[int] = 2,
        num_tasks: int | None = None,
        class_order: list[int] | list[str] | int | str | None = None,
        blurriness: float | None = None,
        sample_order: Literal["in_order", "shuffled"] = "in_order",
        concatenate_tasksets: bool = False,
        val_ratio: float = 0.0,
        evaluate_on: Literal["test", "held_out"] = "test",
        validate_on: Literal["held_out", "test"] | None = None,
        select_on_test: bool = False,
        boundaries: Literal["known", "hidden"] = "known",
        sharding: Literal["epoch", "fixed"] = "epoch",
        batch_size: int = 64,
        passes: int = 1,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        augment: bool | None = None,
        crop_fill: Literal["mean"] | float | list[float] | None = None,
        transform: dict[str, Any] | list[Any] | Callable[..., Any] | None = None,
        eval_transform: dict[str, Any] | list[Any] | Callable[..., Any] | None = None,
        normalize: Literal["dataset", "none"] | dict[str, float | list[float]] | None = None,
        stage_to: str | None = None,
        seed: int | None = None,
        source_options: dict[str, int] | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__()
        self.options = _options(given)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_tasks", num_tasks, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None:
                whole_number(f"data.{name}", value, least)
        whole_number("data.passes", passes, 1, _MOST_PASSES + 1)
        if not 0 <= val_ratio < 1:
            raise ConfigurationError(f"data.val_ratio={val_ratio}: give a share from 0 to below 1")
        words: dict[str, object] = {
            "boundaries": boundaries, "sharding": sharding, "sample_order": sample_order, "evaluate_on": evaluate_on,
            "validate_on": validate_on,
        }  # fmt: skip
        if not isinstance(normalize, Mapping):
            words["normalize"] = normalize
        check_words("data", get_type_hints(ContinualDataModule.__init__), words)
        for key, samples in (("evaluate_on", evaluate_on), ("validate_on", validate_on)):
            if samples == "held_out" and not val_ratio:
                raise ConfigurationError(
                    f"data.{key}=held_out with data.val_ratio=0: nothing is held out to {key.removesuffix('_on')} on; "
                    f"give data.val_ratio above 0, the share of each class, or data.{key}=test"
                )
        self.root, self.download, self.boundaries, self.sharding = absolute(root), download, boundaries, sharding
        self.concatenate_tasksets, self.select_on_test = concatenate_tasksets, select_on_test
        self.val_ratio, self.evaluate_on = val_ratio, evaluate_on
        self.validate_on: Literal["held_out", "test"] | None = validate_on
        if validate_on is None and ((evaluate_on == "test" and val_ratio > 0) or select_on_test):
            self.validate_on = "held_out" if val_ratio > 0 else "test"
        self.batch_size, self.passes = batch_size, passes
        self.eval_batch_size = eval_batch_size or max(batch_size, 256)
        self.seed = self._own_seed = seed_of_run(seed)
        self.num_workers, self._reader_pool = num_workers, ReaderPool(0)
        self.source_options = source_options or {}
        built = not isinstance(scenario, str) or "." in scenario  # by a scenario of continuum's kind
        self.scenario = scenario if isinstance(scenario, str) and not built else "given"
        self._task_split = TaskSplit(
            self.scenario, increment, initial_increment, num_tasks, class_order, blurriness, sample_order, scenario
        )
        self.dataset_name = dataset if isinstance(dataset, str) and isinstance(scenario, (str, dict)) else "arrays"
        sources.check_options(self.dataset_name, self.source_options)
        self._source = sources.SOURCES.get(self.dataset_name)
        self._splits = sources.from_arrays(dataset) if not isinstance(dataset, str) else None
        if stage_to is not None and self.dataset_name == "arrays":
            raise ConfigurationError(f"data.stage_to={stage_to} copies files: leave it out with data in memory")
        self.stage_to = None if stage_to is None else absolute(stage_to)
        self._read_root = self.root if stage_to is None else None  # the folder to read from, once it is known
        self._splits = self._early_splits(scenario if built else None)
        transformed = self._splits is not None and isinstance(self._splits.train_inputs, TransformedInputs)
        default = self._source is not None and self._source.augment and not transformed and transform is None
        self.augment = default if augment is None else augment
        if self.augment and transform is not None:
            raise ConfigurationError(
                "data.augment=true with data.transform: the first would crop and mirror, in whose place the second "
                "stands; leave data.augment out, and give what you want of it as a transform"
            )
        self.num_classes = self._count_classes()
        self._spec_as_read = self._spec_of_inputs()
        self._transforms = self._given_transforms(transform, eval_transform)
        self.network: NetworkInputs | None = None
        self._normalisation_is_given = normalize is not None
        self._normalisation = self._own_normalisation() if normalize in (None, "dataset") else None
        if isinstance(normalize, Mapping):
            self._normalisation = transforms.normalisation_of(normalize, self.input_spec.channels)
        elif self._normalisation is not None and len(self._normalisation[0]) not in (1, self.input_spec.channels):
            raise ConfigurationError(
                f"data.transform makes images of {self.input_spec.channels} channels, for which data set "
                f"'{self.dataset_name}' has no mean and deviation: give data.normalize"
            )
        self._fills_mean, self._own_fill = crop_fill == "mean", self._given_crop_fill(crop_fill)
        if self._read_root is None:
            self._splits = None  # of the source: training reads the copy
        self.num_tasks = self._count_tasks()
        self.task_id = 0
        self._tasks_seen = 0  # by a module that does not count them itself
        self.original_labels: list[Label] = []
        self._stream: Stream | None = None
        self._clock: Clock | None = None
        self._replay: ReplaySource | None = None
        self._train_loader: TaskLoader | None = None

    # -- known before the data are read ----------------------------------------------------------------------------

    def _early_splits(self, scenario: object) -> sources.Splits | None:
        """Read what only the data tell: the tasks of a continuum scenario, the classes of a folder or class path."""
        given = self._splits
        if scenario is not None:
            return splits_of_scenario(scenario, lambda: given or self._read())
        if given is not None:
            return given
        if self._source is None:
            return self._read()
        if self._source.num_classes is None:
            return sources.load(self.dataset_name, self.root, self.download, self.source_options)
        return None

    def _count_classes(self) -> int:
        if self._splits is not None:
            return len(np.unique(self._splits.train_labels))
        assert self._source is not None
        assert self._source.num_classes is not None
        return self.source_options.get("num_classes", self._source.num_classes)

    @property
    def input_spec(self) -> InputSpec:
        """Shape of one input, before it is made to fit a network that takes others."""
        transform = self._transforms[0]
        return self._spec_as_read if transform is None else InputSpec(*transform.shape)

    def fit_inputs_to(self, network: NetworkInputs | None) -> None:
        """Bring inputs from now on, after augmentation, to the size, channels and normalisation that a network takes.

        Args:
            network: what it takes of inputs of the shape ``input_spec``; None for inputs as they are.

        Raises:
            ConfigurationError: inputs have other channels, or there is no mean to fill crops with.
        """
        self.network = network
        if network is None:
            return
        channels, wanted = self.input_spec.channels, network.spec.channels
        if channels not in (1, wanted):
            raise ConfigurationError(
                f"data set '{self.dataset_name}' has images of {channels} channels, the network takes {wanted}: give a "
                "network without pretrained weights, or a data.transform to as many channels"
            )
        if self.normalisation is None:
            return
        numbers = len(self.normalisation[0])
        if numbers not in (1, wanted):
            raise ConfigurationError(
                f"the normalisation has {numbers} numbers, the network takes {wanted} channels: give data.normalize"
            )
        if self._fills_mean and numbers not in (1, channels):
            raise ConfigurationError(
                f"data.crop_fill=mean: the mean has {numbers} numbers, the images have {channels} channels: give a "
                "number from 0 to 1, or data.normalize"
            )

    def _spec_of_inputs(self) -> InputSpec:
        """Return the shape of one input as it is read."""
        if self._splits is not None and (self._source is None or self.scenario == "given"):
            return InputSpec(*self._splits.train_inputs.shape[1:])
        assert self._source is not None
        spec, size = self._source.input_spec, self.source_options.get("size")
        return spec if size is None else InputSpec(spec.channels, size, size)

    def _given_transforms(self, train: object, evaluation: object) -> tuple[GivenTransforms | None, ...]:
        """Return the transforms of training and of evaluation.

        Raises:
            ConfigurationError: their results differ in shape from each other, or do not fit the normalisation.
        """
        made = tuple(
            None if given is None else GivenTransforms(given, self._spec_as_read, key)
            for given, key in ((train, "data.transform"), (evaluation, "data.eval_transform"))
        )
        shapes = [tuple(self._spec_as_read) if one is None else one.shape for one in made]
        if shapes[0] != shapes[1]:
            raise ConfigurationError(
                f"images have the shape {shapes[0]} in training and {shapes[1]} in evaluation: give data.transform and "
                "data.eval_transform with results of one shape"
            )
        return made

    @property
    def normalisation(self) -> Normalisation | None:
        """Mean and deviation of each channel that normalise images; None for data that are not normalised."""
        if self.network is None or self.network.normalisation is None or self._normalisation_is_given:
            return self._normalisation
        return self.network.normalisation

    @property
    def augments(self) -> bool:
        """Whether training sees images in another way than evaluation: by ``augment`` or by ``transform``."""
        return self.augment or self._transforms[0] is not None

    def _own_normalisation(self) -> Normalisation | None:
        return None if self._source is None else (self._source.mean, self._source.std)

    @property
    def _pad(self) -> int:
        """Pixels around an image that is cropped on the device; 0 if none is."""
        return (4 if self._source is None else self._source.pad) if self.augment else 0

    @property
    def _crop_fill(self) -> tuple[float, ...]:
        """Value of the pixels around an image that is cropped, one number or one for each channel."""
        return self.normalisation[0] if self._fills_mean and self.normalisation is not None else self._own_fill

    def _given_crop_fill(self, given: str | float | list[float] | None) -> tuple[float, ...]:
        """Return the value of these pixels, one number or one for each channel.

        Raises:
            ConfigurationError: none are added, or no such value.
        """
        if given is None:
            return (0.0,)
        if not self.augment:
            raise ConfigurationError(
                f"data.crop_fill={given}: no image is padded without data.augment; give data.augment=true, or leave "
                "data.crop_fill out"
            )
        if not self._pad:
            raise ConfigurationError(
                f"data.crop_fill={given}: images of data set '{self.dataset_name}' are augmented without padding; "
                "leave data.crop_fill out"
            )
        if given != "mean":
            if isinstance(given, str):
                raise ConfigurationError(f"data.crop_fill={given!r}: give mean, or numbers from 0 to 1")
            return transforms.crop_fill_of(given, self.input_spec.channels)
        if self._normalisation is None:
            raise ConfigurationError(
                "data.crop_fill=mean: images are not normalised, so that there is no mean; give a number from 0 to 1, "
                "or data.normalize"
            )
        return self._normalisation[0]

    def _count_tasks(self) -> int:
        if self.scenario == "given":
            if self._splits is None or self._splits.train_tasks is None or self._splits.test_tasks is None:
                raise ConfigurationError(
                    f"data.scenario=given: data set '{self.dataset_name}' brings no tasks: give another scenario"
                )
            return count_tasks(self._splits.train_tasks, self._splits.test_tasks)
        return len(self._task_split.home_classes(self.num_classes))

    # -- set-up ----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetch, stage and cache the data set as far as asked to; refuse a missing one before anything is created.

        Lightning calls this in one process of each host.
        """
        if self._splits is not None or self._stream is not None:
            return
        sources.check_files(self.dataset_name, self.root, self.download)
        self._staged_root(compare=True)
        if self.download or sources.SOURCES[self.dataset_name].cached:
            self._splits = self._read()  # ``setup`` of this process takes them over

    def _read(self) -> sources.Splits:
        """Fetch the data set and stage it if asked to, and read it."""
        root = self._staged_root(compare=True)
        return sources.load(self.dataset_name, root, self.download and root == self.root, self.source_options)

    def _staged_root(self, compare: bool) -> str:
        """Return the root to read from: with ``stage_to`` the copy's, which is made if missing."""
        if self._read_root is None:
            assert self.stage_to is not None
            if compare and self.download:
                sources.load(self.dataset_name, self.root, True, self.source_options)
            self._read_root = sources.stage(self.dataset_name, self.root, self.stage_to, compare)
        return self._read_root

    def setup(self, stage: str | None = None) -> None:
        """Read the data and split them into tasks, once."""
        self._reader_pool.num_workers = self._count_readers()
        if self._stream is not None:
            if stage == "fit":  # an earlier fit may have been resumed from a run with another seed
                self._take_seed(self._own_seed)
            return
        splits = self._splits or sources.load(
            self.dataset_name, self._staged_root(compare=self.trainer is None), False, self.source_options
        )
        if self._source is not None:
            found = len(np.unique(splits.train_labels))
            self._source.check_count(self.dataset_name, self.root, found, self.num_classes)
        self._stream = Stream(self._task_split, splits, self.val_ratio, self.seed, self.evaluate_on)
        self.original_labels = self._stream.labels
        self.train_targets, self.test_targets = self._stream.train_targets, self._stream.test_targets
        self.train_inputs, self.test_inputs = splits.train_inputs, splits.test_inputs
        for inputs in (self.train_inputs, self.test_inputs):
            if isinstance(inputs, ImageFiles):
                inputs.reader_pool = self._reader_pool
        self._splits = None

    @property
    def stream(self) -> Stream:
        """The task of each sample; available after ``setup``."""
        assert self._stream is not None
        return self._stream

    def _count_readers(self) -> int:
        if multiprocessing.current_process().daemon:
            if self.num_workers:
                rank_zero_warn(f"data.num_workers={self.num_workers}: a daemonic process reads images itself")
            return 0
        if self.num_workers is not None:
            return self.num_workers
        local_size = max(ranks.local_size(), self.trainer.num_devices if self.trainer else 1)
        return min(worker_threads(local_size), 8)

    # -- during a fit ----------------------------------------------------------------------------------------------

    @property
    def clock(self) -> Clock | None:
        """Tells the task of an epoch; None outside a fit."""
        return self._clock

    def attach_clock(self, clock: Clock | None) -> None:
        """Let a clock tell the task of each epoch until the fit ends; None detaches it."""
        self._clock = clock
        if clock is not None:
            self.task_id = clock.task_at(0)

    def attach_replay(self, replay: ReplaySource) -> None:
        """Let an agent or a callback add to the training batches, until the fit ends.

        Args:
            replay: asked whenever a training loader is made.

        Raises:
            ConfigurationError: another one adds to them already.
        """
        if self._replay is not None and self._replay is not replay:
            raise ConfigurationError(
                f"{type(self._replay).__name__} and {type(replay).__name__} both add to the data module's batches: "
                "leave one of them out, or give rehearsal.prefetch=device"
            )
        self._replay = replay

    def detach_replay(self) -> None:
        """Train on each task's own samples alone."""
        self._replay = None

    @property
    def replays_in_task(self) -> bool:
        """Whether samples of earlier tasks are part of the present task's training set."""
        replay = self._replay
        return replay is not None and replay.replayed_per_batch is None and len(replay.replayed_ids(self.task_id)) > 0

    def _leave_fit(self) -> None:
        self._clock = self._replay = self._train_loader = self.network = None
        self._reader_pool.close()

    def tasks(self, epochs: list[int]) -> list[Task]:
        """Return the description of each task, given its number of epochs."""
        self.setup()
        return self.stream.tasks(epochs)

    def train_indices(self, task: int) -> Tensor:
        """Return the sample ids ``(k,)`` int64 of a task's own training samples without its hold-outs."""
        return self.stream.train_indices(task)

    # -- loaders ---------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TaskLoader | PrefetchLoader:
        """Return the training loader, always the same one, set to the current epoch and its task."""
        if self.trainer is not None and self.trainer.training and self._clock is None and self.num_tasks > 1:
            raise ConfigurationError(
                f"{self.num_tasks} tasks and no callback that goes from one to the next: give the trainer "
                "callbacks=[TaskClock(epochs_per_task=...)], or the data module scenario='none'"
            )
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        self.task_id = self._clock.task_at(epoch) if self._clock is not None else self.task_id
        self._tasks_seen = self.task_id + 1
        first = 0 if self.concatenate_tasksets else self.task_id
        own = torch.cat([self.train_indices(t) for t in range(first, self.task_id + 1)])
        replay = self._replay
        extra = own[:0] if replay is None else replay.replayed_ids(self.task_id)
        extra = extra[~torch.isin(extra, own)]
        per_batch = None if replay is None else replay.replayed_per_batch
        indices = torch.cat([own, extra]) if per_batch is None else own
        rank, size = self._place()
        if self._train_loader is None:
            parts = self.stream.train_parts
            parts = parts if self.boundaries == "known" else torch.full_like(parts, -1)
            self._train_loader = TaskLoader(
                self.train_inputs, self.train_targets, parts, self.batch_size, indices, rank, size,
                train=True, seed=self.seed,
            )  # fmt: skip
        # Another trainer, or Lightning's search for a batch size, may have changed these.
        self._train_loader.rank, self._train_loader.size = rank, size
        self._train_loader.owners = self.owners(size)
        self._train_loader.batch_size, self._train_loader.passes = self.batch_size, self.passes
        self._train_loader.augment = self.augment
        self._train_loader.pin_memory = self._on_gpu()
        self._train_loader.visit(indices, epoch, extra, per_batch or 0)
        # A scenario's transformations use the generator of the training step, so no thread may run them.
        ahead = replay is not None and replay.loads_ahead and not isinstance(self.train_inputs, TransformedInputs)
        return PrefetchLoader(self._train_loader) if ahead else self._train_loader

    def batch_without_rows(self) -> Batch:
        """Return an empty training batch with the loader's columns, dtypes and shapes."""
        none = torch.empty(0, dtype=torch.int64)
        inputs = torch.empty((0, *self.train_inputs.shape[1:]), dtype=self.train_inputs.dtype)
        return Batch(inputs, none, none, none, torch.empty(0), torch.zeros(()), none, 0)

    def read_samples(self, ids: Tensor, epochs: Tensor) -> Tensor:
        """Return the inputs of training samples as the loader gave them in earlier epochs, in the last pass over them.

        Args:
            ids: ``(n,)`` int64 sample ids.
            epochs: ``(n,)`` int64, the epoch of each sample's random crop; ``AS_EVALUATED`` for no random crop.

        Raises:
            ConfigurationError: transformations of a scenario cannot be repeated.
            DataError: an image cannot be read; the message names its file.
        """
        source = self.train_inputs
        if isinstance(source, TransformedInputs):
            raise ConfigurationError(
                "rehearsal.row_format=index reads samples again, which transforms of a scenario or of a PyTorch data "
                "set may change: give row_format=inputs"
            )
        if isinstance(source, ImageFiles):
            epochs = epochs if self.augment else torch.full_like(ids, AS_EVALUATED)
            # The memory takes samples in the last pass over them.
            inputs = source.read(ids, epochs, self.seed, draw_ids_of(ids, self.passes - 1))
        else:
            inputs = source[ids]
        return inputs.pin_memory() if self._on_gpu() else inputs

    def val_dataloader(self) -> list[TaskLoader]:
        """Return a loader for each task so far: its hold-outs, or its test set; none in a fit without ``validate_on``.

        Outside a fit they are of the tasks that the module was trained on, or of all tasks if their number is unknown,
        and without ``validate_on`` of the hold-outs if there are any.
        """
        if self._fits and self.validate_on is None:
            return []
        last = self._last_seen_task()
        if self.validated_on == "test":
            rows = [self.stream.test_indices(t) for t in range(last + 1)]
            return for_all([self._test_loader(indices) for indices in rows])
        held = [self.stream.held_indices(t) for t in range(last + 1)]
        return for_all([self.train_eval_loader(indices) for indices in held])

    @property
    def validated_on(self) -> Literal["held_out", "test"]:
        """What ``validate`` is of."""
        return "test" if self.validate_on == "test" or self.val_ratio == 0 else "held_out"

    @property
    def _fits(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def _last_seen_task(self) -> int:
        if self.trainer is None or self._fits:
            return self.task_id
        seen = getattr(self.trainer.lightning_module, "tasks_seen", self._tasks_seen)
        return min(seen or self.num_tasks, self.num_tasks) - 1

    def test_dataloader(self) -> list[TaskLoader]:
        """Return a loader for each task's test set, or for its hold-outs with ``evaluate_on: held_out``."""
        if self.evaluate_on == "held_out":
            rank_zero_info("data.evaluate_on=held_out: of held-out training samples, not of the test set")
        return for_all(self.test_loaders(self.num_tasks - 1))

    def predict_dataloader(self) -> list[TaskLoader]:
        """Return the loaders of ``test_dataloader``."""
        return self.test_dataloader()

    def test_loaders(self, last_task: int) -> list[TaskLoader]:
        """Return loaders of what tasks 0..last_task are tested on, see ``evaluate_on``, each sample on one worker."""
        rows = [self.stream.tested_indices(task) for task in range(last_task + 1)]
        made = self.train_eval_loader if self.evaluate_on == "held_out" else self._test_loader
        return [made(indices) for indices in rows]

    def _test_loader(self, indices: Tensor) -> TaskLoader:
        return self._eval_loader(self.test_inputs, self.stream.test_targets, self.stream.test_parts, indices)

    def train_eval_loader(self, indices: Tensor) -> TaskLoader:
        """Return a loader of training samples as evaluation sees them, each on exactly one worker.

        Args:
            indices: ``(k,)`` int64 sample ids.
        """
        loader = self._eval_loader(self.train_inputs, self.train_targets, self.stream.train_parts, indices)
        loader.owners = self.owners(loader.size)
        return loader

    def owners(self, size: int) -> Tensor | None:
        """Return the worker ``(n,)`` int64 that owns each training sample; None unless sharding is fixed."""
        return self.stream.owners(size, self.seed) if self.sharding == "fixed" and size > 1 else None

    def _eval_loader(self, inputs: Inputs, targets: Tensor, parts: Tensor, indices: Tensor) -> TaskLoader:
        rank, size = self._place()
        loader = TaskLoader(inputs, targets, parts, self.eval_batch_size, indices, rank, size)
        loader.pin_memory = self._on_gpu()
        return loader

    def teardown(self, stage: str) -> None:
        """Drop what belonged to a fit, and end the processes that read images."""
        self._leave_fit()

    def on_exception(self, exception: BaseException) -> None:
        """Drop what belonged to a fit that failed."""
        self._leave_fit()

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    # -- checkpoint ------------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Return the seed, the number of tasks seen, and what must not change when the run is resumed."""
        return {"seed": self.seed, "stream": self.facts(), "tasks_seen": self._tasks_seen}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the run's seed, and refuse another stream than the run's.

        Evaluation may use another data set with the same classes in the same order, but no other hold-outs of the
        same: the run was trained on these.

        Raises:
            ConfigurationError: data set, scenario, class order, tasks, hold-outs, normalisation, transforms, passes or
                what is evaluated differ; the message names both.
        """
        fits, present = self._fits, self.facts()
        # A checkpoint that was saved before an option existed is of a run with its default.
        defaults: dict[str, object] = {"transform": None, "eval_transform": None, "crop_fill": [0.0]}
        defaults |= {"normalisation": _listed(self._own_normalisation()), "evaluate_on": "test", "passes": 1}
        defaults |= {"resized": None}
        saved = {**defaults, **state_dict["stream"]}
        same_data = saved["dataset"] == present["dataset"]
        names: tuple[str, ...] = ("class_order",)
        if fits:
            names = tuple(saved)
        elif same_data and self.evaluate_on == "held_out":
            names = ("class_order", "scenario", "classes of the tasks", "val_ratio")
        refuse_another_stream({name: saved[name] for name in names}, present)
        if not fits and same_data and saved["normalisation"] != present["normalisation"]:
            rank_zero_warn(
                f"the network was trained with normalisation {saved['normalisation']} (mean, std) and is evaluated "
                f"with {present['normalisation']}: give the data.normalize that the run was started with"
            )
        self._tasks_seen = state_dict.get("tasks_seen", 0)
        self._take_seed(state_dict["seed"])

    def facts(self) -> dict[str, object]:
        """Return what must not change when a run is resumed, by name, in plain types."""
        return {
            **self.stream.facts(self.dataset_name),
            "concatenate_tasksets": self.concatenate_tasksets,
            "normalisation": _listed(self.normalisation),
            "resized": self.network and [*self.network.spec, self.network.interpolation],
            "evaluate_on": self.evaluate_on,
            "passes": self.passes,
            "crop_fill": list(self._crop_fill),
            "transform": None if self._transforms[0] is None else self._transforms[0].text,
            "eval_transform": None if self._transforms[1] is None else self._transforms[1].text,
        }

    def _take_seed(self, seed: int) -> None:
        if seed != self.seed:
            self.seed = seed
            self.stream.draw(seed)
            self._train_loader = None

    # -- on the device ---------------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch to the device, unless that is the CPU."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Convert a batch to float and normalise it; augment it in training."""
        assert self.trainer is not None
        return self.prepare_batch(batch, train=bool(self.trainer.training), epoch=self.trainer.current_epoch)

    def prepare_batch(self, batch: Batch, train: bool, epoch: int) -> Batch:
        """Return the batch with inputs as the network takes them, on the batch's device.

        In training of a module whose attribute ``two_views`` is true, it also has ``plain`` inputs.

        Args:
            batch: as a loader yields it.
            train: whether to augment.
            epoch: epoch of the whole stream, which keys the draws.
        """
        if train and self.trainer is not None and getattr(self.trainer.lightning_module, "two_views", False):
            batch = batch._replace(plain=self.prepare_batch(batch, train=False, epoch=epoch).inputs)
        inputs, transform = batch.inputs, self._transforms[0 if train else 1]
        if transform is not None:
            key = (self.seed, epoch) if train else (0, 0)  # in evaluation each sample has the same draws each time
            inputs = transform(inputs, batch.draw_ids, *key)
        elif train and self.augment:
            inputs = transforms.augment(inputs, batch.draw_ids, self.seed, epoch, self._pad, self._crop_fill)
        inputs = transforms.as_network_takes(inputs, self.network, self.normalisation)
        if self.trainer is not None:  # Lightning converts batches before these are floats
            inputs = self.trainer.precision_plugin.convert_input(inputs)
            if inputs.ndim == 4 and getattr(self.trainer.lightning_module, "takes_channels_last", False):
                inputs = inputs.contiguous(memory_format=torch.channels_last)
        return batch._replace(inputs=inputs)


def _listed(normalisation: Normalisation | None) -> list[list[float]] | None:
    return None if normalisation is None else [list(values) for values in normalisation]


def _options(given: Mapping[str, object]) -> StateDict:
    """Return those of the constructor's arguments that the attribute ``options`` has."""
    defaults = {name: p.default for name, p in inspect.signature(ContinualDataModule).parameters.items()}
    plain = {name: given[name] for name in defaults if name not in _PLACES and _is_plain(given[name])}
    return {name: value for name, value in plain.items() if value != defaults[name]}


def _is_plain(value: object) -> bool:
    return isinstance(value, str | bool | int | float) or (isinstance(value, list) and all(map(_is_plain, value)))
