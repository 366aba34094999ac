"""How a data set is split into tasks: ``data.scenario`` and the keys that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcl_lightning.data import scenarios
from dcl_lightning.data.scenarios import Label
from dcl_lightning.data.seeds import SEEDS
from dcl_lightning.errors import ConfigurationError, suggestion, whole_number

__all__ = ["Cutting", "named_class_order", "shuffled_classes"]


# Printed in the benchmarks that follow iCaRL's own released code.
_ICARL_LIST = (
    "87 0 52 58 44 91 68 97 51 15 94 92 10 72 49 78 61 14 8 86 84 96 18 24 32 45 88 11 4 67 69 66 77 47 79 93 29 50 57 "
    "83 17 81 41 12 37 59 25 20 80 73 1 28 6 46 62 82 53 9 31 75 38 63 33 74 27 22 36 3 16 21 60 19 70 90 89 43 5 42 "
    "65 76 40 30 23 85 2 95 56 48 71 64 98 13 99 7 34 55 54 26 35 39"
)


def named_class_order(name: str) -> list[int]:
    """Return a published order of 100 classes: ``icarl_1993`` or ``icarl_list``."""
    if name == "icarl_list":
        return [int(word) for word in _ICARL_LIST.split()]
    if name == "icarl_1993":
        return list(shuffled_classes(range(100), 1993))
    raise ConfigurationError(
        f"data.class_order={name!r}: give a list of labels, a seed, random, or one of the published orders of "
        f"CIFAR-100, icarl_1993, icarl_list{suggestion(name, ('random', 'icarl_1993', 'icarl_list'))}"
    )


def shuffled_classes(labels: Sequence[Any], seed: int) -> list[Any]:
    """Return labels in the order of NumPy's legacy shuffle, by which published orders are made.

    Args:
        labels: in ascending order.
        seed: from 0 to below 2**32.

    Raises:
        ConfigurationError: a seed out of range.
    """
    places = np.arange(len(labels))
    np.random.RandomState(whole_number("data.class_order", seed, 0, SEEDS)).shuffle(places)
    return [labels[place] for place in places.tolist()]


_SCENARIOS = ("class", "domain", "instance", "blurry", "none", "given")


@dataclass(frozen=True)
class Cutting:
    """The rule that makes tasks of a data set.

    Args:
        scenario: ``class``, ``domain``, ``instance``, ``blurry`` or ``none``; ``given`` if the data, or a scenario of
            continuum's kind, bring the tasks.
        increment: see ``ContinualDataModule``, as are all arguments below.
        initial_increment: first task.
        num_tasks: of a domain or instance scenario.
        class_order: labels, a name or a seed.
        blurriness: share of each class that leaks.
        sample_order: order in which the samples of a class are split.
        source: what brings the tasks.

    Raises:
        ConfigurationError: an unknown name, or values that do not go with the scenario.
    """

    scenario: str
    increment: Any
    initial_increment: int | None
    num_tasks: int | None
    class_order: Sequence[Label] | str | int | None
    blurriness: float | None
    sample_order: str
    source: Any = None

    def __post_init__(self) -> None:
        if self.scenario not in _SCENARIOS:
            raise ConfigurationError(
                f"data.scenario={self.scenario!r}: give {', '.join(_SCENARIOS)}, or the class path of a continuum "
                f"scenario{suggestion(str(self.scenario), _SCENARIOS)}"
            )
        if self.num_tasks is not None and self.scenario not in ("domain", "instance"):
            raise ConfigurationError(
                f"data.num_tasks={self.num_tasks} with data.scenario={self.scenario}: it is of scenarios domain and "
                "instance only; give data.increment, the classes of a task, where classes arrive task by task"
            )
        if self.initial_increment is not None and self.scenario not in ("class", "blurry"):
            raise ConfigurationError(
                f"data.initial_increment={self.initial_increment} with data.scenario={self.scenario}: it is of "
                "scenarios class and blurry only, where classes arrive task by task; leave it out, or give null"
            )
        if self.blurriness is not None and self.scenario != "blurry":
            raise ConfigurationError(
                f"data.blurriness={self.blurriness} with data.scenario={self.scenario}: give data.scenario=blurry"
            )
        if not 0 <= self.share < 1:
            raise ConfigurationError(f"data.blurriness={self.blurriness}: give a share from 0 to below 1")
        if self.sample_order not in ("in_order", "shuffled"):
            raise ConfigurationError(f"data.sample_order={self.sample_order!r}: give in_order or shuffled")
        if self.sample_order == "shuffled" and self.scenario not in ("domain", "instance"):
            raise ConfigurationError(
                f"data.sample_order=shuffled with data.scenario={self.scenario}: give data.scenario=domain or instance"
            )
        if isinstance(self.class_order, str) and self.class_order != "random":
            named_class_order(self.class_order)

    @property
    def share(self) -> float:
        """Share of each class that leaks, with its default."""
        return 0.1 if self.blurriness is None else self.blurriness

    @property
    def text(self) -> str:
        """The scenario in words, by which a resumed run is known to be the same."""
        if self.scenario == "given":
            return type(self.source[0]).__name__ if isinstance(self.source, (tuple, list)) else str(self.source)
        if self.scenario == "blurry":
            return f"blurry {self.share:g}"
        return f"{self.scenario}, shuffled" if self.sample_order == "shuffled" else self.scenario

    def home_classes(self, num_classes: int) -> list[list[int]]:
        """Return the model ids of the classes whose home each task is.

        Args:
            num_classes: classes of the stream, K.
        """
        if self.scenario in ("class", "blurry"):
            return scenarios.class_tasks(num_classes, self.increment, self.initial_increment)
        return [list(range(num_classes))] * (1 if self.scenario == "none" else self.num_tasks or 5)

    def labels_in_order(self, labels: np.ndarray, tasks: np.ndarray | None, seed: int) -> list[Label]:
        """Return the original labels in the order of their model ids.

        Args:
            labels: ``(n,)`` of training.
            tasks: ``(n,)`` task of each sample, if the data bring them: classes then come in the order of their first
                task.
            seed: seed of the run.

        Raises:
            ConfigurationError: an order that does not fit the labels.
        """
        order = self.class_order
        if isinstance(order, str) and order != "random":
            order = named_class_order(order)
        if isinstance(order, (str, int, np.integer)):
            present = scenarios.order_classes(labels, None)
            return shuffled_classes(present, seed if isinstance(order, str) else order)
        if order is None and tasks is not None:
            distinct = np.unique(labels)
            firsts = [int(tasks[labels == label].min()) for label in distinct]
            return [distinct[place].item() for place in np.argsort(firsts, kind="stable")]
        return scenarios.order_classes(labels, order)

    def parts(self, targets: np.ndarray, homes: list[list[int]], seed: int, training: bool) -> np.ndarray:
        """Return ``(n,)`` int64 task of each sample.

        Args:
            targets: ``(n,)`` model ids.
            homes: what ``home_classes`` returns.
            seed: seed of the run.
            training: whether these are training samples: test samples never leak, and are cut in order.
        """
        if self.scenario not in ("class", "blurry"):
            shuffled = training and self.sample_order == "shuffled"
            return scenarios.part_of_samples(targets, len(homes), seed if shuffled else None)
        home = np.repeat(np.arange(len(homes)), [len(classes) for classes in homes])
        if self.scenario == "blurry" and training:
            return scenarios.blurred(targets, home, self.share, seed)
        return home[targets]
