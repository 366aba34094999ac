"""Wraps hooks of Lightning, and calls the task hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from dcl_lightning._lightning import callbacks_of, datamodule_of
from dcl_lightning.types import Task

__all__ = ["call_callbacks", "call_task_hook", "pass_through", "wrap_hook"]


def pass_through(
    trainer: pl.Trainer, module: pl.LightningModule, name: str, add: Callable[[Any], Any], behind: bool = False
) -> Callable[[], None]:
    """Let training batches pass through ``add`` before a hook, on the object whose hook Lightning calls.

    Args:
        trainer: of the fit.
        module: the module that is trained.
        name: of the hook, which takes and returns a batch.
        add: takes and returns a batch.
        behind: pass through ``add`` what the hook returned.

    Returns:
        What restores the hook.
    """
    data = datamodule_of(trainer)
    # Lightning calls the data module's hook if that has one, else the module's; if neither has, it makes no
    # difference, but of a module's beside a data module it warns.
    theirs = data is not None and is_overridden(name, data)
    ours = is_overridden(name, module)
    owner: Any = data if data is not None and (theirs or not ours) else module

    def wrapper(original: Any) -> Any:
        def hook(batch: Any, dataloader_idx: int) -> Any:
            if not trainer.training:
                return original(batch, dataloader_idx)
            return add(original(batch, dataloader_idx)) if behind else original(add(batch), dataloader_idx)

        return hook

    return wrap_hook(owner, name, wrapper)


def wrap_hook(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> Callable[[], None]:
    """Put a function around a hook of one object.

    Args:
        owner: has the hook.
        name: of the hook.
        wrapper: takes the hook and returns what is called in its place.

    Returns:
        What restores the hook.
    """
    own = owner.__dict__.get(name)
    owner.__dict__[name] = wrapper(getattr(owner, name))

    def undo() -> None:
        if own is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = own

    return undo


def call_task_hook(name: str, trainer: pl.Trainer, agent: Any, task: Task, done: list[str] | None = None) -> None:
    """Call a hook of the data module, then of the agent, then of the callbacks: of whoever has it.

    Args:
        name: of the hook, ``on_task_start`` or ``on_task_end``.
        trainer: of the fit.
        agent: that is trained.
        task: what the hook is told.
        done: names of those who have returned from it, which are passed over; further ones are added.
    """
    done = [] if done is None else done
    owners = [datamodule_of(trainer), agent, *callbacks_of(trainer)]
    for place, owner in enumerate(owners):
        hook = getattr(owner, name, None)
        known = f"{type(owner).__qualname__} {sum(type(other) is type(owner) for other in owners[:place])}"
        if hook is None or known in done:
            continue
        hook(task) if place < 2 else hook(trainer, agent, task)
        done.append(known)


def call_callbacks(name: str, trainer: pl.Trainer, agent: Any, task: Task) -> None:
    """Call a hook of the callbacks that have it.

    Args:
        name: of the hook, which takes trainer, agent and task.
        trainer: of the fit.
        agent: that is trained.
        task: what the hook is told.
    """
    for callback in callbacks_of(trainer):
        hook = getattr(callback, name, None)
        if hook is not None:
            hook(trainer, agent, task)
