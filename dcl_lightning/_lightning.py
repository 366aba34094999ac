"""Every access to what Lightning has and does not promise: private names, and attributes that it declares nowhere.

``tests/distributed/test_lightning_relied_on.py`` looks at each in the installed Lightning.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device
from lightning.pytorch.strategies.launchers.launcher import _Launcher as Launcher

__all__ = [
    "Launcher", "callbacks_of", "cluster_environment_of", "datamodule_of", "log_interval", "loggers_write",
    "optimizers_to_device", "reload_training_data", "reload_validation_data", "set_callbacks", "trainer_of",
]  # fmt: skip


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return a trainer's callbacks, which one of its connectors sets.

    Args:
        trainer: the trainer.
    """
    untyped: Any = trainer
    callbacks: list[pl.Callback] = untyped.callbacks
    return callbacks


def set_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """Give a trainer another list of callbacks: one that it is going through at the moment stays as it is.

    Args:
        trainer: the trainer.
        callbacks: in the order in which they are called.
    """
    untyped: Any = trainer
    untyped.callbacks = callbacks


def datamodule_of(trainer: pl.Trainer) -> Any:
    """Return the data module of the present call of a trainer; None without one.

    Args:
        trainer: the trainer.
    """
    return getattr(trainer, "datamodule", None)


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """Return a module's trainer; None where ``module.trainer`` raises, as it belongs to none.

    Args:
        module: the module.
    """
    return module._trainer


def log_interval(trainer: pl.Trainer) -> int:
    """Return the steps from one writing of the loggers to the next; 0 for never.

    Args:
        trainer: the trainer.
    """
    untyped: Any = trainer
    return int(untyped.log_every_n_steps)


def loggers_write(trainer: pl.Trainer) -> bool:
    """Return whether loggers write the values of the present step, a batch that steps the optimizer.

    Args:
        trainer: of the fit, within a training step.
    """
    return bool(trainer._logger_connector.should_update_logs)


def reload_training_data(trainer: pl.Trainer) -> None:
    """Let the next epoch ask for its training loader, however long ago the last one was loaded.

    Args:
        trainer: of the fit.
    """
    trainer.fit_loop._last_train_dl_reload_epoch = float("-inf")


def reload_validation_data(trainer: pl.Trainer) -> None:
    """Let the next validation ask for its loaders, however long ago the last ones were loaded.

    Args:
        trainer: of the fit.
    """
    trainer.fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = float("-inf")


def cluster_environment_of(trainer: pl.Trainer) -> ClusterEnvironment:
    """Return the cluster that a trainer has found itself in.

    Args:
        trainer: the trainer.
    """
    return trainer._accelerator_connector.cluster_environment
