"""A stream: each sample's task, whether it is held out, and its worker."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dcl_lightning.data import scenarios
from dcl_lightning.data.scenarios import TaskSplit
from dcl_lightning.data.sources.arrays import Splits
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Task

__all__ = ["Stream", "refuse_another_stream"]


class Stream:
    """Both splits' labels as model ids, and the task of each sample.

    Attributes:
        labels: original labels in the order of their model ids.
        train_targets: ``(n,)`` int64 model ids.
        test_targets: ``(m,)`` int64 model ids.
        train_parts: ``(n,)`` int64 task of each sample.
        test_parts: ``(m,)`` int64 task of each sample.
        held: ``(n,)`` bool, samples held out of training.
        evaluate_on: what tasks are tested on, ``test`` samples or ``held_out`` ones.
        homes: for each task the model ids of the classes that it is tested on.

    Raises:
        ConfigurationError: classes or tasks that do not fit the data.
        DataError: test labels that training lacks.
    """

    def __init__(
        self,
        task_split: TaskSplit,
        splits: Splits,
        val_ratio: float,
        seed: int,
        evaluate_on: Literal["test", "held_out"] = "test",
    ) -> None:
        self.task_split, self.val_ratio, self.evaluate_on = task_split, val_ratio, evaluate_on
        train_tasks = test_tasks = self._given = None
        if task_split.scenario == "given":
            train_tasks, test_tasks = splits.train_tasks, splits.test_tasks
            assert train_tasks is not None
            assert test_tasks is not None
            self._given = train_tasks, test_tasks
        self.labels = task_split.labels_in_order(splits.train_labels, train_tasks, seed)
        targets = scenarios.encode(splits.train_labels, self.labels)
        self.train_targets = torch.from_numpy(targets)
        self.test_targets = torch.from_numpy(scenarios.encode(splits.test_labels, self.labels))
        if train_tasks is None or test_tasks is None:
            self.homes = task_split.home_classes(len(self.labels))
        else:
            num_tasks = scenarios.count_tasks(train_tasks, test_tasks)
            self.homes = [np.unique(targets[train_tasks == t]).tolist() for t in range(num_tasks)]
        self.draw(seed)
        tasks = range(len(self.homes))
        for task in tasks:
            if not len(self.train_indices(task)):
                raise ConfigurationError(f"task {task} has no training samples: give fewer tasks than {len(tasks)}")
        untested = [task for task in tasks if not len(self.tested_indices(task))]
        if untested:
            kind = "test" if evaluate_on == "test" else "held-out"
            rank_zero_warn(f"tasks without {kind} samples: {untested}; their accuracies are left empty")
        unheld = [task for task in tasks if val_ratio > 0 and not len(self.held_indices(task))]
        if unheld:
            rank_zero_warn(f"tasks without hold-outs: {unheld}; data.val_ratio takes none of a class with one sample")

    def draw(self, seed: int) -> None:
        """Draw what depends on the run's seed: leaking samples, the split of each class, and hold-outs."""
        train, test = self.train_targets.numpy(), self.test_targets.numpy()
        train_parts, test_parts = self._given or (
            self.task_split.parts(train, self.homes, seed, training=True),
            self.task_split.parts(test, self.homes, seed, training=False),
        )
        self.train_parts, self.test_parts = torch.from_numpy(train_parts), torch.from_numpy(test_parts)
        self.held = torch.from_numpy(scenarios.hold_out(train, train_parts, self.val_ratio, seed))
        self._owners: dict[tuple[int, int], Tensor] = {}
        # Computed here, so that no task's first batch waits for it.
        tasks = range(len(self.homes))
        self._train_indices = [torch.nonzero((self.train_parts == t) & ~self.held).flatten() for t in tasks]

    def train_indices(self, task: int) -> Tensor:
        """Return the sample ids ``(k,)`` int64 of a task's training samples without its hold-outs."""
        return self._train_indices[task]

    def held_indices(self, task: int) -> Tensor:
        """Return the sample ids ``(k,)`` int64 of a task's hold-outs."""
        return torch.nonzero((self.train_parts == task) & self.held).flatten()

    def test_indices(self, task: int) -> Tensor:
        """Return the sample ids ``(k,)`` int64, in the test split, of a task's test samples."""
        return torch.nonzero(self.test_parts == task).flatten()

    def tested_indices(self, task: int) -> Tensor:
        """Return the sample ids ``(k,)`` int64 that a task is tested on, of the split that ``evaluate_on`` is of."""
        if self.evaluate_on == "test":
            return self.test_indices(task)
        if self.task_split.scenario == "blurry":
            # As test samples are, with the own task of their class, also where that has leaked into another task.
            return torch.nonzero(torch.isin(self.train_targets, torch.tensor(self.homes[task])) & self.held).flatten()
        return self.held_indices(task)

    def owners(self, world_size: int, seed: int) -> Tensor:
        """Return the worker ``(n,)`` int64 of each training sample if samples stay on one worker for the whole run."""
        key = world_size, seed
        if key not in self._owners:
            owners = scenarios.deal(self.train_parts.numpy(), self.held.numpy(), world_size, seed)
            self._owners[key] = torch.from_numpy(owners)
        return self._owners[key]

    def facts(self, dataset: str) -> dict[str, object]:
        """Return what must not change when a run is resumed, by name, in plain types."""
        return {
            "dataset": dataset,
            "scenario": self.task_split.text,
            "class_order": list(self.labels),
            "classes of the tasks": [list(classes) for classes in self.homes],
            "val_ratio": self.val_ratio,
        }

    @property
    def classes_come_again(self) -> bool:
        """Whether the training sets of several tasks share a class."""
        pairs = torch.stack([self.train_parts, self.train_targets])[:, ~self.held]
        return pairs.unique(dim=1).shape[1] > len(self.labels)

    def tasks(self, epochs: list[int]) -> list[Task]:
        """Return the description of each task, given its number of epochs."""
        result = []
        for t, home in enumerate(self.homes):
            indices = self.train_indices(t)
            classes = sorted({*home, *self.train_targets[indices].unique().tolist()})
            result.append(
                Task(
                    index=t,
                    num_tasks=len(self.homes),
                    classes=tuple(classes),
                    labels=tuple(self.labels[y] for y in classes),
                    num_samples=len(indices),
                    epochs=epochs[t],
                    leaked=tuple(y for y in classes if y not in home),
                )
            )
        return result


def refuse_another_stream(saved: dict[str, object], present: dict[str, object]) -> None:
    """Refuse to resume a run whose saved ``Stream.facts`` differ from the present ones.

    Raises:
        ConfigurationError: the message names both values.
    """
    for name, value in saved.items():
        if value != present[name]:
            raise ConfigurationError(
                f"the checkpoint's run had {name} {value}, this one has {present[name]}: resume with the data options "
                "that the run was started with"
            )
