"""The stopwatch: each moment counts for the innermost phase, whatever is entered, left, raised and reset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcl_lightning.stopwatch import Stopwatch

PHASES = ("a", "b", "c")


class Time:
    """A clock that goes on when told to; whole numbers, whose sums are exact."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# A tree of phases: (name, ticks before each part, parts, whether it ends with an exception).
TREES = st.recursive(
    st.tuples(st.sampled_from(PHASES), st.integers(0, 9), st.just([]), st.booleans()),
    lambda part: st.tuples(st.sampled_from(PHASES), st.integers(0, 9), st.lists(part, max_size=4), st.booleans()),
    max_leaves=12,
)


def work(watch: Stopwatch, time: Time, tree: Any, by_context: Iterator[bool]) -> None:
    """Go through a tree; an exception ends a phase, and what a caller of ``enter`` leaves open is closed around it."""
    name, ticks, parts, raises = tree

    def inside() -> None:
        time.now += ticks
        for part in parts:
            work(watch, time, part, by_context)
            time.now += ticks
        if raises:
            raise KeyError

    if next(by_context):
        with suppress(KeyError), watch.phase(name):
            inside()
        return
    watch.enter(name)
    with suppress(KeyError):
        inside()
    watch.leave(name)


def expected(tree: Any) -> dict[str, int]:
    """Seconds of a tree's phases, by its definition."""
    name, ticks, parts, _ = tree
    sums = dict.fromkeys(PHASES, 0)
    sums[name] += ticks * (1 + len(parts))
    for part in parts:
        for phase, seconds in expected(part).items():
            sums[phase] += seconds
    return sums


@given(TREES, st.lists(st.booleans(), min_size=1))
def test_each_moment_counts_for_the_innermost_phase(tree: Any, choices: list[bool]) -> None:
    time = Time()
    watch = Stopwatch(["rest", *PHASES], now=time)
    watch.start("rest")
    time.now += 5
    work(watch, time, tree, iter(choices * 99))
    time.now += 7
    assert watch.seconds == {"rest": 12, **expected(tree)}
    watch.stop()
    time.now += 100
    assert watch.seconds == {"rest": 12, **expected(tree)}
    assert sum(watch.seconds.values()) == time.now - 100


def test_nothing_is_measured_outside_of_start_and_stop() -> None:
    time = Time()
    watch = Stopwatch(PHASES, now=time)
    with watch.phase("a"):
        time.now += 1
    watch.enter("b")
    watch.start("c")
    time.now += 2
    watch.leave("b")  # entered before the start
    watch.leave("c")  # the outermost ends with ``stop``
    time.now += 4
    with watch.phase("a"):
        watch.stop()
        time.now += 8
    assert watch.seconds == {"a": 0, "b": 0, "c": 6}


def test_what_an_exception_leaves_open_ends_with_the_phase_around_it() -> None:
    time = Time()
    watch = Stopwatch(PHASES, now=time)
    watch.start("a")

    def fail() -> None:
        watch.enter("c")
        time.now += 1
        raise ValueError("within c")

    with pytest.raises(ValueError, match="within c"), watch.phase("b"):
        fail()
    time.now += 2
    assert watch.seconds == {"a": 2, "b": 0, "c": 1}


def test_seconds_are_known_within_a_phase_and_count_on_from_given_ones() -> None:
    time = Time()
    watch = Stopwatch(PHASES, now=time)
    watch.reset({"a": 10.0, "of another version": 3.0})
    watch.start("a")
    with watch.phase("b"):
        time.now += 3
        assert watch.seconds == {"a": 10, "b": 3, "c": 0}
        time.now += 4
    assert watch.seconds == {"a": 10, "b": 7, "c": 0}
    watch.reset()
    time.now += 1
    assert watch.seconds == {"a": 1, "b": 0, "c": 0}
