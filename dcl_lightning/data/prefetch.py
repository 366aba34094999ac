"""A loader that prepares its next batch while this one is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dcl_lightning.data.loader import TaskLoader
from dcl_lightning.types import Batch

__all__ = ["AheadLoader"]


class AheadLoader:
    """The batches of a loader in their order, each prepared by a thread one batch ahead.

    Its place is that of the batch handed out last, so that the one ahead is prepared again after a resume.

    Args:
        loader: whose batches are prepared.
    """

    def __init__(self, loader: TaskLoader) -> None:
        self.loader = loader
        self._state = loader.state_dict()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)

        def prepare() -> tuple[Batch | None, dict[str, Any]]:
            return next(batches, None), self.loader.state_dict()

        with ThreadPoolExecutor(1, thread_name_prefix="rehearsal-load") as thread:
            ahead = thread.submit(prepare)
            while True:
                batch, self._state = ahead.result()
                if batch is None:
                    return
                ahead = thread.submit(prepare)
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the batch handed out last."""
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place."""
        self._state = state_dict
        self.loader.load_state_dict(state_dict)
