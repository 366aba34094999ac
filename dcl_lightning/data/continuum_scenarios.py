"""Tasks from scenarios of continuum, given by class path or as objects."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from dcl_lightning.data.scenarios import check_labels
from dcl_lightning.data.sources.arrays import Splits, from_arrays
from dcl_lightning.data.sources.continuum import imported
from dcl_lightning.data.transforms import TransformedInputs
from dcl_lightning.errors import ConfigurationError, DataError

__all__ = ["splits_of_scenario"]

# Ours cut exactly where continuum's goes wrong: missing classes, gaps in the labels, sizes that do not divide.
_OURS = {"ClassIncremental": "data.scenario=class with data.increment and data.class_order"}


def splits_of_scenario(scenario: Any, read: Callable[[], Splits]) -> Splits:
    """Return both splits as a scenario makes them, with the task of each sample.

    Args:
        scenario: class path of a scenario, ``{"class_path": ..., "init_args": {...}}``, or a pair of scenario objects,
            of training and of test.
        read: returns the data set, where ``scenario`` brings none.

    Raises:
        ConfigurationError: no such scenario, one that fits neither these data nor this package, or a task without
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
    parts = [_split(train, labels, "training"), _split(test, labels, "test")]
    if parts[0][3] != parts[1][3]:
        raise DataError(
            f"data.scenario: {name} numbers labels from the {parts[0][3]} classes of training and the {parts[1][3]} of "
            "test, so that they mean different ones: give data with the same classes, or shared_label_space=true"
        )
    (x, y, t, _), (x_test, y_test, t_test, _) = parts
    found = np.unique(t).tolist()
    if found != list(range(len(train))):
        raise ConfigurationError(
            f"data.scenario: {name} has training samples in tasks {found}, expected 0 to {len(train) - 1}: number "
            "tasks from 0 without gaps, and give each samples"
        )
    return Splits(x, y, x_test, y_test, t, t_test)


def _built(spec: Mapping[str, Any], splits: Splits) -> tuple[Any, Any, list[Any]]:
    """Return the scenarios of both splits, and the labels that their 0..K-1 stand for."""
    from continuum.datasets import InMemoryDataset
    from continuum.tasks import TaskType

    cls, options = _imported(spec)
    _check_kind(cls)
    if not (isinstance(splits.train_inputs, torch.Tensor) and isinstance(splits.test_inputs, torch.Tensor)):
        raise ConfigurationError(f"data.scenario: {cls.__name__} needs a data set of arrays, not of image files")
    labels = [label.item() for label in np.unique(splits.train_labels)]
    places = {label: place for place, label in enumerate(labels)}
    scenarios = []
    for part, x, y, t in (
        ("training", splits.train_inputs, splits.train_labels, splits.train_tasks),
        ("test", splits.test_inputs, splits.test_labels, splits.test_tasks),
    ):
        unknown = sorted({label.item() for label in np.unique(y)} - set(places))
        if unknown:
            raise DataError(f"the {part} split has labels that training lacks: {unknown}")
        if t is not None and np.unique(t).tolist() != list(range(len(np.unique(t)))):
            raise ConfigurationError(
                f"data.dataset: task ids of the {part} split are {np.unique(t).tolist()}: number them from 0 without "
                "gaps"
            )
        images = x.dtype == torch.uint8
        array = x.permute(0, 2, 3, 1).squeeze(3) if images and x.shape[1] == 1 else x
        array = x.permute(0, 2, 3, 1) if images and x.shape[1] == 3 else array
        dense = np.array([places[label.item()] for label in y], dtype=np.int64)
        data = InMemoryDataset(
            array.contiguous().numpy(), dense, t, TaskType.IMAGE_ARRAY if images else TaskType.TENSOR, part != "test"
        )
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # where continuum's assertions say what is wrong
                scenarios.append(cls(data, **options))
        except AssertionError as error:
            raise ConfigurationError(
                f"data.scenario: {cls.__name__} takes its tasks from the data set's task ids, which the {part} split "
                "lacks: give data that have them, or another scenario"
            ) from error
        except Exception as error:
            # continuum raises plain ``Exception`` for what does not fit.
            raise ConfigurationError(f"data.scenario: {cls.__name__} refuses {options or 'no options'}: {error}") from (
                error
            )
    return scenarios[0], scenarios[1], labels


def _imported(spec: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the class and its options, of which those with a ``class_path`` are made."""
    path = spec.get("class_path")
    unknown = sorted(set(spec) - {"class_path", "init_args"})
    if not isinstance(path, str) or "." not in path or unknown:
        raise ConfigurationError(
            f"data.scenario={dict(spec)}: give class, domain, instance, blurry, none, given, or class_path and "
            "init_args of a continuum scenario"
        )
    return imported(path, "data.scenario"), {
        name: _made(value) for name, value in (spec.get("init_args") or {}).items()
    }


def _made(value: Any) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        cls, options = _imported(value)
        return cls(**options)
    return [_made(one) for one in value] if isinstance(value, list) else value


def _check_kind(cls: Any) -> None:
    from continuum.scenarios import SegmentationClassIncremental, _BaseScenario

    if not isinstance(cls, type) or not issubclass(cls, _BaseScenario):
        raise ConfigurationError(f"data.scenario: {getattr(cls, '__name__', cls)} is no scenario of continuum's kind")
    if issubclass(cls, SegmentationClassIncremental):
        raise ConfigurationError(f"data.scenario: {cls.__name__} is of segmentation, not of classification")
    if cls.__name__ in _OURS:
        raise ConfigurationError(f"data.scenario: give {_OURS[cls.__name__]} instead of {cls.__name__}")


def _split(scenario: Any, labels: list[Any], part: str) -> tuple[Any, np.ndarray, np.ndarray, int]:
    """Return inputs, labels and tasks of all samples of all tasks, and what labels of a task are counted by, or 0."""
    from continuum.scenarios import TransformationIncremental
    from continuum.tasks import TaskType

    name, kind = type(scenario).__name__, scenario.cl_dataset.data_type
    if kind not in (TaskType.IMAGE_ARRAY, TaskType.TENSOR):
        raise ConfigurationError(f"data.scenario: {name} has data of type {kind.name}: give arrays")
    x, y, t = scenario.dataset
    y = check_labels(y, f"{part} labels")
    # Shapes and types are checked as those of any arrays.
    base = from_arrays((x, y, x[:0], y[:0])).train_inputs
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
        rows, tasks = np.arange(len(y)), _whole_tasks(t, name)
        given = scenario.trsf if isinstance(scenario.trsf, list) else [scenario.trsf] * count
        chains = [list(chain.transforms) for chain in given]
    if labels and not counted:
        y = np.array([labels[place] for place in y.tolist()])
    chains = [_without_to_tensor(chain, kind == TaskType.TENSOR) for chain in chains]
    if not any(chains):
        return base[torch.from_numpy(rows)], y, tasks, counted
    return TransformedInputs(base, torch.from_numpy(rows), torch.from_numpy(tasks), chains), y, tasks, counted


def _whole_tasks(t: Any, name: str) -> np.ndarray:
    tasks = np.asarray(t)
    if tasks.ndim != 1 or (tasks != np.floor(tasks)).any():
        raise ConfigurationError(f"data.scenario: {name} gives no task number for each sample")
    return tasks.astype(np.int64)


def _without_to_tensor(chain: list[Any], everywhere: bool) -> list[Any]:
    """Leave out ``ToTensor`` where it changes nothing: alone, or where samples are tensors already."""
    from torchvision.transforms import ToTensor

    left = [step for step in chain if not isinstance(step, ToTensor)]
    return left if everywhere or not left else chain
