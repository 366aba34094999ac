"""Horovod inside a SLURM allocation: ranks, and when Lightning saves and requeues the job."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from dcl_lightning._lightning import callbacks_of, cluster_environment_of, set_callbacks, wrap_srun_check
from dcl_lightning.distributed.horovod.environment import HorovodEnvironment
from dcl_lightning.distributed.horovod.step_message import StepMessage, step_is_whole
from dcl_lightning.distributed.ranks import launched_by_horovod
from dcl_lightning.errors import ConfigurationError

__all__ = [
    "HorovodSLURMEnvironment",
    "accept_allocation",
    "check_srun",
    "horovod_environment",
    "requeue_between_steps",
    "requeue_together",
]


class HorovodSLURMEnvironment(HorovodEnvironment, SLURMEnvironment):
    """Ranks are Horovod's; to Lightning it is a ``SLURMEnvironment``, so that a job is saved and requeued.

    SLURM's number of tasks counts what ``srun`` would start, which says nothing of the workers that
    ``horovodrun`` and ``mpirun`` start within the allocation: it is not compared with ``devices``.

    Args:
        auto_requeue: whether Lightning saves and requeues the job when SLURM sends ``requeue_signal``.
        requeue_signal: the signal of ``sbatch --signal``; SIGUSR1 if None.
    """

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        # Not SLURMEnvironment's: it refuses allocations of several tasks that were not asked for in srun's way.
        ClusterEnvironment.__init__(self)
        self.auto_requeue = auto_requeue
        self.requeue_signal = requeue_signal or signal.SIGUSR1

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Accept: the launcher has decided.

        Args:
            num_devices: ignored.
            num_nodes: ignored.
        """


def horovod_environment() -> HorovodEnvironment:
    """Return the environment for where this process runs."""
    # As SLURMEnvironment.detect, by which Lightning decides at resume, but without its advice to use srun.
    batch = "SLURM_NTASKS" in os.environ and SLURMEnvironment.job_name() not in ("bash", "interactive")
    return HorovodSLURMEnvironment() if batch else HorovodEnvironment()


def accept_allocation() -> None:
    """Spare Horovod's workers Lightning's refusal of ``sbatch --ntasks``, which is for tasks that ``srun`` starts.

    Given a strategy's name, Lightning makes an environment of its own before there is a strategy that has one, and that
    one insists on ``--ntasks-per-node``. Safe to repeat.
    """
    wrap_srun_check(unless=launched_by_horovod)


def check_srun() -> None:
    """Refuse to be one of several tasks of ``srun`` that do not know of each other.

    Raises:
        ConfigurationError: ``srun`` has started several tasks, and none of Horovod's launchers was among them.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and not launched_by_horovod():
        raise ConfigurationError(
            f"srun started {tasks} tasks, and with strategy=horovod each of them would train alone: start the job with "
            "horovodrun or mpirun in the batch script, without srun"
        )


def requeue_together(trainer: pl.Trainer, environment: HorovodEnvironment) -> None:
    """Let all workers save after the same step when SLURM signals that the job's time is over.

    Lightning saves at once, in the signal's handler. But saving needs all workers, and those that wait
    within a step for this one's gradients do not come to save.

    Args:
        trainer: the trainer of several workers, before its set-up hooks are called.
        environment: the cluster.
    """
    _requeue(trainer, environment, StepMessage("requeue"), StepMessage("requeue between steps"))


def requeue_between_steps(trainer: pl.Trainer) -> None:
    """Let a worker save after the step in which SLURM signals that the job's time is over.

    Lightning saves at once, in the signal's handler: a step that is not done would count as done, or its samples would
    enter the memory again. Where ``requeue_together`` was called it stands.

    Args:
        trainer: the trainer, as its set-up hooks are called.
    """
    if not any(isinstance(callback, _Requeue) for callback in callbacks_of(trainer)):
        _requeue(trainer, cluster_environment_of(trainer), None, None)


def _requeue(
    trainer: pl.Trainer,
    environment: ClusterEnvironment | None,
    message: StepMessage | None,
    between: StepMessage | None,
) -> None:
    signum = environment.requeue_signal if isinstance(environment, SLURMEnvironment) else None
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and signum is not None:
        others = [callback for callback in callbacks_of(trainer) if not isinstance(callback, _Requeue)]
        set_callbacks(trainer, [_Requeue(signum, message, between), *others])


class _Requeue(pl.Callback):
    """Notes the signal in place of Lightning's handler, and calls that one at the end of a step.

    Args:
        signum: the signal.
        message: by which all workers hear of it; None where each saves when it has heard of it.
        between: the same in the midst of long work between two steps.
    """

    def __init__(self, signum: signal.Signals, message: StepMessage | None, between: StepMessage | None) -> None:
        self._signum = signum
        self._message, self._between = message, between
        self._step = 0
        self._lightnings: Any = None
        self._due = self._heard = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(self._signum)):
            self._lightnings = signal.signal(self._signum, self._note)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step
        if self._message is not None:
            self._message.start(trainer, [int(self._due)])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self._due if self._message is None else any(self._message.read() or ())
        # Within an accumulation those who know tell it again.
        if due and step_is_whole(trainer, self._step):
            self._save_and_requeue()

    def signalled(self, trainer: pl.Trainer) -> bool:
        """Return whether SLURM's signal had come to a worker when it asked last."""
        if self._between is None:
            self._heard = self._due
        else:
            self._heard = any(self._between.read() or ())
            self._between.start(trainer, [int(self._due)])
        return self._heard

    def act_on_signal(self, trainer: pl.Trainer, pl_module: pl.LightningModule, save: bool) -> None:
        """Save and requeue if SLURM's signal has come to a worker."""
        if self._heard:
            self._heard = False
            self._save_and_requeue()

    def _save_and_requeue(self) -> None:
        self._due = False
        if self._between is not None:
            self._between.read()  # what is on its way tells of the same signal
        if self._lightnings is not None:
            self._lightnings(self._signum, None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._between is not None:
            self._between.read()
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for message in (self._message, self._between):
            if message is not None:
                message.forget()
        self._give_back()

    def _note(self, signum: int, frame: Any) -> None:
        self._due = True

    def _give_back(self) -> None:
        if self._lightnings is not None:
            signal.signal(self._signum, self._lightnings)
            self._lightnings = None
