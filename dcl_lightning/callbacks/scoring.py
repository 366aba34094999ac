"""How a module is asked for its scores: an agent, or any other LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dcl_lightning.callbacks.evaluation import evaluating, prepared
from dcl_lightning.types import Batch

__all__ = ["scores_of"]


def scores_of(trainer: pl.Trainer, module: Any) -> Callable[[Batch], Tensor] | None:
    """Return what gives scores ``(B, K)`` of a batch, highest for the predicted class.

    That is the module's ``evaluate(batch)`` if it has one, else its ``forward(inputs)`` if that gives a tensor of one
    column for each class of the data, which is tried on two test samples.

    Args:
        trainer: at the start of a fit with a ``ContinualDataModule``.
        module: on its device.

    Returns:
        None, after a warning that says why, if the module has neither.
    """
    if callable(getattr(module, "evaluate", None)):
        return module.evaluate
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    try:
        with evaluating(trainer, module, averaged=False) as in_precision:
            inputs = prepared(trainer, next(iter(data.test_loaders(0)[0]))).inputs[:2]
            found = in_precision(module, inputs)
        expected = (len(inputs), data.num_classes)
        if isinstance(found, Tensor) and found.shape == expected:
            return partial(_forward, module)
        shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        reason = f"gives {shape} for {expected[0]} samples of {expected[1]} classes"
    except Exception as error:  # the user's code: whatever it raises, the stream can be trained without a matrix
        reason = f"raises {type(error).__name__}" + (f": {error}".splitlines()[0] if str(error) else "")
    rank_zero_warn(
        f"no accuracy matrix: {type(module).__name__} has no evaluate(batch), and its forward(inputs) {reason}; let "
        f"one of them return scores (samples, {data.num_classes})"
    )
    return None


def _forward(module: Any, batch: Batch) -> Tensor:
    return module(batch.inputs)
