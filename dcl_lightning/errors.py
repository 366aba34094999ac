"""Exceptions caused by users' input, and checks that raise them: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Literal, get_args, get_origin

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DatasetNotFoundError",
    "HorovodNotFoundError",
    "WorkerError",
    "check_number",
    "check_words",
    "some_of",
    "suggestion",
    "whole_number",
]

# Earlier names of keys and words, by which an error suggests the present ones.
_RENAMED = {
    "store": "row_format", "rows": "inputs", "reference": "index", "transformed": "augmented",
    "stage": "prefetch", "sample": "draw", "assemble": "device", "load": "batch",
    "rehearse": "draw_from", "logits": "train_classes", "cut": "sample_order", "shard": "sharding",
}  # fmt: skip

_MAX_NAMED = 8  # names in a message
_LARGEST_FLOAT32, _LARGEST_INT = 3.4028235e38, 2**62


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or resumed."""

    @classmethod
    def not_written(cls, path: str | os.PathLike[str], error: OSError) -> CheckpointError:
        """Return the error of a save to ``path`` that failed."""
        return cls(
            f"{os.fspath(path)} cannot be written ({error.strerror or error}): what was saved before is whole; make "
            "room or give another folder, then resume with --ckpt_path last"
        )


class ConfigurationError(ValueError):
    """A value, or a combination of values, that cannot work."""


class DataError(ValueError):
    """Data that cannot be used as they are."""


class DatasetNotFoundError(DataError):
    """The folder of a data set lacks its files.

    Args:
        name: of the data set.
        folder: that was searched.
        layout: the expected files, in words.
        remedy: how to get them.
    """

    def __init__(self, name: str, folder: str, layout: str, remedy: str) -> None:
        super().__init__(f"data set '{name}' not found in {folder}: expected {layout}; {remedy}")


class HorovodNotFoundError(ImportError):
    """Horovod is needed and not installed."""

    def __init__(self) -> None:
        super().__init__(
            "strategy=horovod needs Horovod with PyTorch support, which is not installed: "
            "run `python -m dcl_lightning.tools.install_horovod`"
        )


class WorkerError(RuntimeError):
    """A worker is missing or has ended, so that the job cannot go on."""


def check_number(
    key: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Refuse a number that is out of range, not finite or too large for a tensor.

    >>> check_number("model.momentum", 0.9, at_least=0, below=1)

    Args:
        key: of the number, for the message.
        value: the number.
        above: lower bound, excluded.
        at_least: lower bound, included.
        below: upper bound, excluded.
        at_most: upper bound, included.

    Raises:
        ConfigurationError: with the allowed range.
    """
    largest = _LARGEST_INT if isinstance(value, int) else _LARGEST_FLOAT32
    number = isinstance(value, (int, float)) or hasattr(value, "__float__")
    right = (
        number and math.isfinite(value) and abs(value) <= largest
        and (above is None or value > above) and (at_least is None or value >= at_least)
        and (below is None or value < below) and (at_most is None or value <= at_most)
    )  # fmt: skip
    if right:
        return
    if number and math.isfinite(value) and abs(value) > largest and below is None and at_most is None:
        at_most = largest
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    said = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    kind = "whole number" if isinstance(value, int) else "number"
    raise ConfigurationError(f"{key}={value!r}: give a finite {kind}{said and ', ' + said}")


def suggestion(given: str, names: Iterable[str]) -> str:
    """Return the end of a message that suggests the nearest valid name; nothing for a valid or distant one.

    >>> suggestion("icrl", ["base", "icarl"])
    "; did you mean 'icarl'?"

    Args:
        given: the name that was given.
        names: the valid names.
    """
    right = sorted(set(names))
    renamed = _RENAMED.get(given)
    near = [renamed] if renamed in right else difflib.get_close_matches(given, right, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near and given not in right else ""


def some_of(names: Sequence[str]) -> str:
    """Return names for a message: the first eight, and whether there are others.

    Args:
        names: at least one.
    """
    return ", ".join(names[:_MAX_NAMED]) + (" and others" if len(names) > _MAX_NAMED else "")


def check_words(section: str, hints: Mapping[str, object], values: Mapping[str, object]) -> None:
    """Refuse values that are not among the words of their ``Literal``, which Python itself does not check.

    Args:
        section: of the configuration, with which the keys begin: ``model`` or ``rehearsal``.
        hints: types by name, from ``typing.get_type_hints``.
        values: by name; those without a hint are not checked.

    Raises:
        ConfigurationError: with the allowed words.
    """
    for name in hints.keys() & values.keys():
        kinds = (hints[name], *get_args(hints[name]))
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if words and values[name] not in words and not (values[name] is None and type(None) in kinds):
            given = values[name]
            near = suggestion(given, words) if isinstance(given, str) else ""
            raise ConfigurationError(f"{section}.{name}={given!r}: give {', '.join(words)}{near}")


def whole_number(key: str, value: object, least: int, below: int | None = None) -> int:
    """Return a whole number, Python's or NumPy's, as Python's.

    Args:
        key: of the number, for the message.
        value: the number.
        least: lower bound, included.
        below: upper bound, excluded.

    Raises:
        ConfigurationError: a bool, a float, text, or a number out of range.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if number >= least and (below is None or number < below):
            return number
    upper = "" if below is None else f", below {below}"
    raise ConfigurationError(f"{key}={value!r}: give a whole number of at least {least}{upper}")
