"""Which agents learn with which strategy, precision, accumulation and compilation: declared here and nowhere else.

Refusals before the first step, the tests of every combination and ``docs/strategies.md`` go by these functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from dcl_lightning._lightning import averaging_callbacks, callbacks_of, starts_scripts, synchronises_batchnorm
from dcl_lightning.distributed.fsdp2 import FSDP2Strategy
from dcl_lightning.distributed.horovod.strategy import HorovodStrategy
from dcl_lightning.errors import ConfigurationError

__all__ = ["PRECISIONS", "STRATEGIES", "Learner", "name_of_strategy", "refuse_name", "refuse_strategy", "supported"]

# By the names of ``trainer.strategy``; ``auto`` is one process.
STRATEGIES = ("auto", "ddp", "ddp_spawn", "horovod", "fsdp2", "fsdp", "deepspeed")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
# Strategies with which no agent learns: why, and what to give.
_NO_AGENT = {
    "ddp_spawn": "leaves memory, results and exemplars in processes that end with the fit: give ddp",
    "fsdp": "wraps the network in modules past which agents go: give fsdp2, or ddp if the network fits on one device",
    "deepspeed": "has an optimizer and checkpoints of its own: give fsdp2, or ddp if the network fits on one device",
}


# Beginnings of Lightning's other names for them.
_VARIANTS = {
    "ddp_spawn_": "ddp_spawn", "ddp_fork": "ddp_spawn", "ddp_notebook": "ddp_spawn", "fsdp_": "fsdp",
    "deepspeed_": "deepspeed",
}  # fmt: skip


class Learner(Protocol):
    """What is asked of an agent's class."""

    @property
    def needs_whole_weights(self) -> str:
        """What it does that takes all weights or gradients, as a predicate; empty if nothing."""
        ...


def supported(agent: Learner | type[Learner], strategy: str, precision: str = "32-true") -> str | None:
    """Return None if an agent learns with these values together, else the reason with what to give instead.

    Accumulation and compilation go with all of them. Where it learns, N workers with a batch of B are one process with
    a batch of N B.

    Args:
        agent: the agent, or its class.
        strategy: one of ``STRATEGIES``.
        precision: one of ``PRECISIONS``, or another of the trainer's.
    """
    if strategy in _NO_AGENT:
        return f"trainer.strategy={strategy} {_NO_AGENT[strategy]}"
    if strategy != "fsdp2":
        return None
    if agent.needs_whole_weights:
        return (
            f"trainer.strategy=fsdp2 leaves each worker a part of the weights, and the agent "
            f"{agent.needs_whole_weights}: give trainer.strategy=ddp"
        )
    if precision == "16-mixed":
        return (
            "trainer.precision=16-mixed skips steps by a worker's own gradients, of which it has a part with "
            "trainer.strategy=fsdp2: give trainer.precision=bf16-mixed"
        )
    return None


def name_of_strategy(strategy: Strategy) -> str | None:
    """Return which of ``STRATEGIES`` a trainer's strategy is; None for another one, of which nothing is said here."""
    if isinstance(strategy, DDPStrategy):
        return "ddp" if starts_scripts(strategy) else "ddp_spawn"
    kinds = {
        HorovodStrategy: "horovod", ModelParallelStrategy: "fsdp2", FSDPStrategy: "fsdp",
        DeepSpeedStrategy: "deepspeed", SingleDeviceStrategy: "auto",
    }  # fmt: skip
    return next((name for kind, name in kinds.items() if isinstance(strategy, kind)), None)


def refuse_name(given: object) -> None:
    """Refuse a strategy with which no agent learns by its name, before Lightning makes it or starts processes.

    Args:
        given: ``trainer.strategy``, by name or already made.

    Raises:
        ConfigurationError: with what to give instead.
    """
    if isinstance(given, str):
        name = next((name for start, name in _VARIANTS.items() if given.startswith(start)), given)
        if name in _NO_AGENT:
            raise ConfigurationError(f"trainer.strategy={given} {_NO_AGENT[name]}")


def refuse_strategy(agent: Learner, trainer: pl.Trainer, values: dict[str, object]) -> None:
    """Refuse a strategy with which an agent does not learn; every worker comes to the same.

    Args:
        agent: that is to learn.
        trainer: of the fit, before it begins.
        values: the agent's arguments.

    Raises:
        ConfigurationError: with what to give instead.
    """
    name = name_of_strategy(trainer.strategy)
    if name is None:
        return
    reason = supported(agent, name, str(trainer.precision))
    if reason is None and name == "fsdp2":
        reason = next(_other_reasons(trainer, values), None)
    if reason is not None:
        raise ConfigurationError(reason)


def _other_reasons(trainer: pl.Trainer, values: dict[str, object]) -> Iterator[str]:
    """Yield why values beside those of ``supported`` do not go with fsdp2."""
    if not isinstance(trainer.strategy, FSDP2Strategy):
        yield (
            f"trainer.strategy={type(trainer.strategy).__name__} may also split a network's layers, for which agents "
            "have no plan: give trainer.strategy=fsdp2"
        )
    if trainer.world_size > 1 and values.get("forward") == "separate":
        yield (
            "model.forward=separate does not go with trainer.strategy=fsdp2: a worker without representatives makes no "
            "second pass, and the others would wait for it; give model.forward=joint, or trainer.strategy=ddp"
        )
    if values.get("memory_format") == "channels_last":
        yield (
            "model.memory_format=channels_last converts weights, which trainer.strategy=fsdp2 has in parts: give "
            "model.memory_format=auto"
        )
    if synchronises_batchnorm(trainer):
        yield "trainer.sync_batchnorm=true does nothing with trainer.strategy=fsdp2: leave it out, or give ddp"
    swa = (callback for callback in callbacks_of(trainer) if isinstance(callback, StochasticWeightAveraging))
    for callback in (*averaging_callbacks(trainer), *swa):
        yield (
            f"{type(callback).__name__} copies whole weights, which no worker has with trainer.strategy=fsdp2: leave "
            "it out, or give trainer.strategy=ddp"
        )
