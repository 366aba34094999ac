"""What a callback or an argument does, as it is seen in a fit; and callbacks that a user might write."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.conformance.lightning_support.fits import (
    OnPurpose,
    Run,
)


def mine(run: Run) -> Any:
    """The callback that was given, None without it."""
    return next(iter(run.extra["callbacks"]), None)


def hooks_called(run: Run) -> Any:
    """What the callback that was given has recorded, None without it."""
    callback = mine(run)
    return None if callback is None else callback.sequence


def files(run: Run, folder: str = ".", pattern: str = "*.ckpt") -> list[str]:
    return sorted(path.name for path in (run.folder / folder).glob(pattern))


def logged(run: Run, prefix: str = "") -> dict[str, list[float]]:
    """Values by name, in the order of the steps, as the CSVLogger has written them."""
    file = run.folder / "logs" / "metrics.csv"
    if not file.is_file():
        return {}
    rows = list(csv.DictReader(file.open()))
    names = [name for name in rows[0] if name.startswith(prefix)]
    return {name: [float(row[name]) for row in rows if row[name]] for name in names}


def logged_steps(run: Run, name: str) -> list[int]:
    file = run.folder / "logs" / "metrics.csv"
    return [int(row["step"]) for row in csv.DictReader(file.open()) if row.get(name)] if file.is_file() else []


def csv_logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="logs", version="")


def calls(*hooks: str) -> Callable[[Run], list[int]]:
    return lambda run: [run.spy.count(hook) for hook in hooks]


def seen(hook: str) -> Callable[[Run], list[Any]]:
    return lambda run: run.spy.seen.get(hook, [])


def seen_any(hook: str) -> Callable[[Run], set[Any]]:
    return lambda run: set(run.spy.seen.get(hook, []))


def thawed(trainer: pl.Trainer, module: Any) -> tuple[bool, list[float]]:
    rates = [round(group["lr"], 6) for group in trainer.optimizers[0].param_groups]
    return all(p.requires_grad for p in module.backbone.parameters()), rates


def most_batches(run: Run, hook: str) -> int:
    """Batches of the loader that had most; an agent has a loader of each task."""
    return max(Counter(run.spy.loaders.get(hook, [])).values(), default=0)


class Freeze(cb.BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, initial_denom_lr=2)


class Written(cb.BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches = self.epochs = self.rows = 0

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *rest: Any) -> None:
        self.batches += 1
        self.rows += len(prediction.labels if hasattr(prediction, "labels") else prediction)

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
        self.epochs += 1


class EachEpoch(cb.Checkpoint):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


class Fails(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 3:
            raise OnPurpose


class Stops(pl.Callback):
    """Asks for the end in the first step."""

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        trainer.should_stop = True


class Counted(cb.ProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.totals: list[float] = []

    def on_train_epoch_start(self, *rest: Any) -> None:
        self.totals.append(self.total_train_batches)

    def enable(self) -> None: ...

    def disable(self) -> None: ...


def summing(base: type[Any]) -> type[Any]:
    """A summary that notes the number of parameters instead of printing."""

    class Summing(base):
        total: int | None = None

        def summarize(self, summary_data: Any, total_parameters: int, *rest: Any, **kwargs: Any) -> None:
            self.total = total_parameters

    return Summing


def summed(run: Run) -> bool | None:
    return None if mine(run) is None else mine(run).total == sum(p.numel() for p in run.module.parameters())


def bar(run: Run) -> tuple[Any, ...]:
    return mine(run) is run.trainer.progress_bar_callback, type(run.trainer.progress_bar_callback).__name__


def averaged(run: Run) -> tuple[int, bool] | None:
    if mine(run) is None:
        return None
    average = mine(run)._average_model
    pairs = zip(average.module.parameters(), run.module.parameters(), strict=True)
    return int(average.n_averaged), all(torch.equal(a, b) for a, b in pairs)


def zeros(run: Run) -> float:
    """Share of weights that are 0, to a tenth."""
    weights = torch.cat([p.detach().flatten() for p in run.module.parameters() if p.ndim > 1])
    return round(float((weights == 0).float().mean()), 1)


def found_rate(run: Run) -> tuple[bool, bool]:
    """Whether the rate was changed, and the last step was taken with it."""
    used = run.trainer.optimizers[0].param_groups[0]["lr"]
    return run.module.lr != 0.05, abs(used - run.module.lr) < 1e-9


def steps_of_gradients(run: Run) -> tuple[float, float]:
    """Largest norm and largest entry of the gradients that the optimizer got."""
    norms, entries = zip(*run.spy.gradients, strict=True)
    return round(max(norms), 4), round(max(entries), 4)


def test_and_predict(run: Run) -> None:
    run.trainer.test(run.module, datamodule=run.data, verbose=False)
    run.trainer.predict(run.module, datamodule=run.data)


def predict(run: Run) -> None:
    run.trainer.predict(run.module, datamodule=run.data)


class Cpu(CPUAccelerator):
    """A user's own accelerator."""


class OneDevice(SingleDeviceStrategy):
    """A user's own strategy."""


class OwnIO(TorchCheckpointIO):
    """A user's own way of saving."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        Path(f"{path}.mine").touch()


class Told(CSVLogger):
    """Notes whether it was told hyperparameters."""

    told = 0

    def log_hyperparams(self, params: Any = None) -> None:
        self.told += 1
