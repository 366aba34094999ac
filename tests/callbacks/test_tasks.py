"""The task clock with Lightning's callbacks and limits: what ends a task, what ends the run, what is cleaned up."""

from __future__ import annotations

import math
import warnings
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dcl_lightning import ER, ContinualDataModule, RehearsalConfig, TaskClock, TaskReport
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import Rehearsal, StreamProgress
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import ON, arrays, make_agent, make_data, make_trainer, matrix, weights

TASKS, EPOCHS, BATCHES = 3, 3, 3  # of the small stream: 14 samples a task in batches of 5


class Metric(pl.Callback):
    """Logs the same value at every validation, and notes the task of every step."""

    def __init__(self, value: float = 1.0) -> None:
        self.value, self.steps = value, []

    def on_validation_epoch_end(self, trainer, module):
        module.log("metric", torch.tensor(self.value))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.steps.append((int(batch.task_ids[0]), trainer.current_epoch))


# How an EarlyStopping of a metric that stays at 1 stops, and after how many steps of each task, counted by hand.
WAYS = {
    "patience 0": ({"patience": 0}, 1.0, {}, 2 * BATCHES),  # the first check improves on infinity
    "patience 1": ({"patience": 1}, 1.0, {}, 2 * BATCHES),
    "patience 2": ({"patience": 2}, 1.0, {}, 3 * BATCHES),
    "threshold": ({"stopping_threshold": 2.0}, 1.0, {}, BATCHES),
    "divergence": ({"divergence_threshold": 0.5}, 1.0, {}, BATCHES),
    "not finite": ({}, math.nan, {}, BATCHES),
    "after each batch": ({"patience": 1}, 1.0, {"val_check_interval": 1}, 2),
    "threshold after the first batch": ({"stopping_threshold": 2.0}, 1.0, {"val_check_interval": 1}, 1),
    "after every second batch": ({"patience": 1}, 1.0, {"val_check_interval": 2}, BATCHES + 2),
    "patience over epochs": ({"patience": 4}, 1.0, {"val_check_interval": 1}, BATCHES + 2),
    "never": ({"patience": 9}, 1.0, {}, EPOCHS * BATCHES),
    "metric not there": ({"monitor": "none", "strict": False, "patience": 0}, 1.0, {}, EPOCHS * BATCHES),
    "min_epochs": ({"stopping_threshold": 2.0}, 1.0, {"min_epochs": 2}, 2 * BATCHES),
    "min_epochs, amid an epoch": (
        {"stopping_threshold": 2.0},
        1.0,
        {"min_epochs": 2, "val_check_interval": 1},
        2 * BATCHES,
    ),
    "threshold, max_steps far away": ({"stopping_threshold": 2.0}, 1.0, {"max_steps": 1000}, BATCHES),
    "never, max_steps far away": ({"patience": 9}, 1.0, {"max_steps": 1000}, EPOCHS * BATCHES),
}


def stopping_run(folder: Path, way: str, check: bool | None, savers=(), ckpt_path=None, seed: int = 0):
    options, value, limits, _ = WAYS[way]
    metric, data = Metric(value), make_data(validate_on="test")
    agent = make_agent("base", data, epochs_per_task=EPOCHS, seed=seed)
    stopper = EarlyStopping(**{"monitor": "metric", "check_on_train_epoch_end": check} | options)
    trainer = make_trainer(folder, [metric, stopper, *savers], enable_checkpointing=bool(savers), **limits)
    trainer.fit(agent, datamodule=data, ckpt_path=ckpt_path)
    return agent, trainer, metric, stopper


@pytest.mark.parametrize("check", [None, True, False])
@pytest.mark.parametrize("way", WAYS)
def test_an_early_stop_ends_its_task(tmp_path: Path, way: str, check: bool | None) -> None:
    steps = WAYS[way][3]
    interval = WAYS[way][2].get("val_check_interval")
    if interval and (check or (check is None and interval == 1)):  # looks at the end of each epoch only
        patience = WAYS[way][0].get("patience", 0)
        steps = BATCHES * min(EPOCHS, max(patience + 1 if patience else 1, WAYS[way][2].get("min_epochs", 1)))
    agent, trainer, metric, _ = stopping_run(tmp_path, way, check)
    assert [task for task, _ in metric.steps] == [t for t in range(TASKS) for _ in range(steps)]
    assert agent.clock.schedule.evaluated == TASKS
    assert not trainer.should_stop


def test_tasks_after_one_that_is_stopped_have_all_their_epochs(tmp_path: Path) -> None:
    data = make_data(validate_on="test")
    agent = make_agent("base", data, epochs_per_task=EPOCHS)

    class TaskNumber(Metric):
        def on_validation_epoch_end(self, trainer, module):
            module.log("metric", torch.tensor(float(self.steps[-1][0])))  # below the threshold in task 0 alone

    metric = TaskNumber()
    stopper = EarlyStopping("metric", mode="min", stopping_threshold=0.5, patience=100)
    make_trainer(tmp_path, [metric, stopper], enable_checkpointing=False).fit(agent, datamodule=data)
    counts = [[task for task, _ in metric.steps].count(t) for t in range(TASKS)]
    assert counts == [BATCHES] + [BATCHES * EPOCHS] * (TASKS - 1)


@pytest.mark.parametrize(
    "way",
    [
        "threshold",
        "after each batch",
        "after every second batch",
        "patience over epochs",
        "min_epochs",
        "threshold, max_steps far away",
        "never, max_steps far away",
    ],
)
def test_an_early_stop_resumes_from_every_checkpoint(tmp_path: Path, way: str) -> None:
    options = {"save_top_k": -1, "filename": "{epoch}-{step}"}
    after_validation = "val_check_interval" in WAYS[way][2]
    savers = [
        ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, **options),
        ModelCheckpoint(tmp_path / "checks", monitor="metric", save_on_train_epoch_end=not after_validation, **options),
        ModelCheckpoint(tmp_path / "epochs", save_on_train_epoch_end=True, **options),
    ]
    whole, trainer, _, _ = stopping_run(tmp_path, way, not after_validation, savers)
    paths = sorted(tmp_path.glob("*/*.ckpt"))
    assert len({path.parent for path in paths}) == len(savers)
    for path in paths:
        again, trainer2, _, _ = stopping_run(tmp_path / "again", way, not after_validation, ckpt_path=path, seed=5)
        name = path.relative_to(tmp_path)
        assert trainer2.global_step == trainer.global_step, name
        assert torch.equal(weights(again), weights(whole)), name
        assert torch.equal(matrix(again).nan_to_num(-1), matrix(whole).nan_to_num(-1)), name


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_a_users_own_stop_ends_the_run_also_where_early_stopping_stops(tmp_path: Path, hook: str) -> None:
    def stop(trainer, *_):
        trainer.should_stop = True

    metric, data = Metric(), make_data(validate_on="test")
    agent = make_agent("base", data, epochs_per_task=EPOCHS)
    user = type("User", (pl.Callback,), {hook: lambda self, trainer, *_: stop(trainer)})()
    stoppers = [EarlyStopping("metric", stopping_threshold=2.0), EarlyStopping("metric", mode="max")]
    make_trainer(tmp_path, [metric, user, *stoppers]).fit(agent, datamodule=data)
    assert {epoch for _, epoch in metric.steps} == {0}


def test_what_early_stopping_says_of_the_last_task_stays(tmp_path: Path) -> None:
    _, _, _, stopper = stopping_run(tmp_path, "patience 1", None)
    assert (stopper.wait_count, stopper.stopped_epoch) == (1, 2 * TASKS - 1)


@pytest.mark.parametrize("fail", [False, True])
def test_a_fit_leaves_trainer_and_data_module_as_they_were(tmp_path: Path, fail: bool) -> None:
    def state():
        loop = trainer.fit_loop
        limits = loop.max_epochs, loop.min_epochs, loop.max_steps, trainer.reload_dataloaders_every_n_epochs
        return list(trainer.callbacks), limits, data._clock

    class Fail(pl.Callback):
        def on_train_end(self, trainer, module):
            if fail:
                raise RuntimeError

    mine, stopper = TaskClock(2), EarlyStopping("metric", patience=9)
    data = make_data(validate_on="test")
    trainer = make_trainer(tmp_path, [mine, ModelCheckpoint(tmp_path), stopper, Fail(), Metric()], max_epochs=6)
    before = state()
    if fail:
        with pytest.raises(RuntimeError):
            trainer.fit(make_agent("base", data), datamodule=data)
    else:
        trainer.fit(make_agent("base", data), datamodule=data)
        assert stopper.__dict__.keys() == EarlyStopping("metric").__dict__.keys() | {"log", "log_dict"}
    assert state() == (before[0], (6, 0, -1, 0), None)


def test_a_refused_fit_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    data = make_data(validate_on="test", boundaries="hidden")
    trainer = make_trainer(tmp_path)
    before = list(trainer.callbacks)
    with pytest.raises(ConfigurationError, match="boundaries=hidden"):
        trainer.fit(make_agent("icarl", data), datamodule=data)
    assert trainer.callbacks == before


def test_a_second_agent_on_the_same_trainer_has_a_clock_of_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    first, second = (make_agent("base", make_data(validate_on="test"), epochs_per_task=n) for n in (2, 1))
    trainer.fit(first, datamodule=make_data(validate_on="test"))
    trainer.fit(second, datamodule=make_data(validate_on="test"))
    fresh = make_agent("base", make_data(validate_on="test"), epochs_per_task=1)
    make_trainer(tmp_path).fit(fresh, datamodule=make_data(validate_on="test"))
    assert trainer.global_step == TASKS * BATCHES
    assert torch.equal(weights(second), weights(fresh))
    assert second.clock.samples_seen == fresh.clock.samples_seen


def test_the_checkpoint_callback_is_lightnings(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val/acc", mode="max")
    data = make_data(val_ratio=0.3)
    agent = make_agent("base", data)
    trainer = make_trainer(tmp_path, [TaskClock(2), saver])
    trainer.fit(agent, datamodule=data)
    before = matrix(agent)
    assert trainer.checkpoint_callback is saver
    trainer.test(datamodule=data, verbose=False)  # the best weights
    trainer.test(ckpt_path="best", datamodule=data, verbose=False)
    trainer.test(agent, ckpt_path=saver.best_model_path, datamodule=data, verbose=False)
    assert torch.equal(matrix(agent).nan_to_num(-1), before.nan_to_num(-1))


def test_checkpoints_are_named_after_their_task_also_in_a_resumed_run(tmp_path: Path) -> None:
    """Counted by hand: each task is stopped after two of its epochs, and an epoch has three steps."""
    done = [(step // (2 * BATCHES), step // BATCHES, step + 1) for step in range(TASKS * 2 * BATCHES)]

    def run(folder: Path, ckpt_path: Path | None = None) -> set[str]:
        every = {"every_n_train_steps": 1, "save_top_k": -1}
        own = {"filename": "{step}-of-{task:02d}", "auto_insert_metric_name": False, "mode": "max"}
        savers = [
            ModelCheckpoint(folder / "steps", **every, save_last=True),
            ModelCheckpoint(folder / "own", **every, **own),
            ModelCheckpoint(folder / "best", monitor="metric"),
        ]
        stopping_run(folder, "patience 1", True, savers, ckpt_path)
        assert not any("format_checkpoint_name" in vars(saver) for saver in savers)
        return {str(path.relative_to(folder)) for path in folder.rglob("*.ckpt")}

    def names(steps: list[tuple[int, int, int]]) -> set[str]:
        found = {f"steps/task={t}-epoch={e}-step={s}.ckpt" for t, e, s in steps} | {"steps/last.ckpt"}
        return found | {f"own/{s}-of-{t:02d}.ckpt" for t, _, s in steps}

    best = {f"best/task={t}-epoch={2 * t}-step={(2 * t + 1) * BATCHES}.ckpt" for t in range(TASKS)}
    assert run(tmp_path / "whole") == names(done) | best
    end_of_first = tmp_path / "whole" / "steps" / "task=0-epoch=1-step=6.ckpt"
    later = best - {"best/task=0-epoch=0-step=3.ckpt"}
    assert run(tmp_path / "again", end_of_first) == names(done[6:]) | later


def test_a_checkpoint_of_an_exception_is_named_after_its_task(tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            assert trainer.global_step < EPOCHS * BATCHES + 1

    saver, data = ModelCheckpoint(tmp_path, every_n_epochs=100, save_on_exception=True), make_data()
    agent = make_agent("base", data, epochs_per_task=EPOCHS)
    with pytest.raises(AssertionError):
        make_trainer(tmp_path, [Fail(), saver]).fit(agent, datamodule=data)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["task=1-epoch=3-step=10.ckpt"]


def test_a_value_of_the_users_called_task_keeps_its_place_in_a_name(tmp_path: Path) -> None:
    class Task(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            module.log("task", torch.tensor(7.0))

    data = make_data()
    agent = make_agent("base", data, epochs_per_task=1)
    make_trainer(tmp_path, [Task(), ModelCheckpoint(tmp_path, "{task}")]).fit(agent, datamodule=data)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["task=7.0.ckpt"]


def test_a_clock_of_ones_own_needs_no_checkpoints(tmp_path: Path) -> None:
    data = make_data(validate_on="test")
    trainer = make_trainer(tmp_path, [TaskClock(1)], enable_checkpointing=False)
    trainer.fit(make_agent("base", data), datamodule=data)
    assert trainer.global_step == TASKS * BATCHES


@pytest.mark.parametrize(("kind", "name"), [
    (TaskClock, "clock"), (TaskReport, "report"), (StreamProgress, "progress"), (Rehearsal, "rehearsal"),
])  # fmt: skip
def test_a_subclass_among_the_callbacks_takes_the_place_of_ours(tmp_path: Path, kind: type, name: str) -> None:
    calls: list[str] = []

    class Mine(kind):
        def on_train_start(self, trainer, module):
            calls.append("start")
            super().on_train_start(trainer, module)

    data = make_data(validate_on="test")
    config = RehearsalConfig(buffer_size=12, policy="reservoir", weighting="none")
    mine = Mine(config) if kind is Rehearsal else Mine()
    agent = ER(MLP([8]), data.num_classes, rehearsal=config, input_spec=data.input_spec)
    present: list[pl.Callback] = []
    agent.on_train_epoch_start = lambda: present.extend(c for c in agent.trainer.callbacks if isinstance(c, kind))
    trainer = pl.Trainer(
        callbacks=[mine], default_root_dir=tmp_path, logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=TASKS,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    assert getattr(agent, name) is mine
    assert set(present) == {mine}
    assert calls == ["start"]


def test_two_clocks_are_refused(tmp_path: Path) -> None:
    class Mine(TaskClock):
        pass

    data = make_data(validate_on="test")
    with pytest.raises(ConfigurationError, match="TaskClock, Mine: give one TaskClock"):
        make_trainer(tmp_path, [TaskClock(), Mine()]).fit(make_agent("base", data), datamodule=data)


@pytest.mark.parametrize("interval", [timedelta(milliseconds=1), "00:00:00:01", {"hours": 1}])
def test_validation_by_time(tmp_path: Path, interval: object) -> None:
    metric, data = Metric(), make_data(validate_on="test")
    agent = make_agent("base", data)
    make_trainer(tmp_path, [metric], val_check_interval=interval).fit(agent, datamodule=data)
    assert len(metric.steps) == TASKS * 2 * BATCHES
    assert agent.clock.schedule.evaluated == TASKS


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"overfit_batches": 2}, "trainer.overfit_batches=2 needs the same batches"),
        ({"min_steps": 5}, "trainer.min_steps=5 counts steps of the whole stream"),
        ({"max_epochs": 4}, "trainer.max_epochs=4 contradicts epochs_per_task"),
    ],
)
def test_limits_that_mean_nothing_over_tasks_are_refused(tmp_path: Path, limits: dict, words: str) -> None:
    metric, data = Metric(), make_data(validate_on="test")
    trainer = make_trainer(tmp_path, [metric, EarlyStopping("metric")], **limits)
    with pytest.raises(ConfigurationError, match=words):
        trainer.fit(make_agent("base", data), datamodule=data)
    assert metric.steps == []


def test_changing_accumulation_is_refused_beside_a_schedule(tmp_path: Path) -> None:
    data = make_data(validate_on="test")
    changing = pl.callbacks.GradientAccumulationScheduler({0: 1, 2: 3})
    with pytest.raises(ConfigurationError, match="changes the steps of an epoch"):
        make_trainer(tmp_path, [changing]).fit(make_agent("base", data, milestones=[1]), datamodule=data)
    trainer = make_trainer(tmp_path, [changing])
    trainer.fit(make_agent("base", data), datamodule=data)
    assert trainer.global_step == 2 * BATCHES + 4 * 1


def test_the_state_of_a_clock_is_read_without_the_other_workers(tmp_path: Path) -> None:
    class Alone(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            comm, module.clock._comm = module.clock._comm, None
            states.append(module.clock.state_dict()["samples_seen"]["new"])
            module.clock._comm = comm

    states: list[int] = []
    data = make_data(validate_on="test")
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    make_trainer(tmp_path, [Alone(), saver]).fit(make_agent("base", data), datamodule=data)
    assert states[:3] == [0, 5, 10], "as of the last save"
    saved = torch.load(tmp_path / "step=3.ckpt")["callbacks"]["TaskClock"]["samples_seen"]
    assert saved == {"new": 14, "rehearsed": 0}


def test_one_agent_learns_one_set_of_labels(tmp_path: Path) -> None:
    def data_of(labels, **kwargs):
        x, y, *_ = arrays()
        rows = torch.isin(y, torch.tensor(labels))
        return ContinualDataModule((x[rows], y[rows], x[rows], y[rows]), increment=1, batch_size=5, seed=0, **kwargs)

    agent = make_agent("base", data_of(range(4)))
    make_trainer(tmp_path).fit(agent, datamodule=data_of([0, 1]))
    for other, words in (
        (data_of([2, 3]), r"have learnt the labels \[0, 1\], these data have \[2, 3\]"),
        (data_of([0, 1], class_order=[1, 0]), r"learnt the labels \[0, 1\], these data have \[1, 0\]"),
        (data_of(range(5)), "5 classes, agent FineTuning has num_classes=4"),
    ):
        before = weights(agent)
        with pytest.raises(ConfigurationError, match=words):
            make_trainer(tmp_path).fit(agent, datamodule=other)
        assert torch.equal(weights(agent), before)
    for more in (data_of([0, 1, 2]), data_of([0, 1])):
        make_trainer(tmp_path).fit(agent, datamodule=more)
        assert agent.inference.labels == [0, 1, 2]


def test_an_agent_that_learnt_nothing_takes_any_labels(tmp_path: Path) -> None:
    data = make_data(validate_on="test")
    agent = make_agent("base", data)
    with pytest.raises(ConfigurationError):
        make_trainer(tmp_path, max_epochs=4).fit(
            agent, datamodule=make_data(validate_on="test", class_order=[5, 4, 3, 2, 1, 0])
        )
    make_trainer(tmp_path).fit(agent, datamodule=data)


def test_a_fit_is_quiet_about_what_is_normal_and_leaves_the_filters(tmp_path: Path) -> None:
    before = list(warnings.filters)
    trainer = pl.Trainer(**ON, logger=CSVLogger(tmp_path), log_every_n_steps=1000, default_root_dir=tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        trainer.fit(make_agent("base", make_data()), datamodule=make_data())
        assert list(warnings.filters) == inside
    said = [str(warning.message) for warning in heard]
    assert not [text for text in said if "across ranks is zero" in text or "logging interval" in text]
    assert list(warnings.filters) == before
