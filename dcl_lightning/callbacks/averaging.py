"""Lightning's callbacks that average weights, in a stream of tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn

from dcl_lightning._lightning import callbacks_of
from dcl_lightning.errors import ConfigurationError

__all__ = ["average_the_network_alone", "averaged_network", "refuse_stochastic_averaging", "settle_averages"]

_NETWORK = ("backbone.", "head.")


def _averaging(trainer: pl.Trainer) -> list[Any]:
    kind = getattr(callbacks, "WeightAveraging", ())  # Lightning has it since 2.6
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kind)]


@contextmanager
def averaged_network(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Put the averaged weights of ``WeightAveraging`` callbacks in place, by the hooks that do so for validation.

    Args:
        trainer: of the fit.
        module: the module that is trained.
    """
    averaging = _averaging(trainer)
    for callback in averaging:
        callback.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for callback in reversed(averaging):
            callback.on_validation_epoch_end(trainer, module)


def settle_averages(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Average now what is averaged at an epoch's end: after the last step of a task no weight changes until then.

    Args:
        trainer: of the fit, after the last step of the present epoch.
        module: the module that is trained.
    """
    for callback in _averaging(trainer):
        callback.on_train_epoch_end(trainer, module)  # does nothing when it is called again


def average_the_network_alone(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let ``WeightAveraging`` average an agent's network, and leave alone what the agent notes in buffers.

    Which classes were seen, class means and corrections are no weights: an average of them would be evaluated and kept
    in place of what they are. The averaged module shares them with the agent's.

    Args:
        trainer: at the start of the fit, the module on its device.
        module: the agent; one without ``backbone`` and ``head`` stays as Lightning has it.
    """
    names = [name for name, _ in module.named_buffers() if not name.startswith(_NETWORK)]
    if not isinstance(getattr(module, "backbone", None), nn.Module) or not names:
        return
    for callback in _averaging(trainer):
        averaged: Any = getattr(callback, "_average_model", None)
        if averaged is None:
            continue
        update = type(averaged).update_parameters

        def update_network(model: nn.Module, averaged: Any = averaged, update: Any = update) -> None:
            notes = _set_buffers(model, dict.fromkeys(names))
            _set_buffers(averaged.module, dict.fromkeys(names))
            try:
                update(averaged, model)
            finally:
                _set_buffers(model, notes)
                _set_buffers(averaged.module, notes)

        averaged.update_parameters = update_network
        _set_buffers(averaged.module, {name: module.get_buffer(name) for name in names})


def _set_buffers(module: nn.Module, values: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Set buffers by their names, None for one that is passed over; return what they were."""
    before = {}
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        before[name] = part._buffers[leaf]
        part._buffers[leaf] = value
    return before


def refuse_stochastic_averaging(trainer: pl.Trainer) -> None:
    """Refuse ``StochasticWeightAveraging``: it averages over tasks, and sets the average after the last evaluation.

    Args:
        trainer: has the callbacks.

    Raises:
        ConfigurationError: with what to use.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging):
            raise ConfigurationError(
                f"{type(callback).__name__} replaces the schedule of each task by its own, and sets the average of the "
                "stream's last epochs after the last task was evaluated: use WeightAveraging or EMAWeightAveraging, "
                "whose averaged weights are evaluated at each task's end"
            )
