"""Errors that a user can cause. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations

__all__ = ["ConfigurationError", "DataError", "DatasetNotFoundError", "HorovodNotFoundError", "WorkerError"]


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
            "run `python -m dcl_lightning.distributed.install`"
        )


class WorkerError(RuntimeError):
    """A worker is missing or has ended, so that the job cannot go on."""
