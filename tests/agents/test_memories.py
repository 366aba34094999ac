"""Each agent's memory settings: its own defaults, the same from Python, a file or the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcl_lightning import RehearsalConfig, cli
from dcl_lightning.agents import short_names
from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.backbones import MLP
from dcl_lightning.cli.program import ContinualCLI
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import ResolvedConfig

PLAIN = {
    "num_candidates": None, "num_samples": 20, "policy": "reservoir", "quota": "fixed", "update": "step",
    "draw_from": "seen", "loss": "mean", "weighting": "none", "scope": "local", "execution": "inline",
    "prefetch": "draw", "row_format": "inputs", "storage": "cpu", "seed": None,
}  # fmt: skip
OF_NIL = {"policy": "nil", "num_candidates": 20, "weighting": "nil"}
PROJECTING = {
    "policy": "class_balanced",
    "num_candidates": 20,
    "update": "task_end",
    "draw_from": "past",
    "loss": "sum",
}
# What the methods' papers and the documentation say of each.
OWN: dict[str, dict[str, Any]] = {
    "nil": OF_NIL,
    "nil_v1": OF_NIL | {"execution": "blocking"},
    "nil_v2": OF_NIL | {"execution": "nonblocking"},
    "nil_v3": OF_NIL | {"execution": "blocking", "prefetch": "device"},
    "nil_v4": OF_NIL | {"execution": "blocking", "prefetch": "batch"},
    "nil_global": OF_NIL | {"execution": "blocking", "scope": "global"},
    "er": {},
    "er_ace": {"loss": "sum"},
    "mir": {"num_samples": 50, "loss": "sum"},
    "scr": {"num_samples": 100},
    "icarl_online": {"draw_from": "past", "loss": "sum"},
    "pcr": {"num_samples": 10},
    "der": {"loss": "sum"},
    "derpp": {"loss": "sum"},
    "derpp_task_end": PROJECTING | {"quota": "adaptive"},
    "agem": PROJECTING,
    "gem": PROJECTING,
    "gdumb": {"policy": "greedy", "quota": "adaptive", "loss": "sum"},
    "bic": {"policy": "class_balanced", "num_candidates": 20, "quota": "adaptive"},
}
GIVEN: dict[str, Any] = {"buffer_size": 200, "num_samples": 12, "row_format": "index"}


def in_python(name: str, rehearsal: Any, *_: Any) -> Any:
    return getattr(short_names, name)(MLP([4], 1, 4), 6, rehearsal)


def by_class(name: str, given: dict[str, Any], *_: Any) -> Any:
    return in_python(name, RehearsalConfig(**given))


def on_the_command_line(name: str, given: dict[str, Any], made: list[Any], folder: Path) -> Any:
    """Half of it in a file, the other half by flags."""
    keys = sorted(given)
    model = {"class_path": name, "init_args": {"rehearsal": {key: given[key] for key in keys[::2]}}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    flags = [f"--model.rehearsal.{key}={given[key]}" for key in keys[1::2]]
    args = ["--config", str(folder / "config.yaml"), *flags, "--data.dataset=digits", "--trainer.logger=false"]
    assert cli.main(["fit", *args]) == 0
    return made.pop()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the list in which the command line leaves its agent, with which it does nothing."""
    agents: list[Any] = []
    monkeypatch.setattr(ContinualCLI, "_run_subcommand", lambda self, _: agents.append(self.model))
    return agents


def test_every_agent_with_a_memory_is_here() -> None:
    assert set(OWN) == {name for name in short_names.__all__ if issubclass(getattr(short_names, name), RehearsingAgent)}


@pytest.mark.parametrize("way", [in_python, by_class, on_the_command_line])
@pytest.mark.parametrize("name", OWN)
def test_what_is_not_given_is_the_agents_own(
    name: str, way: Callable[..., Any], made: list[Any], tmp_path: Path
) -> None:
    sizes = {"num_representatives": None, "buffer_size": None, "rehearsal_ratio": None}
    for given in ({}, GIVEN) if way is in_python else (GIVEN,):
        update = {"update": "step"} if given else {}  # any agent takes it but for GDumb and BiC, which have it
        agent = way(name, given | update, made, tmp_path)
        whole = sizes | PLAIN | OWN[name] | given | update
        assert agent.rehearsal.config == ResolvedConfig(**whole)
        assert agent.hparams["rehearsal"] == agent.hparams_initial["rehearsal"] == whole
        assert agent.rehearsal.given.explicit == given | update


def test_a_null_is_not_given(made: list[Any], tmp_path: Path) -> None:
    for way in (in_python, on_the_command_line):
        agent = way("bic", {"buffer_size": 30, "num_samples": 4, "policy": None}, made, tmp_path)
        assert (agent.rehearsal.config.policy, agent.rehearsal.config.buffer_size) == ("class_balanced", 30)
    assert in_python("bic", None).rehearsal.config == short_names.bic.memory


@pytest.mark.parametrize("way", [in_python, by_class])
@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("er", {"weighting": "nil"}, r"rehearsal\.weighting=nil: agent er has weighting=none"),
        ("er", {"num_candidates": 3}, r"num_candidates=3 does not go with policy=reservoir \(agent er's own\)"),
        ("er", {"prefetch": "batch"}, r"prefetch=batch does not go with execution=inline \(agent er's own\)"),
        ("nil", {"policy": "reservoir"}, r"policy=reservoir does not go with weighting=nil \(agent nil's own\)"),
        ("bic", {"scope": "global"}, r"scope=global does not go with quota=adaptive \(agent bic's own\)"),
        ("nil_global", {"quota": "adaptive"}, r"quota=adaptive does not go with scope=global \(agent nil_global's"),
        ("gem", {"row_format": "augmented"}, r"augmented does not go with update=task_end \(agent gem's own\)"),
    ],
)
def test_a_value_that_contradicts_the_agents_own_is_refused(
    name: str, given: dict[str, Any], words: str, way: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        way(name, given)


def test_an_agents_memory_says_what_differs_from_its_bases() -> None:
    class Mine(short_names.derpp_task_end):
        memory = RehearsalConfig(policy="fifo", buffer_size=30)

    class Ours(Mine):
        memory = RehearsalConfig(num_representatives=4)

    own = PLAIN | OWN["derpp_task_end"] | {"policy": "fifo"}
    assert Mine.memory.explicit == {k: v for k, v in own.items() if v is not None} | {"buffer_size": 30}
    assert Ours(MLP([4], 1, 4), 6).rehearsal.config == Ours.memory
    assert (Ours.memory.policy, Ours.memory.buffer_size, Ours.memory.num_representatives) == ("fifo", None, 4)


def test_icarl_has_a_size_alone() -> None:
    with pytest.raises(ConfigurationError, match=r"rehearsal\.num_samples: no such key; give one of .*buffer_size"):
        in_python("icarl", {"num_samples": 3})
    assert in_python("icarl", {"buffer_size": 30}).rehearsal.buffer_size == 30
