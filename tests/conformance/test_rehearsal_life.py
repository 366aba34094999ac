"""Rehearsal in one process: odd sizes, failures, and clean-up."""

from __future__ import annotations

import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.prefetch import MemoryEngine
from tests.conformance.rehearsal_runs import assert_same_run, buffer_of, fit, make_nil, memory_state, same, watch
from tests.conformance.small_stream import make_data, make_trainer

_THREAD = "rehearsal"


pytestmark = pytest.mark.usefixtures("one_thread")


# -- small and odd ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "config"),
    [
        (14, {}),  # a task of one batch
        (2, {"num_candidates": 4}),  # batches smaller than c
        (5, {"buffer_size": 6, "num_samples": 20}),  # a memory smaller than r
        (1, {"num_samples": 1, "num_candidates": 1}),
        (13, {"num_samples": 50, "buffer_size": 100}),  # a last batch of one sample, a memory never full
    ],
)
def test_odd_sizes(tmp_path: Path, batch_size: int, config: dict[str, Any]) -> None:
    config = {"buffer_size": 12} | config
    for scope in ("local", "global"):
        rehearsed: list[int] = []

        def look(agent, batch, loss, rehearsed=rehearsed):
            rehearsed.append(len(batch.targets) - batch.num_new)

        runs = []
        for execution in ("inline", "blocking"):
            rehearsed.clear()
            data = make_data(batch_size=batch_size)
            runs.append(fit(tmp_path, data=data, look=look, scope=scope, execution=execution, **config))
        assert_same_run(*runs)
        assert torch.isfinite(runs[0][1]).all()
        assert rehearsed[0] == 0
        most = min(config.get("num_samples", 3), config["buffer_size"])
        full = len(buffer_of(runs[0][0])) if config["buffer_size"] == 100 else most
        assert max(rehearsed) <= full
        assert rehearsed[-1] == (full if config["buffer_size"] < 100 else rehearsed[-1])
        assert rehearsed[-1] > 0


def test_a_memory_smaller_than_the_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="6 classes"):
        fit(tmp_path, buffer_size=5)


# -- failure and life ------------------------------------------------------------------------------


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(_THREAD)]


@pytest.mark.parametrize("execution", ["inline", "blocking", "nonblocking"])
def test_an_exception_of_the_manager_ends_the_fit(tmp_path: Path, monkeypatch, execution: str) -> None:
    inner, calls, steps = RehearsalBuffer.add, [], []

    def broken_add(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("no room on the moon")
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(RehearsalBuffer, "add", broken_add)
    data = make_data()
    agent = make_nil(data, execution=execution)
    watch(agent, lambda batch, loss: steps.append(len(calls)))
    with pytest.raises(RuntimeError, match="no room on the moon") as error:
        make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    assert "broken_add" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    # The fifth step offers (inline: after it has run); without waiting, it may be noticed at the epoch's end.
    assert len(steps) <= (6 if execution == "nonblocking" else 5)
    assert not threads()
    assert "on_before_batch_transfer" not in agent.__dict__
    assert "on_after_batch_transfer" not in data.__dict__


def test_an_interrupted_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    data = make_data()
    agent = make_nil(data, execution="blocking")
    watch(agent, lambda batch, loss: (_ for _ in ()).throw(ValueError("mine")))
    with pytest.raises(ValueError, match="mine"):
        make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    assert not threads()
    assert "on_after_batch_transfer" not in data.__dict__


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    for turn in range(100):
        engine: MemoryEngine[int] = MemoryEngine(background=True)
        assert threads()
        engine.submit(lambda turn=turn: turn)
        assert turn % 2 or engine.collect() == turn
        engine.close()
    background = {"execution": "blocking"}
    for config in (background, background | {"prefetch": "batch"}, {"execution": "nonblocking"}):
        for _ in range(2):
            fit(tmp_path, trainer={"max_steps": 4}, **config)
    assert not threads()
    assert threading.active_count() <= before


def test_evaluation_does_not_touch_the_memory(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    data = make_data(val_ratio=0.3)
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": 1}
    agent, losses = fit(tmp_path, data=data, callbacks=[saver], trainer=options, execution="blocking")
    quiet = fit(tmp_path, data=make_data(val_ratio=0.3), execution="blocking")
    assert_same_run((agent, losses), quiet)
    before = memory_state(agent.rehearsal.manager)
    trainer = make_trainer(tmp_path)
    trainer.validate(agent, datamodule=data, verbose=False)
    trainer.test(agent, datamodule=data, verbose=False)
    trainer.test(agent, datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    trainer.predict(agent, datamodule=data)
    assert same(before, memory_state(agent.rehearsal.manager))
    assert int(before["buffer"]["slots"]["seen"]) == agent.clock.samples_seen["new"]


def test_a_second_fit_starts_with_an_empty_memory(tmp_path: Path) -> None:
    rehearsed: list[int] = []
    data = make_data()
    agent = make_nil(data, execution="blocking")
    watch(agent, lambda batch, loss: rehearsed.append(len(batch.targets) - batch.num_new))
    for _ in range(2):
        logger = CSVLogger(tmp_path)
        trainer = make_trainer(tmp_path, limit_val_batches=0, log_every_n_steps=1)
        trainer.logger = logger
        trainer.fit(agent, datamodule=data)
        header, first, *_ = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        assert all(float(v) >= 0 for k, v in zip(header.split(","), first.split(","), strict=True) if "wait" in k and v)
    assert rehearsed[0] == rehearsed[18] == 0
    assert rehearsed[19] == 3
