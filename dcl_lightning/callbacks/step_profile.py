"""Where the time of a training step goes: Lightning's actions as parts that add up to the step, shown as a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler
from torch import nn

from dcl_lightning._lightning import callbacks_of, datamodule_of, has_progress_bar
from dcl_lightning.callbacks.hooks import wrap_hook
from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.callbacks.task_clock import TaskClock
from dcl_lightning.data.images import ImageFiles
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.screen import show
from dcl_lightning.stopwatch import Stopwatch
from dcl_lightning.types import Batch

__all__ = ["PARTS", "WARM_UP", "StepProfile", "StepProfiler", "part_of", "table_of"]

Part = Literal["data", "batch", "rehearse", "forward", "backward", "optimizer", "callbacks", "rest"]
PARTS: dict[Part, str] = {
    "data": "waiting for data",
    "batch": "moving and augmenting the batch",
    "rehearse": "rehearsal (waiting for the memory)",
    "forward": "forward pass and loss",
    "backward": "backward pass",
    "optimizer": "optimizer",
    "callbacks": "logging and callbacks",
    "rest": "the rest (Lightning's loop)",
}
_ON_SEVERAL_WORKERS: dict[Part, str] = {"backward": "backward pass, averaging gradients"}
WARM_UP = 3  # steps of the measured task that are left out: their sizes and caches are new
_WORTH_A_WORD = 0.1  # share of a step from which on a remedy is named
_HIDES_A_THREAD = 0.005  # seconds of a backward pass beside which a thread's Python code does not show
_FETCH = ".train_dataloader_next"
_BATCH = ("on_before_batch_transfer", "batch_to_device", "transfer_batch_to_device", "on_after_batch_transfer")
_OPTIMIZER = ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step")


@cache
def part_of(action: str) -> Part | None:
    """Return the part of a step that an action of Lightning's belongs to; None if to the one around it.

    Args:
        action: its name, such as ``[Strategy]SingleDeviceStrategy.backward``.

    Example:
        >>> part_of("[Strategy]SingleDeviceStrategy.backward"), part_of("run_training_batch")
        ('backward', None)
    """
    owner, _, hook = action.rpartition(".")
    kind = owner.partition("]")[0].removeprefix("[")
    if action.endswith(_FETCH):
        return "data"
    if hook in _BATCH:
        return "batch"
    if hook in _OPTIMIZER:
        return "optimizer"
    if kind == "Strategy":
        return "forward" if hook == "training_step" else "backward" if hook == "backward" else None
    return "callbacks" if kind in ("Callback", "LightningModule") else None


class StepProfiler(Profiler):
    """Adds up what the parts of some training steps take; a step lasts from one wait for data to the next.

    Each moment counts for the innermost part, so that the parts add up to the steps.

    Args:
        steps: to measure, at least 1; those of the end of an epoch are not measured.
        now: returns the time in seconds, when what was queued before is done.

    Attributes:
        seconds: of each part, over the steps measured so far.
        measured: how many these are.
    """

    def __init__(self, steps: int, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.steps = steps
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.measured = 0
        self._watch = Stopwatch([*PARTS], now)
        self._left_out: int | None = None

    def begin(self, left_out: int) -> None:
        """Measure from now on, after some steps that are left out."""
        self._left_out = left_out

    @property
    def is_measuring(self) -> bool:
        """Whether the present step is one of those that are measured."""
        return self._left_out is not None and self._left_out < 0 and self.measured < self.steps

    def start(self, action_name: str) -> None:
        """Enter the part of an action."""
        if action_name.endswith(_FETCH):
            self._next_step()
        self.enter(part_of(action_name))

    def stop(self, action_name: str) -> None:
        """Leave the part of an action."""
        self.leave(part_of(action_name))

    def enter(self, part: Part | None) -> None:
        """Enter a part, if it is one."""
        if part is not None:
            self._watch.enter(part)

    def leave(self, part: Part | None) -> None:
        """Leave a part, if it is one."""
        if part is not None:
            self._watch.leave(part)

    def _next_step(self) -> None:
        if self.is_measuring:
            self.seconds, self.measured = self._watch.seconds, self.measured + 1
            if not self.is_measuring:
                self._watch.stop()
        elif self._left_out is not None and self.measured < self.steps:
            self._left_out -= 1
            if self.is_measuring:
                self._watch.start("rest")


class StepProfile(pl.Callback):
    """Measures steps of the second task of a stream, in which representatives join the batch, and shows a table.

    A stream of one task is measured in that. On a GPU, the host waits at the borders of parts for what it has queued
    on the stream of the training step; the memory's stream goes on.

    Args:
        steps: to measure, at least 1.
    """

    def __init__(self, steps: int = 10) -> None:
        self.steps = steps
        self.profiler = StepProfiler(steps)
        self._task = 0
        self._images: list[tuple[int, int]] = []  # new and rehearsed, of the measured steps and of the one after
        self._undo: list[Callable[[], None]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the profiler in place."""
        clock = TaskClock.of(trainer)
        assert clock is not None
        self._task = min(1, len(clock.tasks) - 1)
        device = pl_module.device
        profiler = self.profiler = StepProfiler(self.steps, lambda: _time_on(device))
        untyped: Any = trainer
        before, untyped.profiler = untyped.profiler, profiler

        def restore() -> None:
            untyped.profiler = before

        def around(own: Callable[[str], None], also: Callable[[Part], None]) -> Callable[[str], None]:
            def hook(phase: str) -> None:
                own(phase)
                if phase == "rehearse":
                    also("rehearse")

            return hook

        self._undo = [
            restore,
            wrap_hook(clock.stopwatch, "enter", lambda own: around(own, profiler.enter)),
            wrap_hook(clock.stopwatch, "leave", lambda own: around(own, profiler.leave)),
        ]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure with the task's first epoch.

        Raises:
            ConfigurationError: it has one step, which ends with the task.
        """
        clock = TaskClock.of(trainer)
        assert clock is not None
        if clock.task_at(trainer.current_epoch) != self._task:
            return
        whole = trainer.num_training_batches - 1
        if whole < 1:
            raise ConfigurationError(
                f"profile: task {self._task + 1} has one step, and its end belongs to the task's end: give a smaller "
                "data.batch_size or data.increment"
            )
        self.profiler.begin(int(min(WARM_UP, whole - 1)))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Count the images of the steps that are measured."""
        if self.profiler.is_measuring and isinstance(batch, Batch):
            self._images.append((batch.num_new, len(batch.targets) - batch.num_new))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the table, on worker 0.

        Raises:
            ConfigurationError: no step was measured.
        """
        profiler = self.profiler
        self._leave()
        if not profiler.measured:
            raise ConfigurationError(
                f"profile: the fit ended before a step of task {self._task + 1}: leave out what ends it early, as "
                "trainer.max_time"
            )
        if not trainer.is_global_zero:
            return
        parts = {part: seconds / profiler.measured for part, seconds in profiler.seconds.items()}
        names = PARTS | _ON_SEVERAL_WORKERS if trainer.world_size > 1 else PARTS
        words = "\n".join(_words_on(parts, names, trainer))
        show(f"\n{self._what_was_measured(trainer, pl_module)}\n\n{table_of(parts, names)}\n\n{words}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave trainer and clock as they were."""
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave trainer and clock as they were."""
        self._leave()

    def _leave(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _what_was_measured(self, trainer: pl.Trainer, agent: Any) -> str:
        clock, steps = TaskClock.of(trainer), self.profiler.measured
        assert clock is not None
        new, rehearsed = (sum(counts[:steps]) / steps for counts in zip(*self._images, strict=True))
        network: nn.Module = agent.backbone
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        device = agent.device
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        threads = _counted(torch.get_num_threads(), "thread")
        workers = trainer.world_size
        where = f"{place}, {threads}" if workers == 1 else f"{place}, {workers} workers with {threads} each"
        return (
            f"{_counted(steps, 'step')} of task {self._task + 1} of {clock.tasks[0].num_tasks}: "
            f"{type(agent).__name__} with {type(network).__name__} ({millions:.2f} M parameters), "
            f"{new:.3g} new + {rehearsed:.3g} rehearsed images a step{' and worker' if workers > 1 else ''}, "
            f"{where}, precision {trainer.precision}"
        )


def _time_on(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


# -- text --------------------------------------------------------------------------------------------------------------


def table_of(parts: Mapping[str, float], names: Mapping[Part, str] = PARTS) -> str:
    """Return a plain table of the parts of a step, in ms and per cent, and of their sum.

    Args:
        parts: seconds of a step in each of ``PARTS``.
        names: of the parts, in their order.
    """
    total = sum(parts.values())
    width = max(map(len, names.values()))
    lines = [f"{'part of a step':<{width}} {'ms':>10} {'%':>7}"]
    rows = [(words, parts[part]) for part, words in names.items()]
    for words, seconds in [*rows, ("total", total)]:
        lines.append(f"{words:<{width}} {1e3 * seconds:>10.2f} {100 * seconds / total:>7.1f}")
    return "\n".join(lines)


def _words_on(parts: Mapping[str, float], names: Mapping[Part, str], trainer: pl.Trainer) -> list[str]:
    """Return a line that names the largest part, and one with a remedy for the largest part that has one."""
    total = sum(parts.values())
    order = sorted(PARTS, key=lambda part: -parts[part])
    lines = [f"Largest part: {names[order[0]]}, {100 * parts[order[0]] / total:.0f} % of a step."]
    for part in order:
        remedy = _remedy(part, parts, trainer) if parts[part] >= _WORTH_A_WORD * total else None
        if remedy is not None:
            return [*lines, f"For {names[part]}: {remedy}."]
    return lines


def _remedy(part: Part, parts: Mapping[str, float], trainer: pl.Trainer) -> str | None:
    """Return what may make a part shorter by an option of ours that leaves the method as it is; None for nothing."""
    agent: Any = trainer.lightning_module
    data, on_gpu = datamodule_of(trainer), agent.device.type == "cuda"
    memory = next((c.config for c in callbacks_of(trainer) if isinstance(c, Rehearsal)), None)
    if part == "data" and isinstance(data.train_inputs, ImageFiles):
        return f"more processes that read images: --data.num_workers (now {data.train_inputs.reader_pool.num_workers})"
    if part == "data" and memory is not None and memory.prefetch != "batch":
        return "--model.rehearsal.prefetch batch prepares the next batch in a thread"
    if part == "rehearse" and memory is not None:
        if memory.execution == "inline" and parts["backward"] > max(parts["rehearse"], _HIDES_A_THREAD):
            return "--model.rehearsal.execution blocking does the memory's work beside the backward pass"
        if memory.row_format == "index":
            return "--model.rehearsal.row_format inputs keeps images instead of reading them again"
        if memory.prefetch == "draw" and on_gpu:
            return "--model.rehearsal.prefetch device moves representatives to the GPU ahead of their step"
    if part in ("forward", "backward"):
        if on_gpu and trainer.precision == "32-true":
            return "--trainer.precision bf16-mixed"
        convolves = any(isinstance(layer, nn.Conv2d) for layer in agent.modules())
        if convolves and agent.memory_format == "contiguous":
            return "--model.memory_format auto"
        if agent.hparams.get("compile") is False:
            return "--model.compile default"
    if part == "callbacks" and has_progress_bar(trainer):
        return "--trainer.enable_progress_bar false"
    return None


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
