"""Every access to private or undeclared attributes of Lightning.

``tests/distributed/test_lightning_relied_on.py`` checks that the installed Lightning has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher as Launcher
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch.optim.swa_utils import AveragedModel

__all__ = [
    "Launcher", "average_model_of", "averaging_callbacks", "bring_environment", "callbacks_of", "choose_version",
    "cluster_environment_of", "datamodule_of", "dev_run_batches", "has_progress_bar", "has_version",
    "log_interval", "loggers_write", "monitored_by", "optimizers_to_device", "overfit_batches",
    "reload_loaders_each_epoch", "reload_training_data", "reload_validation_data", "replace_save", "restore_save",
    "set_callbacks", "set_wrapped_io", "starts_scripts", "step_is_open", "synchronises_batchnorm", "trainer_of",
    "validates_by_time", "wrap_fetching", "wrap_hpc_choice", "wrap_save", "wrap_srun_checks", "wrapped_io",
]  # fmt: skip


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return a trainer's callbacks, which one of its connectors sets."""
    untyped: Any = trainer
    callbacks: list[pl.Callback] = untyped.callbacks
    return callbacks


def set_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """Replace a trainer's list of callbacks; a loop over the present list is not affected."""
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


def monitored_by(watcher: object) -> str:
    """Return the name of the value that a callback or a learning-rate configuration monitors; empty without one.

    Args:
        watcher: the callback or the configuration.
    """
    return str(getattr(watcher, "monitor", None) or "")


def step_is_open(trainer: pl.Trainer) -> bool:
    """Return whether the present training batch has begun and has not been trained on.

    Args:
        trainer: the trainer.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current  # declared as its base class
    return progress.processed != progress.ready


def synchronises_batchnorm(trainer: pl.Trainer) -> bool:
    """Return whether ``sync_batchnorm`` is set, or layers are synchronised by a plugin of the user's."""
    return vars(trainer.strategy).get("_layer_sync") is not None


def starts_scripts(strategy: DDPStrategy) -> bool:
    """Return whether the workers run the user's script, and are not spawned or forked for each call of the trainer."""
    return strategy._start_method == "popen"


def datamodule_of(trainer: pl.Trainer) -> Any:
    """Return the data module of the trainer's present call, or None."""
    return getattr(trainer, "datamodule", None)


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """Return a module's trainer; None if the module is not attached, where ``module.trainer`` raises."""
    return module._trainer


def dev_run_batches(trainer: pl.Trainer) -> int:
    """Return the batches of each epoch under ``fast_dev_run``; 0 without."""
    untyped: Any = trainer
    return int(untyped.fast_dev_run)


def has_progress_bar(trainer: pl.Trainer) -> bool:
    """Return whether a progress bar is shown."""
    bar: Any = trainer.progress_bar_callback
    return bar is not None and bool(getattr(bar, "is_enabled", True))


def validates_by_time(trainer: pl.Trainer) -> bool:
    """Return whether ``val_check_interval`` is a time."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def overfit_batches(trainer: pl.Trainer) -> int | float:
    """Return the trainer's ``overfit_batches``; 0 without."""
    untyped: Any = trainer
    batches: int | float = untyped.overfit_batches
    return batches


def replace_save(trainer: pl.Trainer, save: Callable[..., None]) -> None:
    """Replace ``trainer.save_checkpoint`` of this trainer by another function."""
    vars(trainer)["save_checkpoint"] = save


def restore_save(trainer: pl.Trainer) -> None:
    """Undo ``replace_save``; safe to repeat."""
    vars(trainer).pop("save_checkpoint", None)


def wrap_save(trainer: pl.Trainer, wrapper: Callable[[Any], Callable[..., None]]) -> Callable[[], None]:
    """Put a function around ``trainer.save_checkpoint`` of this trainer.

    Args:
        trainer: the trainer.
        wrapper: takes the function and returns what is called in its place.

    Returns:
        What undoes this, unless ``replace_save`` or ``restore_save`` has done so before.
    """
    wrapped = wrapper(trainer.save_checkpoint)
    replace_save(trainer, wrapped)

    def undo() -> None:
        if vars(trainer).get("save_checkpoint") is wrapped:
            restore_save(trainer)

    return undo


def wrap_fetching(trainer: pl.Trainer, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    """Call functions before and after a fit waits for its next training batch; return what undoes this."""
    loop: Any = trainer.fit_loop.epoch_loop
    own_before, own_after = loop._on_before_fetch, loop._on_after_fetch

    def start() -> None:
        before()
        own_before()

    def stop() -> None:
        own_after()
        after()

    vars(loop).update(_on_before_fetch=start, _on_after_fetch=stop)

    def undo() -> None:
        for name in ("_on_before_fetch", "_on_after_fetch"):
            vars(loop).pop(name, None)

    return undo


def log_interval(trainer: pl.Trainer) -> int:
    """Return the number of steps between two writings of the loggers; 0 for never."""
    untyped: Any = trainer
    return int(untyped.log_every_n_steps)


def loggers_write(trainer: pl.Trainer) -> bool:
    """Return, within a training step that steps the optimizer, whether loggers write its values."""
    return bool(trainer._logger_connector.should_update_logs)


def reload_loaders_each_epoch(trainer: pl.Trainer) -> Callable[[], None]:
    """Let a trainer ask for its loaders before every epoch; return what undoes this."""
    untyped: Any = trainer
    before, untyped.reload_dataloaders_every_n_epochs = untyped.reload_dataloaders_every_n_epochs, 1

    def undo() -> None:
        untyped.reload_dataloaders_every_n_epochs = before

    return undo


def reload_training_data(trainer: pl.Trainer) -> None:
    """Make the next epoch ask for its training loader, whatever ``reload_dataloaders_every_n_epochs`` says."""
    trainer.fit_loop._last_train_dl_reload_epoch = float("-inf")


def reload_validation_data(trainer: pl.Trainer) -> None:
    """Make the next validation ask for its loaders, whatever ``reload_dataloaders_every_n_epochs`` says."""
    trainer.fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = float("-inf")


def cluster_environment_of(trainer: pl.Trainer) -> ClusterEnvironment:
    """Return the cluster environment that a trainer detected."""
    return trainer._accelerator_connector.cluster_environment


def wrapped_io(outer: CheckpointIO) -> CheckpointIO | None:
    """Return the plugin that another one wraps, as ``AsyncCheckpointIO`` does; None if it wraps none."""
    inner = getattr(outer, "checkpoint_io", None)
    return inner if isinstance(inner, CheckpointIO) else None


def set_wrapped_io(outer: CheckpointIO, inner: CheckpointIO) -> None:
    """Replace the plugin inside one that wraps a plugin, as ``AsyncCheckpointIO`` does, which has no setter for it."""
    wrapping: Any = outer
    wrapping._checkpoint_io = inner


def has_version(logger: CSVLogger | TensorBoardLogger) -> bool:
    """Return whether a logger was given, or has chosen, its version."""
    return logger._version is not None


def choose_version(logger: CSVLogger | TensorBoardLogger, choose: Callable[[Callable[[], int]], int]) -> None:
    """Let a function choose the version of a logger that was given none.

    Args:
        logger: the logger.
        choose: returns the version, given the logger's own function that finds the first free one.
    """
    own = logger._get_next_version
    vars(logger)["_get_next_version"] = lambda: choose(own)


def wrap_srun_checks(unless: Callable[[], bool]) -> None:
    """Skip Lightning's advice to use ``srun``, and its check of what ``srun`` sets, if ``unless()``. Safe to repeat."""
    untyped: Any = SLURMEnvironment
    used, variables = SLURMEnvironment._validate_srun_used, SLURMEnvironment._validate_srun_variables
    if used.__module__ != __name__:
        untyped._validate_srun_used = staticmethod(_skipped(used, unless))
        untyped._validate_srun_variables = staticmethod(_skipped(variables, unless))


def _skipped(check: Callable[[], None], skip: Callable[[], bool]) -> Callable[[], None]:
    def checked() -> None:
        if not skip():
            check()

    return checked


def bring_environment(strategy: str, environment: Callable[[], ClusterEnvironment]) -> None:
    """Let a trainer that is given a strategy's name take its cluster environment, and detect none. Safe to repeat.

    Args:
        strategy: the name.
        environment: makes the cluster environment.
    """
    untyped: Any = _AcceleratorConnector
    detect = untyped._choose_and_init_cluster_environment
    if detect.__module__ != __name__:
        untyped._choose_and_init_cluster_environment = lambda connector: (
            environment() if connector._strategy_flag == strategy else detect(connector)
        )


def wrap_hpc_choice(takes: Callable[[Path], bool]) -> None:
    """Let a function say which checkpoints of SLURM's signal Lightning may resume from by itself. Safe to repeat.

    Args:
        takes: called with the ``hpc_ckpt_N.ckpt`` of the trainer's folder, the latest first; the first that it takes
            is used.
    """
    untyped: Any = _CheckpointConnector
    own = untyped._hpc_resume_path
    if own.fget.__module__ == __name__:
        return

    def choose(connector: _CheckpointConnector) -> str | None:
        folder = str(connector.trainer.default_root_dir)
        if "://" in folder:
            remote: str | None = own.fget(connector)
            return remote
        numbered = {file: re.fullmatch(r"hpc_ckpt_(\d+)\.ckpt", file.name) for file in Path(folder).glob("hpc_ckpt_*")}
        found = [(int(match[1]), file) for file, match in numbered.items() if match]
        return next((str(file) for _, file in sorted(found, reverse=True) if takes(file)), None)

    untyped._hpc_resume_path = property(choose)
