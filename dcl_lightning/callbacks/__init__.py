"""Lightning callbacks: the task clock, rehearsal and the report."""

from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.callbacks.report import TaskReport
from dcl_lightning.callbacks.tasks import TaskClock

__all__ = ["Rehearsal", "TaskClock", "TaskReport"]
