"""From labels to tasks: pure functions over NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dcl_lightning.errors import ConfigurationError, DataError

__all__ = [
    "Label",
    "blurred",
    "check_labels",
    "class_tasks",
    "count_tasks",
    "deal",
    "encode",
    "hold_out",
    "order_classes",
    "part_of_samples",
]

Label = int | str

_TOO_LARGE = 2.0**63

# Draws for different purposes from one seed.
_CUT, _BLUR, _DEAL = 1, 2, 3


def check_labels(labels: Any, field: str = "labels") -> np.ndarray:
    """Return labels as ``(n,)`` int64 or str.

    Args:
        labels: list, array or tensor of one label a sample; bytes are read as UTF-8.
        field: name of the labels in messages.

    Raises:
        DataError: labels that are missing, negative, fractional, one-hot or of another type, numbers among names, or
            names that differ in spaces at their ends alone.
    """
    array = _as_array(labels, field)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{field} of shape {array.shape}: give one label a sample, shape (n,), not one-hot rows")
    if array.dtype.kind in "OST":
        array = _of_one_kind(array.tolist(), field)
    if array.dtype.kind == "U":
        _check_names(np.unique(array).tolist(), field)
        return array
    if array.dtype.kind == "f":
        wrong = array[~np.isfinite(array) | (array != np.floor(array))]
        if len(wrong):
            raise DataError(f"{field} must be whole numbers or names: found {_some(wrong)}")
    elif array.dtype.kind not in "iub":
        raise DataError(f"{field} of type {array.dtype}: give whole numbers or names")
    if array.dtype.kind in "uf" and (array.astype(float) >= _TOO_LARGE).any():
        raise DataError(f"{field} must be below 2**63: found {_some(array[array.astype(float) >= _TOO_LARGE])}")
    if len(array) and array.min() < 0:
        raise DataError(f"{field} must be at least 0: found {_some(array[array < 0])}")
    return array.astype(np.int64)


def _as_array(labels: Any, field: str) -> np.ndarray:
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
        # NumPy has no bfloat16.
        labels = (labels.float() if labels.is_floating_point() else labels).numpy()
    if isinstance(labels, np.ma.MaskedArray) and np.ma.getmaskarray(labels).any():
        raise _missing(field, np.flatnonzero(np.ma.getmaskarray(labels)), "masked")
    # NumPy would make text of what stands among names: "nan" of a missing one, "1" of a number.
    names = isinstance(labels, (list, tuple)) and any(isinstance(label, (str, bytes)) for label in labels)
    try:
        return np.asarray(labels, dtype=object if names else None)
    except (ValueError, TypeError) as error:
        raise DataError(f"{field} cannot be read as one label a sample: {error}") from error


def _of_one_kind(values: list[Any], field: str) -> np.ndarray:
    """Return labels of an object array as names or as numbers, which must not be sorted as text."""
    missing = [row for row, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise _missing(field, missing, repr(values[missing[0]]))
    names = [isinstance(value, (str, bytes)) for value in values]
    if not any(names):
        array = np.array(values)
        if array.dtype.kind in "iufb":
            return array
        raise DataError(f"{field} such as {values[0]!r}: give whole numbers, below 2**63, or names")
    if not all(names):
        raise DataError(
            f"{field} are names and numbers, such as {values[names.index(True)]!r} and "
            f"{values[names.index(False)]!r}: give either"
        )
    try:
        return np.array([value.decode() if isinstance(value, bytes) else value for value in values], dtype=str)
    except UnicodeDecodeError as error:
        raise DataError(f"{field} such as {error.object!r} are not UTF-8: give text") from error


def _is_missing(value: Any) -> bool:
    nan = isinstance(value, (float, np.floating)) and np.isnan(value)
    return value is None or bool(nan) or type(value).__name__ in ("NAType", "NaTType")  # pandas has the latter


def _missing(field: str, rows: Sequence[int] | np.ndarray, what: str) -> DataError:
    return DataError(
        f"{field}: {len(rows)} missing, the first in row {int(rows[0])} ({what}): leave such samples out, or give "
        "them a class"
    )


def _check_names(names: list[str], field: str) -> None:
    """Refuse distinct names of which one is empty, or two look the same; warn of one that stands for nothing."""
    stripped: dict[str, str] = {}
    for name in names:
        word = name.strip()
        if not word:
            raise DataError(f"{field}: some are empty ({name!r}): leave such samples out, or give them a class")
        if word != word.encode("utf-8", "replace").decode():
            raise DataError(f"{field}: {name!r} cannot be written as UTF-8, which reports are: give it another name")
        other = stripped.setdefault(word, name)
        if other != name:
            raise DataError(f"{field} {other!r} and {name!r} differ in spaces alone: give one class one name")
    for word in ("nan", "NaN", "<NA>", "None", "NaT"):
        if word in stripped:
            rank_zero_warn(f"{field}: a class is called {word!r}; if these are missing labels, leave such samples out")


def _some(values: np.ndarray) -> str:
    distinct = np.unique(values)
    return ", ".join(str(v) for v in distinct[:5].tolist()) + (", ..." if len(distinct) > 5 else "")


def order_classes(labels: np.ndarray, order: Sequence[Label] | None) -> list[Label]:
    """Return original labels in the order of their first task.

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


def class_tasks(num_classes: int, increment: Any, initial_increment: Any = None) -> list[list[int]]:
    """Return the model ids of each task's classes.

    Args:
        num_classes: classes of the stream.
        increment: classes a task, the last task taking what is left; or a list, one number a task, that
            must add up to ``num_classes``.
        initial_increment: classes of the first task, if not ``increment``.

    Raises:
        ConfigurationError: a number that is not positive, too large or a list that does not add up.
    """
    if isinstance(increment, (list, tuple, np.ndarray)):
        sizes = [_positive("increment", n, num_classes, increment) for n in increment]
        if sum(sizes) != num_classes:
            raise ConfigurationError(
                f"data.increment={[int(n) for n in sizes]} adds up to {sum(sizes)}, but there are {num_classes} classes"
            )
        if initial_increment is not None:
            raise ConfigurationError("data.initial_increment goes with a single increment: put it into the list")
    else:
        step = _positive("increment", increment, num_classes, increment)
        first = step if initial_increment is None else _positive("initial_increment", initial_increment, num_classes)
        sizes = [min(first, num_classes)]
        while sum(sizes) < num_classes:
            sizes.append(min(step, num_classes - sum(sizes)))
    starts = np.cumsum([0, *sizes])
    return [list(range(a, b)) for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]


def _positive(name: str, value: Any, num_classes: int, given: Any = None) -> int:
    shown = value if given is None else given
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 < value <= num_classes:
        raise ConfigurationError(
            f"data.{name}={shown}: give whole numbers from 1 to {num_classes}, the number of classes"
        )
    return int(value)


def count_tasks(train_tasks: np.ndarray, test_tasks: np.ndarray) -> int:
    """Return the number of tasks that data bring.

    Args:
        train_tasks: ``(n,)`` int64, task of each training sample.
        test_tasks: ``(m,)`` int64, task of each test sample.

    Raises:
        ConfigurationError: training tasks are not numbered from 0 without gaps, or test samples are of other tasks.
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
    """Return ``(n,)`` int64 task of each sample when all classes are in all tasks.

    The samples of each class are cut into contiguous parts; what does not divide goes round the tasks
    from class to class, so that task sizes differ by at most one.

    Args:
        targets: ``(n,)`` model ids.
        num_tasks: number of tasks.
        seed: seed of the order in which a class is cut; that of the data if None.
    """
    parts = np.zeros(len(targets), dtype=np.int64)
    generator = None if seed is None else np.random.default_rng((seed, _CUT))
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
    """Return ``(n,)`` int64 task of each sample when a share of each class leaks out of its own task.

    The leaking samples go evenly to all other tasks, so with classes of one size ``share`` is also the part of
    a task that is of other tasks' classes: Bang et al., "Rainbow Memory", CVPR 2021, whose Blurry10 is
    ``share`` 0.1. A class keeps at least one sample in its own task.

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
            # What does not divide goes round the tasks from class to class.
            parts[leaking] = others[(offset + np.arange(len(leaking))) % len(others)]
        offset += len(leaking)
    return parts


def deal(parts: np.ndarray, held: np.ndarray, num_workers: int, seed: int) -> np.ndarray:
    """Return ``(n,)`` int64 worker of each sample; workers have equal numbers of each task's, or one more or less.

    Args:
        parts: ``(n,)`` task of each sample.
        held: ``(n,)`` bool, samples held out of training, which are dealt apart.
        num_workers: number of workers.
        seed: seed of the choice.
    """
    order = np.lexsort((np.random.default_rng((seed, _DEAL)).random(len(parts)), parts, held))
    workers = np.empty(len(parts), dtype=np.int64)
    workers[order] = np.arange(len(parts)) % num_workers
    return workers


def hold_out(targets: np.ndarray, parts: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Return ``(n,)`` bool, samples held out: of each class of each task a share, at least one of two.

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
