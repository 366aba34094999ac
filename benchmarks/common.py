"""What several benchmarks use: fits without side effects, timed steps, sides in turn, rows of a table."""

from __future__ import annotations

import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch

from dcl_lightning import ContinualAgent, ContinualDataModule
from dcl_lightning.callbacks import TaskReport
from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.types import InputSpec

Name = TypeVar("Name", bound=Hashable)

WARM_UP = 4
CLASSES = 100
SPEC = InputSpec(3, 32, 32)
# Options of a trainer, if not told otherwise on the CPU, that trains and does no more.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}
# Of the published accuracies; choices are made on other seeds.
FIRST_SEED = 100
# Of the rows that ``report`` prints.
HEADER = "| what | value | baseline | ratio [95 %] | target | pairs |\n|---|---|---|---|---|---|"


def kept(file: Path) -> dict[str, Any]:
    """Return the figures of a file, by data set and case; none if there is no file."""
    return json.loads(file.read_text()) if file.exists() else {}


def keep(file: Path, dataset: str, case: str, values: list[Any]) -> None:
    """Put the figures of a case into a file, read anew: another process may measure other cases."""
    figures = kept(file)
    figures.setdefault(dataset, {})[case] = values
    file.write_text(json.dumps(figures, indent=1) + "\n")


def mean_and_deviation(values: list[float]) -> str:
    """Return mean and deviation in words, empty if there are no values."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}" if values else ""


class Size(NamedTuple):
    """How much is measured.

    Args:
        rounds: of interleaved sides.
        steps: timed in each fit.
    """

    rounds: int
    steps: int


class StepTimer(pl.Callback):
    """Times all steps but those of the warm-up and the last.

    At the start of a step: of a callback that acts at its end, agents suppose that it reads the step's values.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.started = self.step_ms = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start or stop the clock; a GPU ends what it was given first."""
        if trainer.global_step not in (WARM_UP, WARM_UP + self.steps):
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if trainer.global_step == WARM_UP:
            self.started = now
        else:
            self.step_ms = 1e3 * (now - self.started) / self.steps


class Filled(pl.Callback):
    """Gives a fit's memory its rows before the first batch, as a checkpoint's memories would.

    Args:
        buffer: of one worker, full.
        workers: of the job; each has the same rows.
    """

    def __init__(self, buffer: RehearsalBuffer, workers: int = 1) -> None:
        self.capacity, self._sizes = len(buffer) * workers, [len(buffer)] * workers
        self._offered, self._buffer = buffer.offered * workers, buffer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stand where saved memories would."""
        pl_module.rehearsal.saved = self

    def restore(self, manager: MemoryManager, example: Any) -> None:
        """Fill the memory."""
        place = {"seed": 0, "steps": 0, "sizes": self._sizes, "offered": self._offered}
        manager.load_state_dict(place | {"buffer": self._buffer.state_dict()})
        slots = self._buffer.slots_at(torch.arange(len(self._buffer)))
        manager.buffer.store.insert(slots, self._buffer.store.gather(slots))


def quiet_trainer(folder: str, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a trainer, if not told otherwise on the CPU, that trains, reports into the folder, and does no more."""
    callbacks = (*callbacks, TaskReport(show_table=False))
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **(QUIET | options))


def step_ms(
    agent: ContinualAgent, data: ContinualDataModule, steps: int, *callbacks: pl.Callback, **options: Any
) -> float:
    """Return the mean time of a step of one fit; options are the trainer's."""
    timer = StepTimer(steps)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = quiet_trainer(folder, timer, *callbacks, limit_train_batches=WARM_UP + steps + 1, **options)
        trainer.fit(agent, datamodule=data)
    return timer.step_ms


def stream(samples: int, pixels: int, batch_size: int) -> ContinualDataModule:
    """Return noise images of one task, with augmentation, and as good as no test images."""
    labels = np.arange(samples) % CLASSES
    images = np.random.default_rng(0).integers(256, size=(samples, 3, pixels, pixels), dtype=np.uint8)
    splits = images, labels, images[:10], labels[:10]
    return ContinualDataModule(splits, scenario="none", batch_size=batch_size, augment=True)


def rounds_of(sides: dict[Name, Callable[[], float]], rounds: int) -> dict[Name, list[float]]:
    """Run all sides in each round, in an order that rotates."""
    names = list(sides)
    measured: dict[Name, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            measured[name].append(sides[name]())
    return measured


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[49], medians[1949]


def report(name: str, unit: str, value: list[float], baseline: list[float], target: str) -> dict[str, Any]:
    """Print one row and return it."""
    ratios = [a / b for a, b in zip(value, baseline, strict=True)]
    middle, against, ratio = (statistics.median(v) for v in (value, baseline, ratios))
    low, high = interval(ratios)
    print(
        f"| {name} | {middle:.3f} {unit} | {against:.3f} {unit} | {ratio:.3f} [{low:.3f}, {high:.3f}] "
        f"| {target} | {len(value)} |",
        flush=True,
    )
    return {"name": name, "value": middle, "unit": unit, "baseline": against, "ratio": ratio, "interval": [low, high]}
