"""Keeps a job from hanging: workers that never arrive, that stall, or that stop alone."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dcl_lightning.comm import Comm
from dcl_lightning.distributed import ranks
from dcl_lightning.distributed.horovod.gradients import GradientAverager
from dcl_lightning.distributed.horovod.launcher import HorovodLauncher
from dcl_lightning.distributed.horovod.rendezvous import Rendezvous, wait_for_workers
from dcl_lightning.distributed.horovod.shutdown import fail_together, keep_together
from dcl_lightning.distributed.horovod.watchdog import Watchdog
from dcl_lightning.errors import ConfigurationError

__all__ = ["FailureProtection"]

_CONNECT_S = 120  # for connections, once all workers are there; horovodrun's 30 s are few on busy machines


class FailureProtection:
    """Start, watch and end of a job, for the strategy.

    Args:
        start_timeout: seconds that workers wait for each other at the start, at least 1.
        collective_timeout: seconds that a worker waits within one operation before the job ends; 0 for ever.
        gradients: knows which parameters' gradients are waited for.

    Raises:
        ConfigurationError: a time that cannot be.
    """

    def __init__(self, start_timeout: float, collective_timeout: float, gradients: GradientAverager) -> None:
        if start_timeout < 1 or collective_timeout < 0:
            raise ConfigurationError(
                f"start_timeout={start_timeout} must be at least 1 second and collective_timeout={collective_timeout} "
                "at least 0, which is for ever"
            )
        self.start_timeout, self.collective_timeout = start_timeout, collective_timeout or math.inf
        self._gradients = gradients
        self._watchdog: Watchdog | None = None

    def meet(self, trainer: pl.Trainer | None, launcher: Any) -> None:
        """Wait for all workers, before Horovod is started: it would abort the process without a reason.

        Args:
            trainer: the trainer, if there is one.
            launcher: the strategy's.

        Raises:
            WorkerError: workers did not come.
        """
        given = os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", "0")
        os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(max(int(given), int(self.start_timeout), _CONNECT_S))
        if ranks.world_size() == 1:
            return
        if trainer is not None:
            fail_together(trainer)
        meeting = Rendezvous.of_job()
        if meeting is not None:
            failed = launcher.failed_workers if isinstance(launcher, HorovodLauncher) else list
            wait_for_workers(meeting, ranks.rank(), ranks.world_size(), self.start_timeout, failed)

    def begin(self, trainer: pl.Trainer | None, comm: Comm) -> None:
        """Let all workers of a run stop together, or fail together.

        Args:
            trainer: the trainer, before its set-up hooks are called, if there is one.
            comm: the cluster.
        """
        if trainer is not None and comm.size > 1:
            keep_together(trainer, comm, self._gradients)

    def watch(self, trainer: pl.Trainer, comm: Comm, launcher: Any) -> None:
        """Look for workers that hang from now on; let the launcher write the others' logs into the run's folder.

        Args:
            trainer: the trainer, with its data prepared: a download by one worker may take its time.
            comm: the cluster.
            launcher: the strategy's.
        """
        self.end()
        if comm.size > 1:
            self._watchdog = Watchdog(trainer, self.collective_timeout, comm.rank, comm.size, launcher, self._gradients)
        folder = getattr(trainer.logger, "log_dir", None)
        if isinstance(launcher, HorovodLauncher) and isinstance(folder, (str, Path)):
            launcher.log_to(Path(folder) / "logs")

    def end(self) -> None:
        """Look no more; safe to repeat."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
