"""Memory configurations: completed by one rule, and refused where two values contradict each other."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import MemorySize, RehearsalConfig, resolve


def made(**values: Any) -> RehearsalConfig:
    return RehearsalConfig(**values)


# -- completed -------------------------------------------------------------------------------------


def test_nothing_is_given_by_default() -> None:
    assert set(asdict(RehearsalConfig()).values()) == {None}
    assert RehearsalConfig().explicit == {}


def test_plain_replay_is_what_nobody_says_otherwise() -> None:
    assert resolve(RehearsalConfig()).explicit == {
        "num_samples": 20, "policy": "reservoir", "quota": "fixed", "update": "step", "draw_from": "seen",
        "loss": "mean", "weighting": "none", "scope": "local", "execution": "inline", "prefetch": "draw",
        "row_format": "inputs", "storage": "cpu",
    }  # fmt: skip


def test_what_is_given_stands_over_own_values_of_which_later_ones_stand_over_earlier_ones() -> None:
    found = resolve(made(num_samples=3), made(num_samples=4, loss="sum", quota="adaptive"), made(loss="mean"))
    assert (found.num_samples, found.loss, found.quota, found.update) == (3, "mean", "adaptive", "step")


@pytest.mark.parametrize("size", [{"num_representatives": 2}, {"buffer_size": 30}, {"rehearsal_ratio": 0.5}])
def test_a_size_takes_the_place_of_any_other_size(size: dict[str, Any]) -> None:
    for own in ({"num_representatives": 7}, {"buffer_size": 7}, {"rehearsal_ratio": 0.7}):
        sizes = {key: value for key, value in asdict(resolve(made(**size), made(**own))).items() if value}
        assert {key: sizes[key] for key in sizes if key in asdict(MemorySize())} == size
        assert resolve(made(), made(**own)).explicit.items() >= own.items()


def test_candidates_are_for_policies_to_which_not_all_samples_are_offered() -> None:
    own = made(policy="nil", num_candidates=7)
    assert resolve(made(), own).num_candidates == 7
    assert resolve(made(policy="fifo"), own).num_candidates == 7
    assert resolve(made(policy="greedy"), own).num_candidates is None
    assert resolve(made(policy="fifo")).num_candidates == 20


def test_a_whole_configuration_is_completed_to_itself() -> None:
    for given in (made(), made(policy="nil", weighting="nil", buffer_size=3, seed=4)):
        whole = resolve(given)
        assert resolve(whole) == resolve(made(**vars(whole))) == whole


@pytest.mark.parametrize("kind", [RehearsalConfig, MemorySize])
def test_a_dict_says_what_a_configuration_does(kind: type[MemorySize]) -> None:
    assert kind.of({"buffer_size": 4}) == kind.of(kind(buffer_size=4)) == kind(buffer_size=4)
    assert kind.of(None) == kind.of({}) == kind.of({"buffer_size": None}) == kind()
    with pytest.raises(ConfigurationError, match=r"rehearsal\.bufer_size: no such key; did you mean 'buffer_size'\?"):
        kind.of({"bufer_size": 4})
    with pytest.raises(ConfigurationError, match=rf"rehearsal=4: give a {kind.__name__}, or a dict"):
        kind.of(4)  # type: ignore[arg-type]  # a caller without a type checker


# -- refused ---------------------------------------------------------------------------------------

CONTRADICTIONS = [
    {"num_candidates": 4, "policy": "reservoir"},
    {"num_candidates": 4, "policy": "greedy"},
    {"policy": "reservoir", "weighting": "nil"},
    {"policy": "greedy", "weighting": "nil"},
    {"scope": "global", "draw_from": "past", "update": "step"},
    {"scope": "global", "quota": "adaptive"},
    {"row_format": "augmented", "update": "task_end"},
    {"prefetch": "device", "execution": "inline"},
    {"prefetch": "batch", "execution": "inline"},
]


@pytest.mark.parametrize("values", CONTRADICTIONS, ids=str)
def test_each_contradiction_names_all_its_keys_and_first_what_was_given(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        RehearsalConfig(**values)
    assert all(f"{key}={value}" in str(refused.value) for key, value in values.items())
    assert "own" not in str(refused.value)
    for count in range(1, len(values)):
        for names in combinations(values, count):
            given = {name: values[name] for name in names}
            own = {name: value for name, value in values.items() if name not in given}
            if own == {"num_candidates": 4}:  # gives way
                assert resolve(made(**given), made(**own)).num_candidates is None
                continue
            with pytest.raises(ConfigurationError) as refused:
                resolve(made(**given), made(**own), owner="agent X")
            said = str(refused.value)
            first = re.match(r"rehearsal\.(\w+)=", said)
            assert first is not None
            assert first[1] in given
            assert all(f"{key}={value} (agent X's own)" in said for key, value in own.items())
            assert all(f"{key}={value}" in said and f"{key}={value} (" not in said for key, value in given.items())


def test_a_value_without_which_it_would_be_another_method_is_refused() -> None:
    words = r"rehearsal\.loss=mean: agent X has loss=sum; leave loss out"
    with pytest.raises(ConfigurationError, match=words):
        resolve(made(loss="mean"), made(loss="sum"), required={"loss": "sum"}, owner="agent X")
    assert resolve(made(), made(loss="sum"), required={"loss": "sum"}).loss == "sum"


@pytest.mark.parametrize("name", ["num_representatives", "buffer_size", "num_samples", "num_candidates"])
def test_counts_are_whole_numbers_of_at_least_one(name: str) -> None:
    for value in (0, -1, 2.5, "3", True):
        with pytest.raises(ConfigurationError, match=rf"rehearsal\.{name}={value!r}: give a whole number"):
            RehearsalConfig(**{name: value})
    assert getattr(RehearsalConfig(**{name: np.int64(1)}), name) == 1


@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan"), "0.5"])
def test_a_share_is_above_0_and_at_most_1(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"rehearsal\.rehearsal_ratio=.*above 0 and at most 1"):
        RehearsalConfig(rehearsal_ratio=value)
    assert RehearsalConfig(rehearsal_ratio=1).rehearsal_ratio == 1


def test_two_sizes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_representatives=2 and buffer_size=3 given together"):
        MemorySize(num_representatives=2, buffer_size=3)


def test_every_key_is_completed() -> None:
    may_be_none = {"num_representatives", "buffer_size", "rehearsal_ratio", "num_candidates", "seed"}
    assert {field.name for field in fields(RehearsalConfig)} == may_be_none | set(resolve(made()).explicit)
