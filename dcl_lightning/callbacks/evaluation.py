"""Evaluation of a network that is being trained, outside Lightning's own loops and as Lightning's would do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dcl_lightning._lightning import average_model_of, averaging_callbacks, datamodule_of
from dcl_lightning.data.loader import TaskLoader
from dcl_lightning.distributed.fsdp2 import whole_weights
from dcl_lightning.distributed.horovod.shutdown import break_off_if_signalled
from dcl_lightning.types import Batch

__all__ = [
    "average_only_network", "evaluation_batches", "limited", "limited_ids", "loader_batches", "scores_of",
    "update_averages", "within_class",
]  # fmt: skip


def evaluation_batches(
    module: pl.LightningModule,
    loader: TaskLoader | Sequence[Batch],
    limit: int | float = 1.0,
    averaged: bool = True,
) -> Iterator[Batch]:
    """Yield batches as a network takes them in evaluation, with the module in evaluation mode for each.

    Within the loop there are no gradients, and the trainer's precision holds; afterwards each submodule has its own
    mode again, so that what its owner has frozen stays frozen. Iterate with a ``for`` statement, which ends these
    contexts also after an exception.

    Args:
        module: the module that is trained.
        loader: a loader over this worker's samples, see ``loader_batches``; or batches as a loader gives them.
        limit: at most so many batches a worker, or a share of its batches, as ``trainer.limit_test_batches``.
        averaged: whether a ``WeightAveraging`` callback puts its averaged weights in place, as it does for Lightning's
            validation: they are what is kept after the fit. False where training goes on from what is measured.
    """
    trainer = module.trainer
    source = loader_batches(trainer, loader, limit) if isinstance(loader, TaskLoader) else iter(loader)
    with _evaluation_mode(trainer, module, averaged):
        for batch in source:
            # Not by the strategy's hooks: between training batches these would be the training batch's.
            batch = move_data_to_device(batch, trainer.strategy.root_device)
            batch = datamodule_of(trainer).prepare_batch(batch, train=False, epoch=0)
            # Prepared before: under bf16-true, new tensors have half precision in this context.
            with trainer.precision_plugin.val_step_context():
                yield batch


def loader_batches(trainer: pl.Trainer, loader: TaskLoader, limit: int | float = 1.0) -> Iterator[Batch]:
    """Yield a loader's batches as they are, and look for signals before each.

    Workers with fewer batches look for signals as often as the others.

    Args:
        trainer: of the fit.
        loader: over this worker's samples.
        limit: at most so many batches a worker, or a share of its batches.
    """
    source, count = iter(loader), limited(len(loader), limit)
    for index in range(max(limited(length, limit) for length in loader.lengths())):
        break_off_if_signalled(trainer)
        if index < count:
            yield next(source)


@contextmanager
def _evaluation_mode(trainer: pl.Trainer, module: pl.LightningModule, averaged: bool) -> Iterator[None]:
    modes = [(part, part.training) for part in (trainer.model or module).modules()]
    try:
        with ExitStack() as stack:
            for callback in averaging_callbacks(trainer) if averaged else ():
                # The hooks by which Lightning's validation gets the averaged weights.
                callback.on_validation_epoch_start(trainer, module)
                stack.callback(callback.on_validation_epoch_end, trainer, module)
            stack.enter_context(torch.no_grad())
            stack.enter_context(whole_weights(module))
            module.on_test_model_eval()
            yield
    finally:
        for part, mode in modes:
            part.training = mode


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
    all workers, and with at least one sample of each class.

    Args:
        trainer: has the limit.
        ids: sample ids ``(n,)`` int64 of the training set, the same on all workers.
    """
    data = datamodule_of(trainer)
    step = data.batch_size * trainer.world_size
    steps = limited(-(-len(ids) // step) * data.passes, trainer.limit_train_batches)
    count = -(-steps // data.passes) * step
    if count >= len(ids):
        return ids
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(data.seed))]
    targets = data.train_targets[ids]
    chosen = within_class(targets).argsort(stable=True)[: max(count, len(targets.unique()))]
    return ids[chosen].sort().values


def within_class(labels: Tensor) -> Tensor:
    """Return each entry's 0-based place among the entries equal to it, ``(n,)`` int64.

    Example:
        >>> within_class(torch.tensor([7, 2, 7, 7, 2]))
        tensor([0, 0, 1, 2, 1])
    """
    order = labels.argsort(stable=True)
    _, counts = labels[order].unique_consecutive(return_counts=True)
    firsts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(labels)) - firsts
    return places


def scores_of(module: pl.LightningModule) -> Callable[[Batch], Tensor] | None:
    """Return what gives scores ``(B, K)`` of a batch, highest for the predicted class.

    That is the module's ``evaluate(batch)`` if it has one, else its ``forward(inputs)`` if that gives a tensor of one
    column for each class of the data, which is tried on two test samples.

    Args:
        module: on its device, at the start of a fit with a ``ContinualDataModule``.

    Returns:
        None, after a warning that says why, if the module has neither.
    """
    evaluate = getattr(module, "evaluate", None)
    if callable(evaluate):
        return evaluate
    data = datamodule_of(module.trainer)
    reason = ""
    try:
        for batch in evaluation_batches(module, [next(iter(data.test_loaders(0)[0]))], averaged=False):
            found, expected = module(batch.inputs[:2]), (len(batch.inputs[:2]), data.num_classes)
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


def _forward(module: nn.Module, batch: Batch) -> Tensor:
    scores: Tensor = module(batch.inputs)
    return scores


# -- callbacks that average weights ------------------------------------------------------------------------------------


def update_averages(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Update the averages that an epoch's end updates: no weight changes between a task's last step and that.

    Args:
        trainer: of the fit, after the last step of the present epoch.
        module: the module that is trained.
    """
    for callback in averaging_callbacks(trainer):
        callback.on_train_epoch_end(trainer, module)  # a second call does nothing


def average_only_network(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let ``WeightAveraging`` average an agent's network, and leave the buffers of its method alone.

    Which classes were seen, class means and corrections are no weights: evaluation would use their averages, and the
    last checkpoint keep them. The averaged module shares them with the agent.

    Args:
        trainer: at the start of the fit, the module on its device.
        module: the agent; one without ``backbone`` stays as Lightning has it.
    """
    names = [name for name, _ in module.named_buffers() if not name.startswith(("backbone.", "head."))]
    if not isinstance(getattr(module, "backbone", None), nn.Module) or not names:
        return
    for callback in averaging_callbacks(trainer):
        averaged = average_model_of(callback)
        if averaged is None:
            continue
        update = type(averaged).update_parameters

        def update_network(
            model: nn.Module,
            averaged: AveragedModel = averaged,
            update: Callable[[AveragedModel, nn.Module], None] = update,
        ) -> None:
            kept = _set_buffers(model, dict.fromkeys(names))
            _set_buffers(averaged.module, dict.fromkeys(names))
            try:
                update(averaged, model)
            finally:
                _set_buffers(model, kept)
                _set_buffers(averaged.module, kept)

        vars(averaged)["update_parameters"] = update_network
        _set_buffers(averaged.module, {name: module.get_buffer(name) for name in names})


def _set_buffers(module: nn.Module, values: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Set buffers by their names, None for one that is to be passed over; return what they were."""
    before = {}
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        before[name] = part._buffers[leaf]
        part._buffers[leaf] = value
    return before
