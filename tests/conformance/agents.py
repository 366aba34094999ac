"""Every agent on the small stream, by its short name."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP

NAMES = short_names.__all__
# Agents whose memory the callback manages, and those that keep samples in another way.
REHEARSING = [name for name in NAMES if hasattr(getattr(short_names, name), "memory")]
KEEPING = [*REHEARSING, "icarl", "icarl_v1"]
# What a stream has to be for them, beside tasks of two classes.
STREAMS: dict[str, dict[str, Any]] = {"joint": {"scenario": "none"}, "cumulative": {"concatenate_tasksets": True}}


def make(name: str, data: Any, seed: int = 0, memory: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Return an agent with room for twelve samples, of which four are rehearsed a step."""
    pl.seed_everything(seed)
    common = {"epochs_per_task": 2, "lr": 0.05, "momentum": 0.9, "input_spec": data.input_spec} | kwargs
    kind = getattr(short_names, name)
    if name in KEEPING:
        config: dict[str, Any] = {"buffer_size": 12}
        if name in REHEARSING:
            config["num_samples"] = 4
        if name == "mir":
            common = {"num_rehearsed": 2} | common
        common["rehearsal"] = config | (memory or {})
    if name == "ranpac":
        common["projection_dim"] = 16
    return kind(MLP([8]), data.num_classes, **common)
