"""Where the time of a fit goes: phases add up, and each wait lands in its own, also through a resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning import ER, RehearsalConfig, TaskClock
from dcl_lightning.backbones import MLP
from dcl_lightning.data.loader import TaskLoader
from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.stopwatch import Stopwatch
from tests.conformance.small_stream import make_agent, make_data, make_trainer

WAIT = 0.05  # seconds of whatever is slow
TASKS, STEPS = 3, 3  # of an epoch
PHASES = ["train", "data", "rehearse", "task_end", "select", "evaluate", "checkpoint"]
Pause = Callable[[], None]


class Time:
    """A clock that stands still but for pauses."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self) -> None:
        self.now += 1


def pause() -> None:
    time.sleep(WAIT)


def slowly(do: Any, pause: Pause) -> Any:
    """Return a function that makes a pause before it does its work."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        pause()
        return do(*args, **kwargs)

    return slow


def slow_loader(monkeypatch: pytest.MonkeyPatch, agent: Any, pause: Pause) -> None:
    batches = TaskLoader._without_inputs

    def slow(self: TaskLoader, start: int) -> Any:
        for batch in batches(self, start):
            if self.train:
                pause()
            yield batch

    monkeypatch.setattr(TaskLoader, "_without_inputs", slow)


def slow_memory(monkeypatch: pytest.MonkeyPatch, agent: Any, pause: Pause) -> None:
    monkeypatch.setattr(MemoryManager, "advance", slowly(MemoryManager.advance, pause))


def slow_test(monkeypatch: pytest.MonkeyPatch, agent: Any, pause: Pause) -> None:
    monkeypatch.setattr(agent.clock, "_row_counts", slowly(agent.clock._row_counts, pause))


def slow_hook(name: str) -> Callable[[pytest.MonkeyPatch, Any, Pause], None]:
    def slow(monkeypatch: pytest.MonkeyPatch, agent: Any, pause: Pause) -> None:
        monkeypatch.setattr(agent, name, slowly(getattr(agent, name), pause))

    return slow


slow_training, slow_task_end, slow_validation = map(
    slow_hook, ("training_step", "on_task_end", "on_validation_epoch_start")
)
# What is slow, the phase it belongs to, and how often it comes in a fit of one epoch a task.
SLOW = {
    "training": (slow_training, "train", TASKS * STEPS),
    "loader": (slow_loader, "data", TASKS * STEPS),
    "memory": (slow_memory, "rehearse", TASKS * (STEPS + 1)),  # a draw at an epoch's start, and each step's work
    "task end": (slow_task_end, "task_end", TASKS),
    "validation": (slow_validation, "select", TASKS),
    "evaluation": (slow_test, "evaluate", TASKS),
    "saving": (slow_hook("on_save_checkpoint"), "checkpoint", TASKS),
}


class Fit(pl.Callback):
    """Measures the fit by itself, from after the clock's start to before its end."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = time.monotonic()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.seconds = time.monotonic() - self.began


def er(execution: str = "blocking", **kwargs: Any) -> tuple[ER, Any]:
    data = make_data(validate_on="test")
    rehearsal = RehearsalConfig(buffer_size=12, num_samples=4, execution=execution)
    pl.seed_everything(0)
    return ER(MLP([8]), data.num_classes, rehearsal=rehearsal, input_spec=data.input_spec, **kwargs), data


def run(folder: Path, agent: Any, data: Any, ckpt_path: Path | None = None, **kwargs: Any) -> tuple[float, TaskClock]:
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_epochs=1)
    fit = Fit()
    make_trainer(folder, [fit, saver], **kwargs).fit(agent, datamodule=data, ckpt_path=ckpt_path)
    return fit.seconds, agent.clock


@pytest.mark.parametrize("what", SLOW)
def test_each_wait_lands_in_its_own_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    slow, phase, times = SLOW[what]
    agent, data = er("inline")
    agent.clock.stopwatch = Stopwatch(PHASES, still := Time())
    slow(monkeypatch, agent, still.pause)
    _, clock = run(tmp_path, agent, data)
    assert list(clock.wall_time) == PHASES
    assert clock.wall_time == dict.fromkeys(PHASES, 0.0) | {phase: times}


def test_the_phases_add_up_to_the_fit_and_a_slow_memory_in_a_thread_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, data = er("blocking")
    slow_memory(monkeypatch, agent, pause)
    seconds, clock = run(tmp_path, agent, data)
    assert sum(clock.wall_time.values()) == pytest.approx(seconds, abs=0.25)
    # Those of the draws at the start of an epoch; the others are hidden behind the step in part.
    assert clock.wall_time["rehearse"] >= TASKS * WAIT
    assert min(clock.wall_time.values()) > 0


def test_a_resumed_run_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {phase: times for _, phase, times in SLOW.values()}
    # A checkpoint cannot know the end of its own saving.
    lost = {"whole": 0, "resumed": 1}
    for place, ckpt_path in (("whole", None), ("resumed", tmp_path / f"whole/step={2 * STEPS}.ckpt")):
        agent, data = er("inline")
        agent.clock.stopwatch = Stopwatch(PHASES, still := Time())
        with monkeypatch.context() as patch:
            for slow, _, _ in SLOW.values():
                slow(patch, agent, still.pause)
            _, clock = run(tmp_path / place, agent, data, ckpt_path)
        assert clock.wall_time == times | {"checkpoint": TASKS - lost[place]}


def test_each_fit_begins_at_zero_and_nothing_stays_wrapped(tmp_path: Path) -> None:
    agent, data = er()
    for fit in range(2):
        seconds, clock = run(tmp_path / str(fit), agent, data)
        assert sum(clock.wall_time.values()) == pytest.approx(seconds, abs=0.25)
    before = clock.wall_time
    time.sleep(0.01)
    assert clock.wall_time == before
    loop = agent.trainer.fit_loop.epoch_loop
    assert "save_checkpoint" not in vars(agent.trainer)
    assert not {"_on_before_fetch", "_on_after_fetch"} & set(vars(loop))
    assert "run" not in vars(loop.val_loop)


def test_validation_within_an_epoch_and_an_error_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, data = er()
    slow_validation(monkeypatch, agent, pause)
    seconds, clock = run(tmp_path, agent, data, val_check_interval=1)
    assert clock.wall_time["select"] >= TASKS * STEPS * WAIT
    assert sum(clock.wall_time.values()) == pytest.approx(seconds, abs=0.25)

    def fail() -> None:
        raise ZeroDivisionError

    agent.on_validation_epoch_start = fail
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, agent, data)
    stopped = clock.wall_time
    time.sleep(0.01)
    assert clock.wall_time == stopped


def test_a_checkpoint_of_before_the_phases_were_split() -> None:
    data = make_data()
    agent = make_agent("base", data)
    clock = agent.clock
    clock.schedule.boundaries = [0, 2, 4, 6]
    state = clock.state_dict() | {"wall_time": {"train": 3.0, "select": 1.0, "eval": 2.0}}
    clock._restore(state)
    assert clock.wall_time == dict.fromkeys(PHASES, 0.0) | {"train": 3.0, "select": 1.0, "evaluate": 2.0}
