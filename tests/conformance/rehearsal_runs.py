"""Fits with a rehearsal memory over the small stream, and comparisons of what they left in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from dcl_lightning.agents.nil import NIL
from dcl_lightning.backbones import MLP
from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.memory.manager import MemoryManager
from tests.conformance.small_stream import make_data, make_trainer, weights


def make_nil(data, seed: int = 0, agent: dict[str, Any] | None = None, **config):
    pl.seed_everything(seed)
    config = {"buffer_size": 12, "num_candidates": 4, "num_samples": 3} | config
    config["seed"] = config.pop("rehearsal_seed", None)
    if config.get("policy") == "reservoir":
        config |= {"num_candidates": None, "weighting": "none"}
    common = {"epochs_per_task": 2, "lr": 0.05, "momentum": 0.9, "input_spec": data.input_spec} | (agent or {})
    return NIL(MLP([8]), data.num_classes, rehearsal=RehearsalConfig(**config), **common)


def watch(agent, look=None):
    """Record the loss of each step; ``look(batch, loss)`` sees the step from within."""
    losses: list[torch.Tensor] = []
    inner = agent.training_loss

    def spy(batch):
        loss, logits = inner(batch)
        losses.append(loss.detach().clone())
        if look is not None:
            look(batch, loss.detach())
        return loss, logits

    agent.training_loss = spy
    return losses


def fit(folder: Path, data=None, look=None, callbacks=(), trainer=None, agent=None, ckpt=None, seed: int = 0, **config):
    data = data or make_data()
    module = make_nil(data, seed=seed, agent=agent, **config)
    losses = watch(module, None if look is None else lambda batch, loss: look(module, batch, loss))
    options = {"limit_val_batches": 0} | (trainer or {})
    logger = options.pop("logger", None)
    fitter = make_trainer(folder, callbacks, **options)
    if logger is not None:
        fitter.loggers = logger if isinstance(logger, list) else [logger]
    fitter.fit(module, datamodule=data, ckpt_path=ckpt)
    return module, torch.stack(losses)


def buffer_of(agent) -> RehearsalBuffer:
    return agent.rehearsal.manager.buffer


def stored_rows(agent) -> dict[str, torch.Tensor]:
    buffer = buffer_of(agent)
    return buffer.store.gather(buffer.slots_at(torch.arange(len(buffer))))


def memory_state(manager: MemoryManager) -> dict[str, Any]:
    """Return all of a worker's memory: its state, and its rows by the slots that they are in."""
    slots = torch.from_numpy(manager.buffer.state.filled[: len(manager.buffer)])
    rows = [(name, manager.buffer.store.column(name, slots)) for name in manager.buffer.store.names]
    return manager.state_dict() | {"slots": slots, "rows": dict(rows)}


def leaves(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [leaf for key in sorted(state) for leaf in leaves(state[key])]
    return [leaf for part in state for leaf in leaves(part)] if isinstance(state, (list, tuple)) else [state]


def same(first: Any, second: Any) -> bool:
    ours, theirs = leaves(first), leaves(second)
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


def assert_same_run(first, second) -> None:
    assert torch.equal(first[1], second[1]), (first[1], second[1])
    assert torch.equal(weights(first[0]), weights(second[0]))
    assert same(memory_state(first[0].rehearsal.manager), memory_state(second[0].rehearsal.manager))
