"""How large the memory is: three ways to say it, of which one is given."""

from __future__ import annotations

from dataclasses import dataclass

from dcl_lightning.errors import ConfigurationError

__all__ = ["MemorySize"]


_MOST_ROWS = 2**40  # the ids of rows have to be int64, their bytes, too


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
        names = ("num_representatives", "buffer_size", "rehearsal_ratio")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given) > 1:
            raise ConfigurationError(
                f"rehearsal: {given} given together; give one of num_representatives, buffer_size, rehearsal_ratio"
            )
        for name, value in given.items():
            if not (0 < value <= (1 if name == "rehearsal_ratio" else _MOST_ROWS)):
                allowed = "a share in (0, 1]" if name == "rehearsal_ratio" else f"a whole number from 1 to {_MOST_ROWS}"
                raise ConfigurationError(f"rehearsal.{name}={value}: give {allowed}")

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
