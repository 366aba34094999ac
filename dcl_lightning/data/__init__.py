"""Data sets as streams of tasks."""

from dcl_lightning.data.datamodule import ContinualDataModule

__all__ = ["ContinualDataModule"]
