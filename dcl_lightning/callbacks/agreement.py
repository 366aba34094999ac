"""Workers compare configuration, versions and data before the first step: what differs would train without a word."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dcl_lightning._version import __version__, version_of
from dcl_lightning.comm import Comm, allgather_text
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.errors import ConfigurationError

__all__ = ["differences", "refuse_disagreement"]

_PACKAGES = ("torch", "lightning", "torchvision", "numpy")
# What a host may have of its own.
_OWN = ("root", "download", "stage_to", "num_workers")
_PLAIN = (str, bool, int, float, list, tuple, type(None))
_NAMED = 3  # differences in a message
_LOOKED_AT = 16  # images of a data set in memory


def refuse_disagreement(
    trainer: pl.Trainer, module: pl.LightningModule | None, data: ContinualDataModule, comm: Comm
) -> None:
    """Refuse workers that would not train the same thing; every worker calls this.

    Folders may differ, the number of reading processes, and what only one host does, as to download.

    Args:
        trainer: of the fit, before it begins.
        module: whose hyperparameters are compared; None for one that may have some of its own on each worker.
        data: set up.
        comm: the cluster.

    Raises:
        ConfigurationError: on all workers alike, with the values that differ.
    """
    if comm.size == 1:
        return
    mine = json.dumps(dict(_description(trainer, module, data)), sort_keys=True, default=str)
    if len(set(allgather_text(comm, hashlib.sha256(mine.encode()).hexdigest()))) > 1:
        found = differences([json.loads(text) for text in allgather_text(comm, mine)])
        raise ConfigurationError(f"workers differ: {found}; give all of them the same configuration, packages and data")


def differences(described: Sequence[Mapping[str, object]]) -> str:
    """Return in words what workers differ in: the first few values, each with the first worker that has another.

    Args:
        described: a worker's values by their keys, in the order of ranks.

    Example:
        >>> differences([{"model.lr": 0.1, "seed": 0}, {"model.lr": 0.1, "seed": 0}, {"model.lr": 0.2, "seed": 0}])
        'model.lr is 0.1 on worker 0 and 0.2 on worker 2'
    """
    first, found = described[0], []
    for key in sorted({key for values in described for key in values}):
        other = next((rank for rank, values in enumerate(described) if values.get(key) != first.get(key)), None)
        if other is not None:
            found.append(f"{key} is {first.get(key)} on worker 0 and {described[other].get(key)} on worker {other}")
    more = f" (and {len(found) - _NAMED} more)" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


def _description(
    trainer: pl.Trainer, module: pl.LightningModule | None, data: ContinualDataModule
) -> Iterator[tuple[str, object]]:
    for package in _PACKAGES:
        yield package, (version_of(package) or "").partition("+")[0]  # hosts may have builds for other devices
    yield "dcl_lightning", __version__
    yield from _plain("trainer", _limits_and_steps(trainer))
    if module is not None:
        yield "model", type(module).__name__
        yield from _plain("model", dict(module.hparams))
    yield from _plain("data", data.facts())
    values = {name: vars(data).get(name) for name in inspect.signature(type(data)).parameters if name not in _OWN}
    yield from _plain("data", {name: value for name, value in values.items() if value is not None})
    yield "the labels of the data", _digest(data.train_targets, data.test_targets)
    if isinstance(data.train_inputs, Tensor):
        rows = torch.linspace(0, len(data.train_inputs) - 1, _LOOKED_AT).long()
        yield "the images of the data", _digest(data.train_inputs[rows])


def _limits_and_steps(trainer: Any) -> dict[str, object]:
    return {
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm),
        "precision": trainer.precision,
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "min_epochs": trainer.min_epochs,
        "limit_train_batches": trainer.limit_train_batches,
        "limit_val_batches": trainer.limit_val_batches,
        "limit_test_batches": trainer.limit_test_batches,
        "val_check_interval": trainer.val_check_interval,
        "check_val_every_n_epoch": trainer.check_val_every_n_epoch,
        "overfit_batches": trainer.overfit_batches,
        "fast_dev_run": trainer.fast_dev_run,
    }


def _plain(prefix: str, values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield numbers, words and lists below their keys; paths and objects are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _plain(f"{prefix}.{name}", value)
        elif isinstance(value, _PLAIN) and os.sep not in str(value):
            yield f"{prefix}.{name}", value


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
