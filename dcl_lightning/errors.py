"""Errors that a user can cause. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, Literal, get_args, get_origin

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DatasetNotFoundError",
    "HorovodNotFoundError",
    "WorkerError",
    "check_number",
    "check_words",
    "suggestion",
    "whole_number",
]


# Keys and words of earlier versions: an error names what took their place.
_RENAMED = {
    "store": "row_format", "rows": "inputs", "reference": "index", "transformed": "augmented",
    "stage": "prefetch", "sample": "draw", "assemble": "device", "load": "batch",
    "rehearse": "draw_from", "logits": "train_classes", "cut": "sample_order", "shard": "sharding",
}  # fmt: skip

_LARGEST_FLOAT32, _LARGEST_INT = 3.4028235e38, 2**62


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or resumed."""

    @classmethod
    def not_written(cls, path: str | os.PathLike[str], error: OSError) -> CheckpointError:
        """Return the error of a save that failed.

        Args:
            path: what was written.
            error: why it was not.
        """
        return cls(
            f"{os.fspath(path)} cannot be written ({error.strerror or error}): what was saved before is whole; make "
            "room or give another folder, then resume with --ckpt_path last"
        )


class ConfigurationError(ValueError):
    """A value, or a combination of values, that cannot work."""


class DataError(ValueError):
    """Data that cannot be used as they are."""


class DatasetNotFoundError(DataError):
    """A data set is not where it was looked for.

    Args:
        name: name of the data set.
        folder: where it was looked for.
        layout: the files expected there, in words.
        downloadable: whether ``data.download=true`` would fetch it.
    """

    def __init__(self, name: str, folder: str, layout: str, downloadable: bool) -> None:
        remedy = "put it there or set data.download=true" if downloadable else "put it there, it cannot be fetched"
        super().__init__(f"data set '{name}' not found in {folder}: expected {layout}; {remedy}")


class HorovodNotFoundError(ImportError):
    """Horovod is asked for and not installed."""

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
        above: it has to be greater.
        at_least: it has to be as great.
        below: it has to be less.
        at_most: it must not be greater.

    Raises:
        ConfigurationError: with what is allowed.
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
    """Return the end of a message that asks for the nearest right name; nothing if none is near, or it is among them.

    >>> suggestion("icrl", ["base", "icarl"])
    "; did you mean 'icarl'?"

    Args:
        given: what was given.
        names: what would have been right.
    """
    right = sorted(set(names))
    renamed = _RENAMED.get(given)
    near = [renamed] if renamed in right else difflib.get_close_matches(given, right, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near and given not in right else ""


def check_words(section: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse words that a ``Literal`` does not have: in Python nothing else does, and a misspelt word would be another.

    Args:
        section: of the configuration, with which the keys begin: ``model`` or ``rehearsal``.
        hints: types by name, as ``typing.get_type_hints`` gives them.
        values: by name; those without a hint are left alone.

    Raises:
        ConfigurationError: with the words that are allowed.
    """
    for name in hints.keys() & values.keys():
        kinds = (hints[name], *get_args(hints[name]))
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if words and values[name] not in words and not (values[name] is None and type(None) in kinds):
            given = values[name]
            near = suggestion(given, words) if isinstance(given, str) else ""
            raise ConfigurationError(f"{section}.{name}={given!r}: give {', '.join(words)}{near}")


def whole_number(key: str, value: Any, least: int, below: int | None = None) -> int:
    """Return a whole number, Python's or NumPy's, as Python's.

    Args:
        key: what sets it.
        value: what was given.
        least: the smallest that is allowed.
        below: the first one too large, if any.

    Raises:
        ConfigurationError: a bool, a float, text, or a number out of range.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not (least <= value and (below is None or value < below)):
        upper = "" if below is None else f", below {below}"
        raise ConfigurationError(f"{key}={value!r}: give a whole number of at least {least}{upper}")
    return int(value)
