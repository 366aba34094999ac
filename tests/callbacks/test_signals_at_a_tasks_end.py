"""A signal during a task's end takes effect at once, and the resumed run finishes that end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from tests.conformance.rehearsal_runs import memory_state, same
from tests.conformance.small_stream import make_data, make_trainer, matrix, weights

ROOT = Path(__file__).parents[2]
# Herding and class means; held-out rows; the Fisher information; a memory that is filled; nothing but the matrix.
NAMES = ["icarl", "bic", "ewc", "derpp_task_end", "base"]


class Signalled(MLP):
    """Is sent a signal in the n-th batch that it sees in evaluation."""

    at: int | None = None
    count = 0

    def __init__(self) -> None:
        super().__init__([8])

    def forward(self, inputs):
        if not self.training:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(inputs)


class Steps(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append(trainer.global_step)


def fit(name: str, folder: Path, at: int | None, ckpt: Path | None = None):
    data = make_data(eval_batch_size=4)
    pl.seed_everything(0)
    options = {"epochs_per_task": 2, "lr": 0.05, "momentum": 0.9, "input_spec": data.input_spec}
    if name == "icarl":
        options["rehearsal"] = {"buffer_size": 12}
    elif name not in ("base", "ewc"):
        options["rehearsal"] = {"buffer_size": 12, "num_samples": 4}
    agent, steps = getattr(short_names, name)(Signalled(), data.num_classes, **options), Steps()
    agent.backbone.at = at  # not the teacher's
    saver = ModelCheckpoint(folder, filename="{step}", every_n_epochs=100, save_on_exception=True)
    trainer = make_trainer(folder, [steps, saver], limit_val_batches=0)
    stopped = None
    try:
        trainer.fit(agent, datamodule=data, ckpt_path=ckpt)
    except SystemExit as end:
        stopped = end
    return agent, steps.seen, stopped


def state(agent):
    manager = getattr(getattr(agent, "rehearsal", None), "manager", None)
    buffers = {name: buffer for name, buffer in agent.named_buffers() if "num_batches" not in name}
    return {
        "weights": weights(agent),
        "matrix": matrix(agent).nan_to_num(-1),
        "buffers": buffers,
        "memory": None if manager is None else memory_state(manager),
    }


@lru_cache
def straight(name: str, folder: Path):
    agent, steps, _ = fit(name, folder, None)
    return state(agent), steps, agent.backbone.count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_at_any_batch_ends_the_run_there_and_what_is_left_is_done_when_resumed(
    tmp_path: Path, folder: Path, name: str, share: float
) -> None:
    expected, steps, passes = straight(name, folder)
    at = 1 + int(share * (passes - 1))
    told, before, stopped = fit(name, tmp_path, at)
    assert stopped is not None
    assert stopped.code == 143
    assert told.backbone.count == at, "no further batch was looked at"
    saved = list(tmp_path.glob("*.ckpt"))
    assert len(saved) == 1

    # A second one, while what is left is done: nothing was learnt, so what was saved stays as it is.
    _, none, again = fit(name, tmp_path, 1, saved[0])
    assert again is not None
    assert (again.code, none) == (143, [])
    assert list(tmp_path.glob("*.ckpt")) == saved

    agent, after, stopped = fit(name, tmp_path, None, saved[0])
    assert stopped is None
    assert before + after == steps
    assert same(state(agent), expected)


class Slow(MLP):
    """Takes a tenth of a second for a batch in evaluation, and tells how many it has seen."""

    def __init__(self, place: str) -> None:
        super().__init__([8])
        self.place, self.count = Path(place), 0

    def forward(self, inputs):
        if not self.training:
            self.count += 1
            self.place.with_suffix(".new").write_text(str(self.count))
            self.place.with_suffix(".new").rename(self.place)
            time.sleep(0.1)
        return super().forward(inputs)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_ends_within_herding_with_the_signals_code(
    tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    place = tmp_path / "place"
    options = {
        "--model": "icarl", "--model.backbone": "tests.callbacks.test_signals_at_a_tasks_end.Slow",
        "--model.backbone.place": str(place), "--data.dataset": "digits", "--data.eval_batch_size": "1",
        "--trainer.accelerator": "cpu", "--trainer.limit_val_batches": "0",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "fit", *(word for pair in options.items() for word in pair)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not place.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signum)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert int(place.read_text()) < 100, "of the task's 288 samples"
