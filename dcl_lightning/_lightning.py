"""Every access to what Lightning has and does not promise: private names, and attributes that it declares nowhere.

``tests/distributed/test_lightning_relied_on.py`` looks at each in the installed Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies.launchers.launcher import _Launcher as Launcher
from torch.optim.swa_utils import AveragedModel

__all__ = [
    "Launcher", "average_model_of", "averaging_callbacks", "callbacks_of", "choose_version", "cluster_environment_of",
    "datamodule_of", "has_version", "log_interval", "loggers_write", "optimizers_to_device", "reload_training_data",
    "reload_validation_data", "set_callbacks", "set_wrapped_io", "trainer_of", "wrap_srun_check",
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


def averaging_callbacks(trainer: pl.Trainer) -> list[Any]:
    """Return a trainer's ``WeightAveraging`` callbacks, a class that Lightning has since 2.6.

    Args:
        trainer: the trainer.
    """
    kind = getattr(lightning_callbacks, "WeightAveraging", ())
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kind)]


def average_model_of(callback: Any) -> AveragedModel | None:
    """Return the averaged module of a ``WeightAveraging`` callback; None before its set-up.

    Args:
        callback: the callback.
    """
    average: AveragedModel | None = callback._average_model
    return average


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


def set_wrapped_io(outer: CheckpointIO, inner: CheckpointIO) -> None:
    """Give another plugin to one that wraps a plugin, as ``AsyncCheckpointIO`` does, which lets nobody set it.

    Args:
        outer: wraps a plugin.
        inner: what it wraps from now on.
    """
    wrapping: Any = outer
    wrapping._checkpoint_io = inner


def has_version(logger: CSVLogger | TensorBoardLogger) -> bool:
    """Return whether a logger was given, or has chosen, its version.

    Args:
        logger: the logger.
    """
    return logger._version is not None


def choose_version(logger: CSVLogger | TensorBoardLogger, choose: Callable[[Callable[[], int]], int]) -> None:
    """Let a logger that was given no version ask a function for one.

    Args:
        logger: the logger.
        choose: takes the logger's own way to find the first free version, and returns the version.
    """
    own = logger._get_next_version
    vars(logger)["_get_next_version"] = lambda: choose(own)


def wrap_srun_check(unless: Callable[[], bool]) -> None:
    """Leave out Lightning's check of the variables that ``srun`` sets where a condition holds. Safe to repeat.

    Args:
        unless: the condition.
    """
    check = SLURMEnvironment._validate_srun_variables
    if check.__module__ == __name__:
        return

    def validate() -> None:
        if not unless():
            check()

    untyped: Any = SLURMEnvironment
    untyped._validate_srun_variables = staticmethod(validate)
