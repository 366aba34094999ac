"""The axes of a configuration, draws of a value for each, and the axes that an error message names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from dcl_lightning.agents import short_names
from dcl_lightning.memory.policies import POLICIES

Draw = dict[str, Any]

# Each axis with its values, the default first. None leaves the key out.
_AGENTS = ("base", *(name for name in short_names.__all__ if name != "base"))
REHEARSING = {name for name in _AGENTS if name.startswith("nil") or hasattr(getattr(short_names, name), "memory")}
ICARL = {"icarl", "icarl_v1"}

SPACE: dict[str, tuple[Any, ...]] = {
    # agent
    "agent": _AGENTS,
    "epochs_per_task": (1, 2, "unequal"),
    "momentum": (0.0, 0.9),
    "optimizer": (None, "adam"),
    "optimizer_reset": (True, False),
    "schedule": (None, "milestones", "warmup_epochs"),
    "train_classes": ("all", "seen"),
    "task_aware": (False, True),
    "future_tasks": (False, True),
    "part": ("trained", "frozen", "in_evaluation_mode"),
    "head": ("linear", "cosine", "per_task"),
    "forward": ("joint", "separate"),
    "unmet_classes": ("masked", "open"),
    "draws": ("shared", "separate"),
    # memory
    "size": ({"buffer_size": 9}, {"buffer_size": 16}, {"num_representatives": 2}, {"rehearsal_ratio": 0.3}),
    "num_samples": (3, 1, 5),
    "num_candidates": (None, 2, 4),
    "policy": (None, "nil", "class_balanced", "reservoir", "class_reservoir", "greedy", "fifo"),
    "quota": (None, "fixed", "adaptive"),
    "update": (None, "step", "task_end"),
    "draw_from": (None, "seen", "past"),
    "loss": (None, "mean", "sum"),
    "weighting": (None, "nil", "none"),
    "scope": (None, "local", "global"),
    "execution": (None, "inline", "blocking", "nonblocking"),
    "prefetch": (None, "draw", "device", "batch"),
    "row_format": (None, "inputs", "index", "augmented"),
    "storage": (None, "cpu", "folder"),
    "exemplars": (None, "union", "per_step"),
    "selection": (None, "herding", "nearest"),
    "num_rehearsed": (1, 2, 3),
    # trainer
    "precision": ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"),
    "accumulate_grad_batches": (1, 2, 3),
    "clipping": (None, "norm", "value"),
    "stopping": (None, "patience", "threshold", "amid_an_epoch"),
    "limit": (None, "max_steps", "max_time"),
    "limit_train_batches": (1.0, 2, 0.5),
    "validation": ("epoch", "every_second_epoch", "every_second_batch", "half_epoch", "across_epochs", "none"),
    "sanity": (0, 2),
    "checkpoint": ("steps", "epochs"),
    "resume": ("step", "task_end", "after_task_end", "last"),
    # data
    "scenario": ("class", "domain", "blurry", "given"),
    "boundaries": ("known", "hidden"),
    "num_classes": (4, 6),
    "num_tasks": (2, 3),
    "sizes": ("equal", "unequal"),
    "one_row_left": (False, True),
    "inputs": ("uint8", "float"),
    "augment": (False, True),
    "batch_size": (5, 3, 8),
    "val_ratio": (0.0, 0.25),
    "sharding": ("epoch", "fixed"),
    "concatenate_tasksets": (False, True),
    # afterwards
    "again": ("new", "same"),
    "second": _AGENTS,
    "seed": tuple(range(1000)),
}

# Arguments of agents as they are; not all agents have each.
OWN_AXES = ("head", "forward", "unmet_classes", "draws", "train_classes")

MEMORY_AXES = ("num_samples", "num_candidates", "policy", "quota", "update", "draw_from", "loss", "weighting", "scope",
           "execution", "prefetch", "row_format", "storage")  # fmt: skip

OFFERING_ALL = tuple(name for name, policy in POLICIES.items() if policy.offers_all)

# How often an axis leaves its default; the others do so half of the time, those without a default always.
_OFTEN = {
    "agent": 1.0, "second": 1.0, "seed": 1.0, "optimizer": 0.15, "policy": 0.4, "quota": 0.3, "update": 0.3,
    "draw_from": 0.2, "loss": 0.2, "weighting": 0.2, "scope": 0.25, "prefetch": 0.35, "row_format": 0.4,
    "precision": 0.4, "num_candidates": 0.3, "schedule": 0.25, "train_classes": 0.3, "task_aware": 0.2,
    "future_tasks": 0.2, "part": 0.3,
    "stopping": 0.3, "limit": 0.2, "limit_train_batches": 0.25, "validation": 0.5, "sanity": 0.2, "scenario": 0.4,
    "boundaries": 0.1, "concatenate_tasksets": 0.03, "checkpoint": 0.2, "augment": 0.25, "resume": 0.7, "size": 0.6,
    "epochs_per_task": 0.35, "head": 0.25,
}  # fmt: skip

# By which words a message names an axis that cannot be recognised by its own name.
_WORDS = {
    "agent": ("agent ",), "clipping": ("gradient_clip",), "stopping": ("EarlyStopping",),
    "validation": ("val_check_interval", "check_val_every_n_epoch"), "limit": ("max_steps", "max_time"),
    "size": ("buffer_size", "num_representatives", "rehearsal_ratio"),
    "schedule": ("milestones", "warmup_epochs"), "part": ("requires_grad", "frozen"),
}  # fmt: skip


def draw(seed: int, number: int) -> Draw:
    """Return a draw: the values that differ from the defaults, and the agent."""
    rng = np.random.default_rng((seed, number))
    found: Draw = {}
    for axis, values in SPACE.items():
        leaves = rng.random() < _OFTEN.get(axis, 0.5)
        value = values[int(rng.integers(0 if _OFTEN.get(axis) == 1.0 else 1, len(values)))]
        if leaves and value != values[0]:
            found[axis] = value
    agent = found.setdefault("agent", "base")
    if agent == "joint" and rng.random() < 0.9:
        found["scenario"] = "none"
    if agent == "cumulative" and rng.random() < 0.9:
        found["concatenate_tasksets"] = True
    # Contradictions that would come too often are made rarer here; some are left, to be refused.
    if rng.random() < 0.9:
        if "optimizer" in found:
            found.pop("momentum", None)
        if "stopping" in found:
            found["val_ratio"] = 0.25
            found.pop("boundaries", None)
            if found["stopping"] == "amid_an_epoch":
                found["validation"] = "every_second_batch"
        if found.get("prefetch") not in (None, "sample") and found.get("execution") in (None, "inline"):
            found["execution"] = "blocking"
        if found.get("policy") in OFFERING_ALL:
            found.pop("num_candidates", None)
            if agent.startswith("nil"):
                found["weighting"] = "none"
        if found.get("scope") == "global" and found.get("quota") == "adaptive":
            found.pop("quota")
        if found.get("row_format") == "augmented":
            found.pop("update", None)
        if found.get("validation") == "every_second_batch":
            found.pop("limit_train_batches", None)
    if rng.random() < 0.7:
        kind = getattr(short_names, agent)
        for axis, value in getattr(kind, "required", {}).items():  # another method's memory
            if found.get(axis, value) != value:
                found.pop(axis)
        if agent in ICARL and found.get("execution") == "nonblocking":
            found.pop("execution")
        own = getattr(getattr(kind, "memory", None), "policy", None)
        if found.get("policy", own) in OFFERING_ALL:
            found.pop("num_candidates", None)
    applies = _applicable(agent)
    return {axis: value for axis, value in found.items() if applies(axis)}


def _applicable(agent: str) -> Callable[[str], bool]:
    def applies(axis: str) -> bool:
        if axis in ("exemplars", "selection"):
            return agent in ICARL
        if axis == "num_rehearsed":
            return agent == "mir"
        if axis in ("size", "num_samples", "execution"):
            return agent in REHEARSING | ICARL
        if axis in OWN_AXES:
            return axis in inspect.signature(getattr(short_names, agent)).parameters
        return axis not in MEMORY_AXES or agent in REHEARSING

    return applies


def value_of(drawn: Draw, axis: str) -> Any:
    """Return the value of an axis."""
    return drawn.get(axis, SPACE[axis][0])


def recipe(drawn: Draw, file: str = "tests/conformance/test_lattice.py") -> str:
    """Return the line that repeats a draw alone."""
    return f"LATTICE_DRAW='{json.dumps(drawn)}' python -m pytest {file}"


def named_axes(message: str, drawn: Draw) -> list[str]:
    """Return the axes of a draw, off their defaults, that a message names."""
    return [axis for axis in drawn if any(word in message for word in _WORDS.get(axis, (axis,)))]


def obeyed(message: str, drawn: Draw) -> Draw:
    """Return a draw without what a refusal names, the agent last."""
    named = named_axes(message, drawn)
    named = [axis for axis in named if axis != "agent"] or named
    return {axis: value for axis, value in drawn.items() if axis not in named} | (
        {"agent": "base"} if "agent" in named else {"agent": drawn["agent"]}
    )
