"""The parts of a step add up, whatever is nested; Lightning's actions belong to the parts that their names say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dcl_lightning.callbacks import step_profile
from dcl_lightning.callbacks.step_profile import PARTS, WARM_UP, Part, StepProfile, StepProfiler, part_of, table_of
from tests.callbacks.test_wall_time import WAIT, Time, er, pause, slow_loader, slow_memory, slow_task_end, slow_training
from tests.conformance.small_stream import make_agent, make_data, make_trainer

FETCH = "[_TrainingEpochLoop].train_dataloader_next"

# What Lightning calls in a step, nested as it calls it: name, seconds before each of the calls within, calls within.
STEP: list[Any] = [
    (FETCH, 3, []),
    ("[LightningDataModule]ContinualDataModule.on_before_batch_transfer", 1, []),
    (
        "[Strategy]SingleDeviceStrategy.batch_to_device", 2,
        [
            ("[LightningDataModule]ContinualDataModule.transfer_batch_to_device", 1, []),
            ("[LightningDataModule]ContinualDataModule.on_after_batch_transfer", 4, []),
        ],
    ),
    ("[Callback]StreamProgress{'a': 'b.c]'}.on_train_batch_start", 5, []),
    (
        "run_training_batch", 6,
        [
            (
                "[LightningModule]ER.optimizer_step", 7,
                [
                    ("[Strategy]SingleDeviceStrategy.training_step", 8, []),
                    ("[LightningModule]ER.optimizer_zero_grad", 9, []),
                    (
                        "[Strategy]SingleDeviceStrategy.backward", 10,
                        [("[Callback]Rehearsal.on_before_backward", 11, []), ("[Callback]A.on_after_backward", 12, [])],
                    ),
                    ("[LightningModule]ER.configure_gradient_clipping", 13, []),
                ],
            ),
        ],
    ),
    ("[Callback]TaskClock.on_train_batch_end", 14, [("save_checkpoint", 15, [])]),
]  # fmt: skip
# By hand: the seconds of a call count once before each of the calls within it and once after the last.
BY_HAND = {
    "data": 3, "batch": 1 + 3 * 2 + 1 + 4, "rehearse": 0, "forward": 8, "backward": 3 * 10,
    "optimizer": 5 * 7 + 9 + 13, "callbacks": 5 + 11 + 12 + 2 * 14 + 15, "rest": 2 * 6 + 1,
}  # fmt: skip


def call(profiler: StepProfiler, time: Time, action: str, seconds: int, within: list[Any]) -> None:
    with profiler.profile(action):
        time.now += seconds
        for inner in within:
            call(profiler, time, *inner)
            time.now += seconds


@pytest.mark.parametrize("left_out", [0, 1, 3])
@pytest.mark.parametrize("steps", [1, 4])
def test_parts_are_exclusive_and_add_up(left_out: int, steps: int) -> None:
    time = Time()
    profiler = StepProfiler(steps, time)
    for action in STEP:
        call(profiler, time, *action)  # of the task before
    profiler.begin(left_out)
    for step in range(left_out + steps + 2):
        assert profiler.measured == min(max(step - left_out - 1, 0), steps)
        for action in STEP:
            call(profiler, time, *action)
        time.now += 1  # Lightning's loop
    assert profiler.measured == steps
    assert profiler.seconds == {part: steps * seconds for part, seconds in BY_HAND.items()}
    assert list(PARTS) == list(BY_HAND)


def test_any_nesting_adds_up_to_the_steps() -> None:
    draw = random.Random(0)
    actions = [action for action in _names(STEP) if action != FETCH]

    def tree(depth: int) -> list[Any]:
        return [
            (draw.choice(actions), draw.randint(0, 9), tree(depth - 1)) for _ in range(draw.randint(0, 3) * (depth > 0))
        ]

    for _ in range(50):
        time = Time()
        profiler = StepProfiler(2, time)
        profiler.begin(0)
        began = 0.0
        for step in range(3):
            if step == 2:
                began = time.now - began
            call(profiler, time, FETCH, 1, [])
            for action in tree(3):
                call(profiler, time, *action)
        assert sum(profiler.seconds.values()) == began


def _names(actions: list[Any]) -> list[str]:
    return [name for action, _, within in actions for name in (action, *_names(within))]


def test_a_step_that_never_ends_is_not_measured() -> None:
    time = Time()
    profiler = StepProfiler(5, time)
    profiler.begin(0)
    for _ in range(3):
        call(profiler, time, FETCH, 1, [])
        time.now += 1
    time.now += 100  # the end of the epoch
    assert profiler.measured == 2
    assert profiler.seconds == dict.fromkeys(PARTS, 0) | {"data": 2, "rest": 2}


@pytest.mark.parametrize(
    ("slow", "part"),
    [(slow_loader, "data"), (slow_training, "forward"), (slow_memory, "rehearse")],
)
def test_what_is_slow_shows_in_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slow: Any, part: Part
) -> None:
    still = Time()
    monkeypatch.setattr(step_profile, "_time_on", lambda device: still.now)
    agent, data = er("inline")
    data.batch_size = 2  # seven steps a task
    slow(monkeypatch, agent, still.pause)
    slow_task_end(monkeypatch, agent, still.pause)  # is no part of a step
    profile = StepProfile(2)
    make_trainer(tmp_path, [profile], fast_dev_run=WARM_UP + 2 + 1).fit(agent, datamodule=data)
    assert profile.profiler.measured == 2
    assert profile.profiler.seconds == dict.fromkeys(PARTS, 0) | {part: 2}
    shown = capsys.readouterr().out
    assert "2 steps of task 2 of 3: ER with MLP (0.00 M parameters), 2 new + 4 rehearsed images a step, cpu, " in shown
    assert f"Largest part: {PARTS[part]}, 100 % of a step." in shown
    assert "enter" not in vars(agent.clock.stopwatch)
    assert type(agent.trainer.profiler).__name__ == "PassThroughProfiler"


def test_a_slow_memory_in_a_thread_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, data = er("blocking")
    data.batch_size = 2
    slow_memory(monkeypatch, agent, lambda: [pause() for _ in range(6)])
    profile = StepProfile(2)
    make_trainer(tmp_path, [profile], fast_dev_run=WARM_UP + 2 + 1).fit(agent, datamodule=data)
    assert profile.profiler.seconds["rehearse"] > WAIT


def test_a_stream_of_one_task_and_a_task_of_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(increment=6, batch_size=16)  # three steps
    profile = StepProfile(9)
    trainer = make_trainer(tmp_path, [profile], fast_dev_run=WARM_UP + 9 + 1)
    trainer.fit(make_agent("base", data), datamodule=data)
    shown = capsys.readouterr().out
    assert "1 step of task 1 of 1: FineTuning with MLP" in shown
    assert "16 new + 0 rehearsed images a step" in shown


def test_the_table_is_aligned() -> None:
    lines = table_of({part: (i + 1) / 1e3 for i, part in enumerate(PARTS)}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[-2:] == ["1.00", "2.8"]
    assert lines[-1].split() == ["total", "36.00", "100.0"]


def test_a_name_that_says_nothing_belongs_to_the_action_around_it() -> None:
    names = ("run_training_epoch", "save_checkpoint", "[Strategy]SingleDeviceStrategy.on_train_batch_start")
    assert [part_of(name) for name in names] == [None, None, None]
