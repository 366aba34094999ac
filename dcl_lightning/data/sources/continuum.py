"""Data sets and scenarios of continuum's kind, given by class path or as objects."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from dcl_lightning.data.class_paths import class_and_options, imported
from dcl_lightning.data.scenarios import encode
from dcl_lightning.data.sources.arrays import Splits, check_labels, from_arrays, read_dataset
from dcl_lightning.data.transforms import TransformedInputs
from dcl_lightning.errors import ConfigurationError, DataError, DatasetNotFoundError, suggestion

__all__ = ["load_class", "splits_of_scenario"]

Scenario: TypeAlias = Any  # of continuum, which has no types
_ALLOWED = "class, domain, instance, blurry, none, given, or class_path and init_args of a continuum scenario"


def load_class(name: str, root: str, download: bool, known: Collection[str]) -> Splits:
    """Read both splits of a data set class, which takes ``(path, train, download)`` and has ``get_data()``.

    ``known`` are the data sets that need no class path, for messages.

    Raises:
        ConfigurationError: no such class, or a class of another kind.
        DatasetNotFoundError: no such folder, and ``download`` is false.
        DataError: the data cannot be read.
    """
    module, _, attribute = name.rpartition(".")
    names = ", ".join(sorted(known))
    if not module:
        raise ConfigurationError(
            f"data.dataset={name!r}: give one of {names}, or a continuum data set's class path{suggestion(name, known)}"
        )
    cls = imported(name, "data.dataset")
    if not isinstance(cls, type) or not hasattr(cls, "get_data"):
        instead = f"data.dataset={attribute.lower()}" if attribute.lower() in known else f"one of {names}"
        raise ConfigurationError(
            f"data.dataset={name!r} is no data set of continuum's kind, a class that takes (path, train, download) and "
            f"has get_data(): give {instead}, or in Python (x_train, y_train, x_test, y_test)"
        )
    try:
        inspect.signature(cls).bind(root, train=True, download=download)
    except TypeError as error:
        raise ConfigurationError(
            f"data.dataset={name!r} is no class that takes (path, train, download), as continuum's do: {error}"
        ) from error
    if not download and not os.path.isdir(root):
        # continuum would create the folder before it finds no files.
        remedy = "give their data.root, or --data.download true (in Python download=True)"
        raise DatasetNotFoundError(name, os.path.abspath(root), "the files of that data set", remedy)
    arrays: list[Any] = []
    for train in (True, False):
        try:
            split = cls(root, train=train, download=download)
        except Exception as error:  # of any type
            raise DataError(f"data set '{name}' in {os.path.abspath(root)} cannot be read: {error}") from error
        arrays += read_dataset(split, name)
    return from_arrays(arrays, where=f"data set '{name}': ")


def splits_of_scenario(scenario: object, read: Callable[[], Splits]) -> Splits:
    """Return both splits as a scenario makes them, with the task of each sample.

    Args:
        scenario: class path of a scenario, ``{"class_path": ..., "init_args": {...}}``, or a pair of scenario objects,
            of training and of test.
        read: returns the data set for a scenario given by class path.

    Raises:
        ConfigurationError: no such scenario, one that fits neither the data nor this package, or a task without
            training samples.
        DataError: labels or inputs that cannot be used.
    """
    labels: list[Any] = []
    if isinstance(scenario, (str, Mapping)):
        train, test, labels = _built({"class_path": scenario} if isinstance(scenario, str) else scenario, read())
    elif isinstance(scenario, (tuple, list)) and len(scenario) == 2:
        train, test = scenario
    else:
        raise ConfigurationError(f"data.scenario: give two scenario objects, of training and of test, not {scenario}")
    name = type(train).__name__
    for one in (train, test):
        _check_kind(type(one))
        if getattr(one, "_nb_tasks", None) is None or not hasattr(one, "dataset"):
            raise ConfigurationError(f"data.scenario: {name} has no tasks before it is trained on: it cannot be used")
    if len(train) != len(test):
        raise ConfigurationError(f"data.scenario: {name} makes {len(train)} tasks of training and {len(test)} of test")
    x, y, t, counted = _split(train, labels, "training")
    x_test, y_test, t_test, counted_test = _split(test, labels, "test")
    if counted != counted_test:
        raise DataError(
            f"data.scenario: {name} numbers labels from the {counted} classes of training and the {counted_test} of "
            "test, so that they mean different ones: give data with the same classes, or shared_label_space=true"
        )
    found = np.unique(t).tolist()
    if found != list(range(len(train))):
        raise ConfigurationError(
            f"data.scenario: {name} has training samples in tasks {found}, expected 0 to {len(train) - 1}: number "
            "tasks from 0 without gaps, and give each samples"
        )
    return Splits(x, y, x_test, y_test, t, t_test)


def _built(spec: Mapping[str, Any], splits: Splits) -> tuple[Scenario, Scenario, list[Any]]:
    """Return the scenarios of both splits, and the label that each of their 0..K-1 stands for."""
    cls, options = class_and_options(spec, "data.scenario", _ALLOWED)
    _check_kind(cls)
    labels = [label.item() for label in np.unique(splits.train_labels)]
    train, test = (
        _scenario(cls, options, part, x, encode(y, labels), t)
        for part, x, y, t in (
            ("training", splits.train_inputs, splits.train_labels, splits.train_tasks),
            ("test", splits.test_inputs, splits.test_labels, splits.test_tasks),
        )
    )
    return train, test, labels


def _scenario(cls: Any, options: dict[str, Any], part: str, x: object, y: np.ndarray, t: np.ndarray | None) -> Scenario:
    from continuum.datasets import InMemoryDataset
    from continuum.tasks import TaskType

    if not isinstance(x, torch.Tensor):
        raise ConfigurationError(f"data.scenario: {cls.__name__} needs a data set of arrays, not of image files")
    if t is not None and np.unique(t).tolist() != list(range(len(np.unique(t)))):
        raise ConfigurationError(
            f"data.dataset: task ids of the {part} split are {np.unique(t).tolist()}: number them from 0 without gaps"
        )
    kind = TaskType.TENSOR
    if x.dtype == torch.uint8:
        kind = TaskType.IMAGE_ARRAY
        if x.shape[1] in (1, 3):
            x = x.permute(0, 2, 3, 1)
            x = x.squeeze(3) if x.shape[3] == 1 else x
    data = InMemoryDataset(x.contiguous().numpy(), y, t, kind, part != "test")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # on which continuum's assertions explain themselves
            return cls(data, **options)
    except AssertionError as error:
        raise ConfigurationError(
            f"data.scenario: {cls.__name__} takes its tasks from the data set's task ids, which the {part} split "
            "lacks: give data that have them, or another scenario"
        ) from error
    except Exception as error:  # continuum raises plain ``Exception``
        raise ConfigurationError(f"data.scenario: {cls.__name__} refuses {options or 'no options'}: {error}") from error


def _check_kind(cls: object) -> None:
    from continuum.scenarios import SegmentationClassIncremental, _BaseScenario

    if not isinstance(cls, type) or not issubclass(cls, _BaseScenario):
        name = cls.__name__ if isinstance(cls, type) else cls
        raise ConfigurationError(f"data.scenario: {name} is no scenario of continuum's kind")
    if issubclass(cls, SegmentationClassIncremental):
        raise ConfigurationError(f"data.scenario: {cls.__name__} is of segmentation, not of classification")
    if cls.__name__ == "ClassIncremental":  # which mishandles missing classes, gaps and sizes that do not divide
        raise ConfigurationError(
            "data.scenario: for ClassIncremental give data.scenario=class with data.increment and data.class_order"
        )


def _split(
    scenario: Scenario, labels: list[Any], part: str
) -> tuple[torch.Tensor | TransformedInputs, np.ndarray, np.ndarray, int]:
    """Return inputs, labels and tasks of all samples, and by how many labels go up from task to task (0: they do not).

    ``labels`` are those that the scenario's 0..K-1 stand for, empty if its labels are the data's own.
    """
    from continuum.scenarios import TransformationIncremental
    from continuum.tasks import TaskType

    name, kind = type(scenario).__name__, scenario.cl_dataset.data_type
    if kind not in (TaskType.IMAGE_ARRAY, TaskType.TENSOR):
        raise ConfigurationError(f"data.scenario: {name} has data of type {kind.name}: give arrays")
    x, y, t = scenario.dataset
    y = check_labels(y, f"{part} labels")
    base = from_arrays((x, y, x[:0], y[:0])).train_inputs  # checks shape and type
    assert isinstance(base, torch.Tensor)
    if kind == TaskType.IMAGE_ARRAY and base.dtype != torch.uint8:
        raise DataError(f"data.scenario: images of {name} are not uint8 from 0 to 255: continuum would turn them black")
    count, counted = len(scenario), 0
    if isinstance(scenario, TransformationIncremental):
        rows, tasks = np.tile(np.arange(len(y)), count), np.repeat(np.arange(count), len(y))
        if not scenario.shared_label_space:
            counted = int(scenario.num_classes_per_task)
            if y.max(initial=0) >= counted:
                raise DataError(
                    f"data.scenario: {name} counts {counted} classes a task, but labels reach {y.max()}: number the "
                    "classes from 0 without gaps, or give shared_label_space=true"
                )
        y = y[rows] + counted * tasks
        chains = [list(scenario.get_task_transformation(task).transforms) for task in range(count)]
    else:
        rows, tasks = np.arange(len(y)), np.asarray(t)
        if tasks.ndim != 1 or (tasks != np.floor(tasks)).any():
            raise ConfigurationError(f"data.scenario: {name} gives no task number for each sample")
        tasks = tasks.astype(np.int64)
        given = scenario.trsf if isinstance(scenario.trsf, list) else [scenario.trsf] * count
        chains = [list(chain.transforms) for chain in given]
    if labels and not counted:
        y = np.array([labels[place] for place in y.tolist()])
    chains = [_without_to_tensor(chain, kind == TaskType.TENSOR) for chain in chains]
    if not any(chains):
        return base[torch.from_numpy(rows)], y, tasks, counted
    return TransformedInputs(base, torch.from_numpy(rows), torch.from_numpy(tasks), chains), y, tasks, counted


def _without_to_tensor(chain: list[Any], everywhere: bool) -> list[Any]:
    """Leave out ``ToTensor`` where it changes nothing: alone, or if samples are tensors already."""
    from torchvision.transforms import ToTensor

    left = [step for step in chain if not isinstance(step, ToTensor)]
    return left if everywhere or not left else chain
