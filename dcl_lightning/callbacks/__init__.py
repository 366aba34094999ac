"""Lightning callbacks: the task clock and the report."""

from dcl_lightning.callbacks.report import TaskReport
from dcl_lightning.callbacks.tasks import TaskClock

__all__ = ["TaskClock", "TaskReport"]
