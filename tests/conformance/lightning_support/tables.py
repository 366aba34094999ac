"""The tables: each callback and argument, how to try it, its effect, and who has it: an agent, a user's module."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.profilers import SimpleProfiler

from tests.conformance.lightning_support.effects import (
    Counted,
    Cpu,
    EachEpoch,
    Fails,
    Freeze,
    OneDevice,
    OwnIO,
    Stops,
    Told,
    Written,
    averaged,
    bar,
    calls,
    csv_logger,
    files,
    found_rate,
    hooks_called,
    logged,
    logged_steps,
    mine,
    most_batches,
    predict,
    seen,
    seen_any,
    steps_of_gradients,
    summed,
    summing,
    test_and_predict,
    thawed,
    zeros,
)
from tests.conformance.lightning_support.fits import (
    BATCH,
    TASKS,
    Row,
    Run,
    Spy,
)


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
        hooks_called,
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
        note="With `monitor` each task keeps its own best; the names of the files have the task. A monitor of test "
        "data (`val/...` without `data.val_ratio`) is refused. Each checkpoint has a folder for the memory next to it.",
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
        note="`horovod`, `ddp` and `fsdp2` share the memory among workers, see [strategies.md](strategies.md).",
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
        hooks_called,
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
        note="Except -1, to give in Python: `epochs_per_task` sets the number of epochs.",
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

TABLES = {"callback": CALLBACKS, "argument": ARGUMENTS}
