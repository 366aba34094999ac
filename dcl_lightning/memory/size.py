"""How large the memory is: three ways to say it, of which one is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from dcl_lightning.errors import ConfigurationError, check_number, suggestion, whole_number

__all__ = ["SIZES", "MemorySize"]

SIZES = ("num_representatives", "buffer_size", "rehearsal_ratio")  # of which at most one is given

_MOST_ROWS = 2**40  # the ids of rows have to be int64, their bytes, too

_Size = TypeVar("_Size", bound="MemorySize")


@dataclass(frozen=True)
class MemorySize:
    """Capacity of the rehearsal memory; at most one of the three is given.

    Args:
        num_representatives: stored samples per class and worker.
        buffer_size: stored samples in all, over all workers and classes.
        rehearsal_ratio: share of the training set that is stored, in (0, 1].
    """

    num_representatives: int | None = None
    buffer_size: int | None = None
    rehearsal_ratio: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in self.explicit.items() if name in SIZES}
        if len(given) > 1:
            said = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ConfigurationError(f"rehearsal: {said} given together; give one of {', '.join(SIZES)}")
        for name, value in given.items():
            if name == "rehearsal_ratio":
                check_number(f"rehearsal.{name}", value, above=0, at_most=1)
            else:
                whole_number(f"rehearsal.{name}", value, 1, _MOST_ROWS + 1)

    @classmethod
    def of(cls: type[_Size], given: MemorySize | Mapping[str, Any] | None) -> _Size:
        """Return a configuration of what may also be a dict, or nothing.

        Args:
            given: a configuration, or a dict of its values.

        Raises:
            ConfigurationError: a key that there is not, or what the constructor refuses.
        """
        if given is not None and not isinstance(given, (MemorySize, Mapping)):
            raise ConfigurationError(f"rehearsal={given!r}: give a {cls.__name__}, or a dict of its values")
        values = given.explicit if isinstance(given, MemorySize) else given or {}
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                near = suggestion(str(key), names) or f"; give one of {', '.join(names)}"
                raise ConfigurationError(f"rehearsal.{key}: no such key{near}")
        return cls(**values)

    @property
    def explicit(self) -> dict[str, Any]:
        """The values that are given, by name: those that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def total(self, num_classes: int, num_workers: int, num_samples: int, default: int) -> int:
        """Return the capacity in samples over the whole job.

        Args:
            num_classes: classes of the whole stream.
            num_workers: workers of the job.
            num_samples: training samples of the whole stream.
            default: capacity if none of the three is given.
        """
        if self.buffer_size is not None:
            return self.buffer_size
        if self.num_representatives is not None:
            return self.num_representatives * num_classes * num_workers
        if self.rehearsal_ratio is not None:
            return max(int(self.rehearsal_ratio * num_samples), 1)
        return default
