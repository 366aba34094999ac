"""Divides the time of one thread's work among phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

__all__ = ["Stopwatch"]


class Stopwatch:
    """Measures nested phases: entering one stops the one around it, leaving it lets that one go on.

    From ``start`` to ``stop`` each moment counts for exactly one phase, the innermost, so that the seconds of all
    phases add up to that time. Outside nothing is measured, and phases may be entered and left without effect. One
    thread uses it.

    Args:
        phases: names of all phases.
        now: returns the time in seconds.

    Example:
        >>> times = iter([0.0, 1.0, 3.0, 7.0])
        >>> watch = Stopwatch(["train", "wait"], now=lambda: next(times))
        >>> watch.start("train")
        >>> with watch.phase("wait"):
        ...     pass
        >>> watch.stop()
        >>> watch.seconds
        {'train': 5.0, 'wait': 2.0}
    """

    def __init__(self, phases: Sequence[str], now: Callable[[], float] = time.monotonic) -> None:
        self._seconds = dict.fromkeys(phases, 0.0)
        self._entered: list[str] = []  # from the outermost to the innermost
        self._now = now
        self._since = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        self._count()
        return dict(self._seconds)

    def reset(self, seconds: Mapping[str, float] | None = None) -> None:
        """Count from given seconds of the phases, as those of a run that is resumed; from 0 for each without any."""
        self._seconds = {phase: (seconds or {}).get(phase, 0.0) for phase in self._seconds}

    def start(self, phase: str) -> None:
        """Begin to measure, with the phase that all others lie within."""
        self._since, self._entered = self._now(), [phase]

    def stop(self) -> None:
        """End all phases; safe to repeat."""
        self._count()
        self._entered = []

    def enter(self, phase: str) -> None:
        """Begin a phase within the present one."""
        if self._entered:
            self._count()
            self._entered.append(phase)

    def leave(self, phase: str) -> None:
        """End a phase, and those within it that an exception has left open; do nothing if it is not entered."""
        if phase in self._entered[1:]:
            self._count()
            while self._entered.pop() != phase:
                pass

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Return a context that is a phase.

        Args:
            phase: its name.
        """
        self.enter(phase)
        try:
            yield
        finally:
            self.leave(phase)

    def _count(self) -> None:
        if self._entered:
            now = self._now()
            self._seconds[self._entered[-1]] += now - self._since
            self._since = now
