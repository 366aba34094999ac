"""Every callback of Lightning and every argument of its Trainer: what of them is supported, and how that is seen.

``python -m tests.conformance.surface`` writes ``docs/lightning.md`` from the tables here.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import callbacks as cb
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dcl_lightning import NIL, ContinualDataModule, Rehearsal, RehearsalConfig, TaskReport
from dcl_lightning.backbones import MLP

Kind = Literal["supported", "refused", "per task", "not tried"]
Who = Literal["plain", "agent", "foreign"]

# Two tasks of two epochs of four batches.
CLASSES, ROWS, BATCH, TASKS, EPOCHS = 4, 20, 5, 2, 2
STEPS = TASKS * EPOCHS * ROWS // BATCH


def stream() -> tuple[torch.Tensor, ...]:
    """Inputs and labels of training and test, as many of each class."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(CLASSES).repeat(TASKS * ROWS // CLASSES)
    x = torch.randn(CLASSES, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    return x, y, x.clone(), y.clone()


class Plain(pl.LightningModule):
    """What anybody would write, with batches as many and as large as a task's of the stream."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)
        self.lr, self.batch_size = 0.05, BATCH

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]  # as Lightning asks for where layers thaw later
        return torch.optim.SGD(trained, lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        x, y, *_ = stream()
        return DataLoader(TensorDataset(x[:ROWS], y[:ROWS]), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*stream()[2:]), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class Spy(pl.Callback):
    """Notes what it is called for, and what holds then."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.looks: dict[str, Callable[[pl.Trainer, Any], Any]] = {}
        self.seen: dict[str, list[Any]] = {}
        self.loaders: dict[str, list[tuple[int, int]]] = {}
        self.gradients: list[tuple[float, float]] = []
        self.dtypes: set[str] = set()

    def note(self, hook: str, trainer: pl.Trainer, module: Any, *rest: Any) -> None:
        self.calls.append(hook if not trainer.sanity_checking else f"sanity {hook}")
        if hook in self.looks:
            self.seen.setdefault(hook, []).append(self.looks[hook](trainer, module))
        if hook.endswith("batch_start"):
            loader = rest[2] if len(rest) > 2 else 0
            self.loaders.setdefault(hook, []).append((self.calls.count(hook.replace("batch", "epoch")), loader))
        if hook == "on_train_start":
            trainer.optimizers[0].register_step_pre_hook(self._before_step)
            module.head.register_forward_hook(self._after_head)

    def _before_step(self, optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        gradients = [
            p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if gradients:
            gradient = torch.cat(gradients)
            self.gradients.append((float(gradient.norm()), float(gradient.abs().max())))

    def _after_head(self, head: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.dtypes.add(str(output.dtype))

    def count(self, hook: str) -> int:
        return self.calls.count(hook)

    @property
    def sequence(self) -> list[str]:
        """What it was called for, but for each batch of validation: an agent validates on each task."""
        return [call for call in self.calls if not call.startswith("on_validation_batch")]


def _noting(name: str) -> Callable[..., None]:
    def hook(self: Spy, trainer: pl.Trainer, module: Any, *rest: Any, **kwargs: Any) -> None:
        self.note(name, trainer, module, *rest, *kwargs.values())

    return hook


HOOKS = [name for name in vars(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown")]
for _name in HOOKS:
    setattr(Spy, _name, _noting(_name))


@dataclass
class Run:
    """A fit, and what can be asked of it."""

    trainer: pl.Trainer
    module: Any
    data: Any
    spy: Spy
    folder: Path
    extra: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True)
class Row:
    """A callback class or an argument.

    Args:
        name: as Lightning has it.
        given: arguments of the Trainer that try it, made anew for each run in a folder of its own.
        effect: what it does, as seen in a run.
        agent: whether an agent on a ContinualDataModule has it.
        foreign: whether a module of the user's with ``Rehearsal`` on a loader of its own has it.
        note: for the page: what is different, or why it is refused or not tried.
        per_task: the effect with an agent where it is not plain Lightning's.
        looks: what the spy notes at a hook.
        then: what is done after the fit.
        beside: arguments of the run without it, too.
        words: of the refusal.
        package: without which Lightning refuses the callback itself.
        since: the release of Lightning that brought it, if an older one is supported.
    """

    name: str
    given: Callable[[Path], dict[str, Any]] | None = None
    effect: Callable[[Run], Any] | None = None
    agent: Kind = "supported"
    foreign: Kind = "supported"
    note: str = ""
    per_task: Any = None
    looks: dict[str, Callable[[pl.Trainer, Any], Any]] = field(default_factory=dict)
    then: Callable[[Run], None] | None = None
    words: str = ""
    package: str | None = None
    since: str = ""
    beside: Callable[[Path], dict[str, Any]] = lambda folder: {}


def run(who: Who, row: Row, folder: Path, with_it: bool = True) -> Run:
    """Fit, with the callback or argument or without it, and do what the row says then."""
    pl.seed_everything(0, verbose=False)
    data: Any = None
    module: Any
    spy = Spy()
    spy.looks = row.looks
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "default_root_dir": folder, "log_every_n_steps": 50,
    }  # fmt: skip
    if who == "agent":
        data = ContinualDataModule(stream(), increment=CLASSES // TASKS, batch_size=BATCH, seed=0, select_on_test=True)
        config = RehearsalConfig(buffer_size=8, num_candidates=2, num_samples=2)
        module = NIL(
            MLP([8]),
            CLASSES,
            input_spec=data.input_spec,
            epochs_per_task=EPOCHS,
            lr=0.05,
            momentum=0.9,
            rehearsal=config,
        )
    else:
        module = Plain()
        options["max_epochs"] = TASKS * EPOCHS
    given = (row.given if with_it and row.given is not None else row.beside)(folder)
    memory = Rehearsal(RehearsalConfig(buffer_size=8, num_samples=2, policy="reservoir", weighting="none"))
    theirs = given.get("callbacks", [])
    ours = {"plain": [], "agent": [TaskReport(pictures=False)], "foreign": [memory]}[who]
    options |= given | {"callbacks": [spy, *theirs, *ours]}
    result = Run(pl.Trainer(**options), module, data, spy, folder, {"callbacks": theirs, "loaders": 0})
    source = data or module
    inner = source.train_dataloader

    def counted(*args: Any) -> Any:
        result.extra["loaders"] += 1
        return inner(*args)

    source.train_dataloader = counted
    try:
        result.trainer.fit(module, datamodule=data)
    except (OnPurpose, TrainingSpikeException) as error:
        result.error = error
    if row.then is not None:
        row.then(result)
    return result


# -- how an effect is seen -----------------------------------------------------------------------------


def mine(run: Run) -> Any:
    """The callback that was given, None without it."""
    return next(iter(run.extra["callbacks"]), None)


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


class OnPurpose(Exception):
    """Ends a fit in its third step."""


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


def one(make: Callable[[], Any], **options: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"callbacks": [make()], **options}


def with_logger(make: Callable[[], Any]) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"callbacks": [make()], "logger": csv_logger(folder), "log_every_n_steps": 1}


CALLBACKS = [
    Row(
        "BackboneFinetuning",
        one(partial(cb.BackboneFinetuning, 1, lambda epoch: 1.5, 0.2)),
        seen("on_train_epoch_end"),
        looks={"on_train_epoch_end": thawed},
        note="Epochs count over the whole stream. The reset of the optimizer at the start of a task keeps added "
        "parameter groups.",
    ),
    Row(
        "BaseFinetuning",
        one(Freeze),
        seen("on_train_epoch_end"),
        looks={"on_train_epoch_end": thawed},
        note="Like `BackboneFinetuning`.",
    ),
    Row(
        "BasePredictionWriter",
        one(Written),
        lambda run: None if mine(run) is None else (mine(run).epochs, mine(run).rows),
        then=predict,
        note="An agent's predictions are `Prediction` objects, with the original labels.",
    ),
    Row(
        "BatchSizeFinder",
        one(partial(cb.BatchSizeFinder, "power", 1, 2, 2)),
        lambda run: (run.data or run.module).batch_size,
        note="Sets the data module's `batch_size`.",
    ),
    Row(
        "Callback",
        one(Spy),
        lambda run: None if mine(run) is None else mine(run).sequence,
        note="Every hook is called.",
    ),
    Row(
        "Checkpoint",
        lambda folder: {"callbacks": [EachEpoch(folder)], "enable_checkpointing": True},
        lambda run: (files(run), run.trainer.checkpoint_callback is mine(run)),
        note="Each checkpoint has a folder for the memory next to it.",
    ),
    Row(
        "DeviceStatsMonitor",
        with_logger(partial(cb.DeviceStatsMonitor, cpu_stats=True)),
        lambda run: {name: len(values) for name, values in logged(run, "DeviceStatsMonitor.on_train").items()},
        package="psutil",
    ),
    Row(
        "EarlyStopping",
        one(partial(cb.EarlyStopping, "train/loss", stopping_threshold=1e9)),
        calls("on_train_epoch_start"),
        agent="per task",
        per_task=[TASKS],
        note="Ends the task; each task starts with a new best value. Refused with `data.boundaries: hidden`.",
    ),
    Row(
        "EMAWeightAveraging",
        one(partial(getattr(cb, "EMAWeightAveraging", pl.Callback), decay=0.5)),
        averaged,
        note="The accuracy matrix uses the averaged weights.",
        since="2.6",
    ),
    Row(
        "GradientAccumulationScheduler",
        one(partial(cb.GradientAccumulationScheduler, {0: 1, 2: 2})),
        lambda run: run.trainer.global_step,
        note="Epochs count over the whole stream.",
    ),
    Row(
        "LambdaCallback",
        one(
            lambda: cb.LambdaCallback(
                on_train_batch_end=lambda trainer, *rest: trainer.__dict__.setdefault("ends", []).append(1)
            )
        ),
        lambda run: len(run.trainer.__dict__.get("ends", [])),
    ),
    Row(
        "LearningRateFinder",
        one(partial(cb.LearningRateFinder, 1e-4, 0.01, 14, early_stop_threshold=None)),
        found_rate,
        note="Every task uses the learning rate that it finds.",
    ),
    Row("LearningRateMonitor", with_logger(partial(cb.LearningRateMonitor, "step")), partial(logged, prefix="lr-")),
    Row(
        "ModelCheckpoint",
        lambda folder: {
            "callbacks": [
                cb.ModelCheckpoint(folder / "kept", filename="{epoch}-{step}", save_top_k=-1, every_n_epochs=1)
            ],
            "enable_checkpointing": True,
        },
        lambda run: (files(run, "kept"), run.trainer.checkpoint_callback is mine(run)),
        note="With `monitor` each task keeps its own best. A monitor of test data (`val/...` without `data.val_ratio`) "
        "is refused. Each checkpoint has a folder for the memory next to it.",
    ),
    Row(
        "ModelPruning",
        one(partial(cb.ModelPruning, "l1_unstructured", amount=0.5, apply_pruning=lambda epoch: epoch == 0)),
        zeros,
    ),
    Row("ModelSummary", one(summing(cb.ModelSummary), enable_model_summary=True), summed),
    Row(
        "OnExceptionCheckpoint",
        lambda folder: {
            "callbacks": [cb.OnExceptionCheckpoint(folder / "kept"), Fails()],
            "enable_checkpointing": True,
        },
        lambda run: files(run, "kept"),
        note="With several workers it saves nothing after a worker has failed, because saving needs all workers.",
    ),
    Row("ProgressBar", one(Counted, enable_progress_bar=True), lambda run: getattr(mine(run), "totals", None)),
    Row(
        "RichModelSummary",
        one(lambda: summing(cb.RichModelSummary)(), enable_model_summary=True),
        summed,
        package="rich",
    ),
    Row("RichProgressBar", one(cb.RichProgressBar, enable_progress_bar=True), bar, package="rich"),
    Row(
        "SpikeDetection",
        lambda folder: {
            "callbacks": [cb.SpikeDetection("max", warmup=1, rtol=0.0, exclude_batches_path=folder / "skip.json")]
        },
        lambda run: (files(run, pattern="skip.json"), type(run.error).__name__),
    ),
    Row(
        "StochasticWeightAveraging",
        one(partial(cb.StochasticWeightAveraging, 0.01, 2, 1)),
        lambda run: None if mine(run) is None else int(mine(run).n_averaged),
        agent="refused",
        words="use WeightAveraging or EMAWeightAveraging",
        note="It would average over tasks after the last evaluation. Use `WeightAveraging` or `EMAWeightAveraging`.",
    ),
    Row(
        "ThroughputMonitor",
        with_logger(lambda: cb.ThroughputMonitor(lambda batch: BATCH, window_size=3)),
        lambda run: sorted(name for name in logged(run) if name.startswith("train/device")),
    ),
    Row(
        "Timer",
        one(partial(cb.Timer, timedelta(0), "step")),
        calls("on_train_batch_end"),
        note="Limits the whole stream.",
    ),
    Row("TQDMProgressBar", one(cb.TQDMProgressBar, enable_progress_bar=True), bar),
    Row(
        "WeightAveraging",
        one(getattr(cb, "WeightAveraging", pl.Callback)),
        averaged,
        note="The accuracy matrix uses the averaged weights.",
        since="2.6",
    ),
]


def argument(name: str, value: Any, effect: Callable[[Run], Any], **more: Any) -> Row:
    """A row for an argument; a value that is made for each run is given as a function of the folder."""
    make = value if callable(value) and not isinstance(value, type) else lambda folder: value
    beside = more.setdefault("beside", lambda folder: {})
    return Row(name, lambda folder: {name: make(folder), **beside(folder)}, effect, **more)


ARGUMENTS = [
    argument("accelerator", lambda folder: Cpu(), lambda run: type(run.trainer.accelerator).__name__),
    argument(
        "strategy",
        lambda folder: OneDevice("cpu"),
        lambda run: type(run.trainer.strategy).__name__,
        note="`horovod` and `ddp` share the memory among workers. Sharded strategies (FSDP, DeepSpeed) were not tried.",
    ),
    Row(
        "devices",
        agent="not tried",
        foreign="not tried",
        note="Each device is a worker: [many workers](distributed.md).",
    ),
    Row(
        "num_nodes",
        agent="not tried",
        foreign="not tried",
        note="Needs several hosts. With `strategy=horovod` the launcher sets it.",
    ),
    argument("precision", "bf16-mixed", lambda run: run.spy.dtypes),
    argument(
        "logger",
        csv_logger,
        lambda run: len(logged_steps(run, "train/loss")),
        beside=lambda folder: {"log_every_n_steps": 4},
    ),
    Row(
        "callbacks",
        one(Spy),
        lambda run: None if mine(run) is None else mine(run).sequence,
        note="See the callbacks above.",
    ),
    argument(
        "fast_dev_run",
        2,
        lambda run: (run.trainer.global_step, files(run, pattern="**/*.ckpt")),
        agent="per task",
        per_task=(2 * TASKS, []),
        note="Runs this number of batches in each of the first two tasks.",
    ),
    argument(
        "max_epochs",
        1,
        lambda run: run.spy.count("on_train_epoch_start"),
        agent="refused",
        words="leave max_epochs out and use epochs_per_task",
        note="`epochs_per_task` sets the number of epochs.",
    ),
    argument(
        "min_epochs",
        2,
        lambda run: run.spy.count("on_train_epoch_start"),
        agent="per task",
        per_task=2 * TASKS,
        beside=lambda folder: {"callbacks": [cb.EarlyStopping("train/loss", stopping_threshold=1e9)]},
        note="`EarlyStopping` ends a task after at least this many epochs.",
    ),
    argument("max_steps", 6, lambda run: run.trainer.global_step, note="Limits the whole stream."),
    argument(
        "min_steps",
        6,
        lambda run: run.trainer.global_step,
        beside=lambda folder: {"callbacks": [Stops()]},
        note="Counts over the whole stream. Refused together with `EarlyStopping`, which ends tasks.",
    ),
    argument("max_time", timedelta(0), calls("on_train_batch_end"), note="Limits the whole stream."),
    argument(
        "limit_train_batches", 2, lambda run: run.trainer.global_step, note="Limits each epoch, and thus each task."
    ),
    argument("limit_val_batches", 1, lambda run: most_batches(run, "on_validation_batch_start")),
    argument("limit_test_batches", 1, lambda run: most_batches(run, "on_test_batch_start"), then=test_and_predict),
    argument(
        "limit_predict_batches", 1, lambda run: most_batches(run, "on_predict_batch_start"), then=test_and_predict
    ),
    argument(
        "overfit_batches",
        2,
        lambda run: run.trainer.global_step,
        agent="refused",
        words="give trainer.limit_train_batches",
        note="Needs the same batches in every epoch, but a `ContinualDataModule` shuffles. Use `limit_train_batches` "
        "to train on few.",
    ),
    argument("val_check_interval", 2, calls("on_validation_start"), note="Refused if a task has fewer batches."),
    argument("check_val_every_n_epoch", 2, calls("on_validation_start"), note="Epochs count over the whole stream."),
    argument("num_sanity_val_steps", 1, calls("sanity on_validation_start")),
    argument(
        "log_every_n_steps",
        3,
        lambda run: logged_steps(run, "train/loss"),
        beside=lambda folder: {"logger": csv_logger(folder)},
    ),
    argument("enable_checkpointing", True, lambda run: len(files(run, "checkpoints"))),
    argument("enable_progress_bar", True, lambda run: run.trainer.progress_bar_callback is not None),
    argument(
        "enable_model_summary", True, lambda run: any(isinstance(c, cb.ModelSummary) for c in run.trainer.callbacks)
    ),
    argument("accumulate_grad_batches", 2, lambda run: run.trainer.global_step),
    argument("gradient_clip_val", 0.01, lambda run: steps_of_gradients(run)[0]),
    argument(
        "gradient_clip_algorithm",
        "value",
        lambda run: steps_of_gradients(run)[1],
        beside=lambda folder: {"gradient_clip_val": 0.001},
    ),
    argument(
        "deterministic",
        True,
        seen_any("on_train_batch_start"),
        looks={"on_train_batch_start": lambda *_: torch.are_deterministic_algorithms_enabled()},
    ),
    argument(
        "benchmark",
        True,
        seen_any("on_train_batch_start"),
        looks={"on_train_batch_start": lambda *_: torch.backends.cudnn.benchmark},
    ),
    argument(
        "inference_mode",
        False,
        seen_any("on_test_batch_start"),
        looks={"on_test_batch_start": lambda *_: torch.is_inference_mode_enabled()},
        then=test_and_predict,
    ),
    Row(
        "use_distributed_sampler",
        agent="not tried",
        foreign="not tried",
        note="Needs several workers. `ContinualDataModule` shards its samples itself.",
    ),
    argument(
        "profiler",
        lambda folder: SimpleProfiler(),
        lambda run: len(getattr(run.trainer.profiler, "recorded_durations", {}).get("run_training_batch", [])),
    ),
    argument(
        "detect_anomaly",
        True,
        seen_any("on_before_zero_grad"),
        looks={"on_before_zero_grad": lambda *_: torch.is_anomaly_enabled()},
    ),
    argument(
        "barebones",
        True,
        lambda run: (run.trainer.barebones, run.trainer.global_step),
        beside=lambda folder: {"log_every_n_steps": 0},
    ),
    argument(
        "plugins",
        lambda folder: OwnIO(),
        lambda run: len(files(run, "checkpoints", "*.mine")),
        beside=lambda folder: {"enable_checkpointing": True},
    ),
    Row(
        "sync_batchnorm",
        agent="not tried",
        foreign="not tried",
        note="Needs several workers: [many workers](distributed.md).",
    ),
    argument("reload_dataloaders_every_n_epochs", 1, lambda run: run.extra["loaders"]),
    argument(
        "default_root_dir",
        lambda folder: folder / "elsewhere",
        lambda run: run.trainer.default_root_dir == str(run.folder / "elsewhere"),
    ),
    argument(
        "enable_autolog_hparams",
        False,
        lambda run: run.trainer.logger.told,
        beside=lambda folder: {"logger": Told(folder)},
        since="2.6",
    ),
    Row(
        "model_registry", agent="not tried", foreign="not tried", note="Uploads checkpoints to a cloud.", since="2.5.1"
    ),
]


# -- the page ------------------------------------------------------------------------------------------

TABLES = {"callback": CALLBACKS, "argument": ARGUMENTS}
PAGE = Path(__file__).parent.parent.parent / "docs" / "lightning.md"
_INTRODUCTION = """# Compatibility with Lightning

This page lists every callback class of `lightning.pytorch.callbacks` and every argument of `Trainer`, and whether they
work with an agent on a `ContinualDataModule` and with a LightningModule of your own that uses the callback `Rehearsal`
and its own loaders. A test fits both, and a plain LightningModule, with and without each of them, and compares the
effects.

- **supported**: the effect is the same as in plain Lightning.
- **per task**: with an agent it applies to each task, in plain Lightning to the run.
- **refused**: an error before the first step suggests an alternative.
- **not tried**: the test does not cover it.

`python -m tests.conformance.surface` generates this page.
"""


def markdown() -> str:
    """Return the page."""
    parts = [_INTRODUCTION]
    for title, rows in (("Callbacks", CALLBACKS), ("Arguments of the Trainer", ARGUMENTS)):
        parts.append(f"## {title}\n\n| name | agent | your module | difference |\n| --- | --- | --- | --- |\n")
        parts[-1] += "".join(f"| `{row.name}` | {row.agent} | {row.foreign} | {row.note} |\n" for row in rows)
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
