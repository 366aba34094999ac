"""Where the time of a fit goes: phases add up, and each wait lands in its own, also through a resume."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning import ER, RehearsalConfig, TaskClock
from dcl_lightning.backbones import MLP
from dcl_lightning.data.loader import TaskLoader
from dcl_lightning.memory.manager import MemoryManager
from tests.conformance.small_stream import make_agent, make_data, make_trainer

WAIT = 0.05  # seconds of whatever is slow
TASKS, STEPS = 3, 3  # of an epoch
PHASES = ["train", "data", "rehearse", "task_end", "select", "evaluate", "checkpoint"]


def slowly(do: Any) -> Any:
    """Return a function that waits before it does its work."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(WAIT)
        return do(*args, **kwargs)

    return slow


def slow_loader(monkeypatch: pytest.MonkeyPatch, agent: Any) -> None:
    batches = TaskLoader._without_inputs

    def slow(self: TaskLoader, start: int) -> Any:
        for batch in batches(self, start):
            time.sleep(WAIT * self.train)
            yield batch

    monkeypatch.setattr(TaskLoader, "_without_inputs", slow)


def slow_memory(monkeypatch: pytest.MonkeyPatch, agent: Any) -> None:
    monkeypatch.setattr(MemoryManager, "advance", slowly(MemoryManager.advance))


def slow_task_end(monkeypatch: pytest.MonkeyPatch, agent: Any) -> None:
    agent.on_task_end = slowly(agent.on_task_end)


def slow_training(monkeypatch: pytest.MonkeyPatch, agent: Any) -> None:
    agent.training_step = slowly(agent.training_step)


def slow_validation(monkeypatch: pytest.MonkeyPatch, agent: Any) -> None:
    agent.on_validation_epoch_start = slowly(agent.on_validation_epoch_start)


def slow_test(monkeypatch: pytest.MonkeyPatch, agent: Any) -> None:
    agent.before_evaluation = lambda: time.sleep(WAIT)


def slow_saving(monkeypatch: pytest.MonkeyPatch, agent: Any) -> None:
    agent.on_save_checkpoint = slowly(agent.on_save_checkpoint)


# What is slow, the phase it belongs to, and how often it comes in a fit of one epoch a task.
SLOW = {
    "training": (slow_training, "train", TASKS * STEPS),
    "loader": (slow_loader, "data", TASKS * STEPS),
    "memory": (slow_memory, "rehearse", TASKS * STEPS),  # one draw at an epoch's start, and one insertion less
    "task end": (slow_task_end, "task_end", TASKS),
    "validation": (slow_validation, "select", TASKS),
    "evaluation": (slow_test, "evaluate", TASKS),
    "saving": (slow_saving, "checkpoint", TASKS),
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


@pytest.mark.parametrize(("what", "execution"), [*((what, "blocking") for what in SLOW), ("memory", "inline")])
def test_each_wait_lands_in_its_own_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, execution: str
) -> None:
    slow, phase, times = SLOW[what]
    agent, data = er(execution)
    slow(monkeypatch, agent)
    seconds, clock = run(tmp_path, agent, data)
    found = clock.wall_time
    assert list(found) == PHASES
    assert sum(found.values()) == pytest.approx(seconds, abs=0.25)
    if execution == "blocking" and what == "memory":
        times -= STEPS  # some of it is hidden behind the rest of the step
    assert found[phase] >= times * WAIT
    others = sum(found.values()) - found[phase]
    assert others < times * WAIT + 0.5, found


def test_a_resumed_run_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, data = er()
    slow_task_end(monkeypatch, agent)
    whole, _ = run(tmp_path, agent, data)
    # The file of the second task's end, in the state of which its own saving has begun.
    agent, data = er()
    slow_task_end(monkeypatch, agent)
    rest, clock = run(tmp_path / "resumed", agent, data, tmp_path / f"step={2 * STEPS}.ckpt")
    found = clock.wall_time
    assert TASKS * WAIT <= found["task_end"] < (TASKS + 1) * WAIT
    assert rest + 2 * WAIT <= sum(found.values()) < rest + whole
    assert found["checkpoint"] > 0


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
    slow_validation(monkeypatch, agent)
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
