"""Lightning callbacks: the task clock, rehearsal, the report, progress and predictions."""

from dcl_lightning.callbacks.prediction_writer import PredictionWriter
from dcl_lightning.callbacks.progress import StreamProgress
from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.callbacks.report import TaskReport
from dcl_lightning.callbacks.task_clock import TaskClock

__all__ = ["PredictionWriter", "Rehearsal", "StreamProgress", "TaskClock", "TaskReport"]
