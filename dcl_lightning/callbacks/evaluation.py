"""Runs the network over a loader outside Lightning's own loops, in the contexts of Lightning's evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor

from dcl_lightning._lightning import datamodule_of
from dcl_lightning.callbacks.averaging import averaged_network
from dcl_lightning.data.loader import TaskLoader
from dcl_lightning.distributed.horovod.shutdown import break_off_if_signalled
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Batch

__all__ = ["batches", "evaluating", "limited", "limited_ids", "prepared", "refuse_empty_share", "scores_of", "turns"]


P = ParamSpec("P")
R = TypeVar("R")
Call = Callable[..., Any]


@contextmanager
def evaluating(trainer: pl.Trainer, module: pl.LightningModule, averaged: bool = True) -> Iterator[Call]:
    """Put a network that is being trained into evaluation mode, without gradients; afterwards all is as it was.

    Each submodule gets its own mode back, so that what its owner has frozen stays frozen, also after an exception.

    Args:
        trainer: of the fit.
        module: the module that is trained.
        averaged: whether a ``WeightAveraging`` callback puts its averaged weights in place, as it does for Lightning's
            validation: they are what is kept after the fit. False where training goes on from what is measured.

    Yields:
        A function that calls what it is given with its arguments in the trainer's precision. Batches are prepared
        outside it, as by Lightning: under ``bf16-true`` new tensors are made in half precision within.
    """
    modes = [(part, part.training) for part in (trainer.model or module).modules()]

    def in_precision(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        with trainer.precision_plugin.val_step_context():
            return function(*args, **kwargs)

    try:
        with ExitStack() as stack:
            if averaged:
                stack.enter_context(averaged_network(trainer, module))
            stack.enter_context(torch.no_grad())
            module.on_test_model_eval()
            yield in_precision
    finally:
        for part, mode in modes:
            part.training = mode


def batches(trainer: pl.Trainer, loader: TaskLoader, limit: int | float = 1.0) -> Iterator[Batch]:
    """Yield a loader's batches as it gives them, and look for signals before each.

    Every worker comes to the end of it: one that has fewer batches looks for signals as often as the others.

    Args:
        trainer: of the fit.
        loader: over this worker's samples.
        limit: at most so many batches a worker, or a share of its batches: ``trainer.limit_test_batches``.
    """
    source, count = iter(loader), limited(len(loader), limit)
    for index in range(max(limited(length, limit) for length in loader.lengths())):
        break_off_if_signalled(trainer)
        if index < count:
            yield next(source)


def prepared(trainer: pl.Trainer, batch: Batch) -> Batch:
    """Return a batch as the network takes it in evaluation, on the trainer's device.

    Args:
        trainer: has the device and the data module.
        batch: as the loader gave it.
    """
    # Not by the strategy's hooks: between training batches these would be the training batch's.
    batch = move_data_to_device(batch, trainer.strategy.root_device)
    data = datamodule_of(trainer)
    ready: Batch = data.prepare_batch(batch, train=False, epoch=0)
    return ready


def limited(count: int, limit: int | float) -> int:
    """Return how many of ``count`` batches a limit leaves, as in Lightning: at most a number, or a share rounded down.

    Example:
        >>> limited(7, 3), limited(7, 0.5), limited(7, 1.0)
        (3, 3, 7)
    """
    return min(count, limit) if isinstance(limit, int) else int(count * limit)


def limited_ids(trainer: pl.Trainer, ids: Tensor) -> Tensor:
    """Return those training samples that a pass at the end of a task looks at under ``trainer.limit_train_batches``.

    As many as an epoch over them would train on, the classes in turn and within a class by ``data.seed``: the same on
    all workers, and each class comes, if only with one sample.

    Args:
        trainer: has the limit.
        ids: sample ids ``(n,)`` int64 of the training set, the same on all workers.
    """
    data = datamodule_of(trainer)
    step = data.batch_size * trainer.world_size
    count = limited(-(-len(ids) // step), trainer.limit_train_batches) * step
    if count >= len(ids):
        return ids
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(data.seed))]
    targets = data.train_targets[ids]
    chosen = turns(targets).argsort(stable=True)[: max(count, len(targets.unique()))]
    return ids[chosen].sort().values


def turns(labels: Tensor) -> Tensor:
    """Return how many entries before each one are equal to it, ``(n,)`` int64.

    Example:
        >>> turns(torch.tensor([7, 2, 7, 7, 2]))
        tensor([0, 0, 1, 2, 1])
    """
    order = labels.argsort(stable=True)
    _, counts = labels[order].unique_consecutive(return_counts=True)
    firsts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(labels)) - firsts
    return places


def refuse_empty_share(name: str, limit: int | float | None, counts: Iterable[tuple[str, int]], smaller: str) -> None:
    """Refuse a share of batches that leaves none of a task's, as Lightning does, but before the first step.

    Args:
        name: of the Trainer's argument.
        limit: its value; a whole number of batches leaves some.
        counts: what has batches, in words, and how many; what has none is passed over.
        smaller: what makes more batches of them when it is smaller.

    Raises:
        ConfigurationError: with the smallest share that leaves one.
    """
    if not isinstance(limit, float) or limit == 0:
        return
    for what, count in counts:
        if count and limited(count, limit) == 0:
            raise ConfigurationError(
                f"trainer.{name}={limit} of {count} batches of {what} is less than one: give at least {1 / count:.3g}, "
                f"a whole number of batches, or a smaller {smaller}"
            )


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
    data = datamodule_of(trainer)
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
