"""How the samples of a data set are split into tasks, held out and dealt to workers: ``data.scenario`` and its keys."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dcl_lightning.errors import ConfigurationError, DataError, suggestion, whole_number

__all__ = [
    "MAX_SEED", "Label", "TaskSplit", "blurred", "class_tasks", "count_tasks", "deal", "encode", "hold_out",
    "named_class_order", "order_classes", "part_of_samples", "seed_of_run", "shuffled_classes",
]  # fmt: skip

Label = int | str
T = TypeVar("T")

MAX_SEED = (1 << 32) - 1  # NumPy's and Lightning's, too
_SPLIT, _BLUR, _DEAL = 1, 2, 3  # keep draws of one seed for different purposes apart


def seed_of_run(given: object, key: str = "data.seed") -> int:
    """Return the given seed, 0 to 2**32 - 1, or if it is None that of ``seed_everything``, or 0.

    Args:
        given: Python's or NumPy's integer, or None.
        key: the configuration key, for the message.

    Raises:
        ConfigurationError: any other seed.
    """
    if given is not None:
        return whole_number(key, given, 0, MAX_SEED + 1)
    # Lightning's ``seed_everything`` sets this variable.
    found = os.environ.get("PL_GLOBAL_SEED", "0")
    return whole_number("PL_GLOBAL_SEED", int(found) if found.isdecimal() else found, 0, MAX_SEED + 1)


# -- classes -------------------------------------------------------------------------------------------------------

# Printed in the benchmarks that follow iCaRL's released code.
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
        return shuffled_classes(range(100), 1993)
    raise ConfigurationError(
        f"data.class_order={name!r}: give a list of labels, a seed, random, or one of the published orders of "
        f"CIFAR-100, icarl_1993, icarl_list{suggestion(name, ('random', 'icarl_1993', 'icarl_list'))}"
    )


def shuffled_classes(labels: Sequence[T], seed: int) -> list[T]:
    """Return labels in the order of NumPy's legacy shuffle, which makes the published orders.

    Args:
        labels: in ascending order.
        seed: 0 to 2**32 - 1.
    """
    places = np.arange(len(labels))
    np.random.RandomState(whole_number("data.class_order", seed, 0, MAX_SEED + 1)).shuffle(places)
    return [labels[place] for place in places.tolist()]


def order_classes(labels: np.ndarray, order: Sequence[Label] | None) -> list[Label]:
    """Return the distinct labels in the given order, ascending if it is None.

    Raises:
        ConfigurationError: ``order`` lacks labels, names unknown ones or repeats some.
    """
    present = [label.item() for label in np.unique(labels)]
    if order is None:
        return present
    try:
        wanted: list[Label] = [type(present[0])(label) for label in order]
        if any(isinstance(label, (bool, float)) and label != kept for label, kept in zip(order, wanted, strict=True)):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigurationError(f"data.class_order={order}: give a list of labels, which are whole numbers") from None
    missing, unknown = sorted(set(present) - set(wanted)), sorted(set(wanted) - set(present))
    double = sorted({label for label in wanted if wanted.count(label) > 1})
    if missing or unknown or double:
        faults = {"missing": missing, "unknown": unknown, "given twice": double}
        text = ", ".join(f"{name} {value}" for name, value in faults.items() if value)
        raise ConfigurationError(f"data.class_order does not fit the {len(present)} classes of the data: {text}")
    return wanted


def encode(labels: np.ndarray, classes: Sequence[Label]) -> np.ndarray:
    """Return ``(n,)`` int64 model ids: the place of each label in ``classes``.

    Raises:
        DataError: a label that is not among the classes.
    """
    ids = {label: i for i, label in enumerate(classes)}
    unknown = sorted({label.item() for label in np.unique(labels)} - set(ids))
    if unknown:
        raise DataError(f"the test split has labels that training lacks: {unknown}")
    return np.array([ids[label.item()] for label in labels], dtype=np.int64)


# -- tasks ---------------------------------------------------------------------------------------------------------


def class_tasks(
    num_classes: int, increment: int | Sequence[int], initial_increment: int | None = None
) -> list[list[int]]:
    """Return the model ids of each task's classes.

    Args:
        num_classes: classes of the stream.
        increment: classes of a task, the last task taking the rest; or a list with one number for each task.
        initial_increment: classes of the first task if not ``increment``.

    Raises:
        ConfigurationError: a number that is not positive or too large, or a list that does not add up.
    """
    if isinstance(increment, (list, tuple, np.ndarray)):
        sizes = [_positive("increment", n, num_classes, increment) for n in increment]
        if sum(sizes) != num_classes:
            raise ConfigurationError(
                f"data.increment={sizes} adds up to {sum(sizes)}, but there are {num_classes} classes"
            )
        if initial_increment is not None:
            raise ConfigurationError("data.initial_increment goes with a single increment: put it into the list")
    else:
        step = _positive("increment", increment, num_classes, increment)
        first = step
        if initial_increment is not None:
            first = _positive("initial_increment", initial_increment, num_classes, initial_increment)
        sizes = [first]
        while sum(sizes) < num_classes:
            sizes.append(min(step, num_classes - sum(sizes)))
    ends = np.cumsum(sizes).tolist()
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def _positive(name: str, value: object, num_classes: int, given: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 < value <= num_classes:
        raise ConfigurationError(
            f"data.{name}={given}: give whole numbers from 1 to {num_classes}, the number of classes"
        )
    return int(value)


def count_tasks(train_tasks: np.ndarray, test_tasks: np.ndarray) -> int:
    """Return the number of tasks, given the task of each training sample ``(n,)`` and test sample ``(m,)``.

    Raises:
        ConfigurationError: training tasks are not numbered from 0 without gaps, or only test samples have a task.
    """
    found = np.unique(train_tasks)
    wrong = np.flatnonzero(found != np.arange(len(found)))
    if len(wrong):
        raise ConfigurationError(f"task {wrong[0]} has no training samples: number them from 0 without gaps")
    foreign = np.setdiff1d(test_tasks, found)
    if len(foreign):
        raise ConfigurationError(f"test samples are of tasks {foreign.tolist()[:5]}, which training lacks")
    return len(found)


def part_of_samples(targets: np.ndarray, num_tasks: int, seed: int | None = None) -> np.ndarray:
    """Return ``(n,)`` int64 task of each sample if every task has all classes.

    The samples of each class are split into contiguous parts. The remainders go round the tasks from class to class,
    so that the sizes of tasks differ by at most one.

    Args:
        targets: ``(n,)`` model ids.
        num_tasks: number of tasks.
        seed: seed that shuffles each class before its split; None keeps the order of the data.
    """
    parts = np.zeros(len(targets), dtype=np.int64)
    generator = None if seed is None else np.random.default_rng((seed, _SPLIT))
    offset = 0
    for y in np.unique(targets):
        members = np.flatnonzero(targets == y)
        if generator is not None:
            members = generator.permutation(members)
        base, extra = divmod(len(members), num_tasks)
        sizes = np.full(num_tasks, base)
        sizes[(offset + np.arange(extra)) % num_tasks] += 1
        offset = (offset + extra) % num_tasks
        parts[members] = np.repeat(np.arange(num_tasks), sizes)
    return parts


def blurred(targets: np.ndarray, home: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return ``(n,)`` int64 task of each sample if a share of each class leaks out of its own task.

    The leaking samples are spread evenly over all other tasks, so with classes of one size ``share`` is also the part
    of a task's samples that belong to other tasks' classes: Bang et al., "Rainbow Memory", CVPR 2021, whose Blurry10
    is ``share`` 0.1. Each class keeps at least one sample in its own task.

    Args:
        targets: ``(n,)`` model ids.
        home: ``(K,)`` own task of each class.
        share: share of each class that leaks, in [0, 1).
        seed: seed of the choice.
    """
    parts = home[targets]
    generator = np.random.default_rng((seed, _BLUR))
    offset = 0
    for y, own in enumerate(home.tolist()):
        members = generator.permutation(np.flatnonzero(targets == y))
        others = np.delete(np.arange(home.max() + 1), own)
        leaking = members[: max(min(round(share * len(members)), len(members) - 1), 0)]
        if len(others):
            # The remainders go round the tasks from class to class.
            parts[leaking] = others[(offset + np.arange(len(leaking))) % len(others)]
        offset += len(leaking)
    return parts


def deal(parts: np.ndarray, held: np.ndarray, world_size: int, seed: int) -> np.ndarray:
    """Return ``(n,)`` int64 worker of each sample; workers' shares of each task differ by at most one sample.

    Args:
        parts: ``(n,)`` task of each sample.
        held: ``(n,)`` bool, hold-outs, which are dealt separately.
        world_size: number of workers.
        seed: seed of the choice.
    """
    order = np.lexsort((np.random.default_rng((seed, _DEAL)).random(len(parts)), parts, held))
    workers = np.empty(len(parts), dtype=np.int64)
    workers[order] = np.arange(len(parts)) % world_size
    return workers


def hold_out(targets: np.ndarray, parts: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Return ``(n,)`` bool, the hold-outs: a share of each class of each task, at least one of two samples.

    Args:
        targets: ``(n,)`` model ids.
        parts: ``(n,)`` task of each sample.
        ratio: share in [0, 1).
        seed: seed of the choice.
    """
    held = np.zeros(len(targets), dtype=bool)
    generator = np.random.default_rng(seed)
    for task in np.unique(parts):
        for y in np.unique(targets[parts == task]):
            members = np.flatnonzero((parts == task) & (targets == y))
            count = min(max(round(ratio * len(members)), 1), len(members) - 1) if ratio > 0 else 0
            held[generator.permutation(members)[:count]] = True
    return held


# -- data.scenario -------------------------------------------------------------------------------------------------

_SCENARIOS = ("class", "domain", "instance", "blurry", "none", "given")


@dataclass(frozen=True)
class TaskSplit:
    """The rule that splits a data set into tasks. ``source`` is ``scenario`` as the user gave it.

    The other values are those of ``ContinualDataModule``; ``scenario`` is ``given`` for all that bring their own tasks.

    Raises:
        ConfigurationError: an unknown word, or values that do not go with the scenario.
    """

    scenario: str
    increment: int | Sequence[int]
    initial_increment: int | None
    num_tasks: int | None
    class_order: Sequence[Label] | str | int | None
    blurriness: float | None
    sample_order: str
    source: object = None

    def __post_init__(self) -> None:
        if self.scenario not in _SCENARIOS:
            raise ConfigurationError(
                f"data.scenario={self.scenario!r}: give {', '.join(_SCENARIOS)}, or the class path of a continuum "
                f"scenario{suggestion(self.scenario, _SCENARIOS)}"
            )
        if self.num_tasks is not None and self.scenario not in ("domain", "instance"):
            raise ConfigurationError(
                f"data.num_tasks={self.num_tasks} with data.scenario={self.scenario}: it is for scenarios domain and "
                "instance only; give data.increment, the classes of a task, where classes arrive task by task"
            )
        if self.initial_increment is not None and self.scenario not in ("class", "blurry"):
            raise ConfigurationError(
                f"data.initial_increment={self.initial_increment} with data.scenario={self.scenario}: it is for "
                "scenarios class and blurry only, where classes arrive task by task; leave it out, or give null"
            )
        if self.blurriness is not None and self.scenario != "blurry":
            raise ConfigurationError(
                f"data.blurriness={self.blurriness} with data.scenario={self.scenario}: give data.scenario=blurry"
            )
        if not 0 <= self.share < 1:
            raise ConfigurationError(f"data.blurriness={self.blurriness}: give a share from 0 to below 1")
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
        """The scenario in words, which must be the same when a run is resumed."""
        if self.scenario == "given":
            return type(self.source[0]).__name__ if isinstance(self.source, (tuple, list)) else str(self.source)
        if self.scenario == "blurry":
            return f"blurry {self.share:g}"
        return f"{self.scenario}, shuffled" if self.sample_order == "shuffled" else self.scenario

    def home_classes(self, num_classes: int) -> list[list[int]]:
        """Return for each task the model ids of the classes that it is tested on."""
        if self.scenario in ("class", "blurry"):
            return class_tasks(num_classes, self.increment, self.initial_increment)
        return [list(range(num_classes))] * (1 if self.scenario == "none" else self.num_tasks or 5)

    def labels_in_order(self, labels: np.ndarray, tasks: np.ndarray | None, seed: int) -> list[Label]:
        """Return the original labels in the order of their model ids.

        Args:
            labels: ``(n,)`` of training.
            tasks: ``(n,)`` task of each sample if the data have tasks: classes then come in the order of their first.
            seed: seed of the run.
        """
        order = self.class_order
        if isinstance(order, str) and order != "random":
            order = named_class_order(order)
        if isinstance(order, (str, int, np.integer)):
            return shuffled_classes(order_classes(labels, None), seed if isinstance(order, str) else order)
        if order is None and tasks is not None:
            distinct = np.unique(labels)
            firsts = [int(tasks[labels == label].min()) for label in distinct]
            return [distinct[place].item() for place in np.argsort(firsts, kind="stable")]
        return order_classes(labels, order)

    def parts(self, targets: np.ndarray, homes: list[list[int]], seed: int, training: bool) -> np.ndarray:
        """Return ``(n,)`` int64 task of each sample; test samples do not leak and are split in order.

        Args:
            targets: ``(n,)`` model ids.
            homes: the result of ``home_classes``.
            seed: seed of the run.
            training: whether these are training samples.
        """
        if self.scenario not in ("class", "blurry"):
            shuffled = training and self.sample_order == "shuffled"
            return part_of_samples(targets, len(homes), seed if shuffled else None)
        home = np.repeat(np.arange(len(homes)), [len(classes) for classes in homes])
        if self.scenario == "blurry" and training:
            return blurred(targets, home, self.share, seed)
        return home[targets]
