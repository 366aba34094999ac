"""Real kills at random moments, mostly during a save: every file is whole, and the resumed run ends the same."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.conformance.agents import NAMES, make
from tests.conformance.small_stream import make_data, make_trainer, matrix, weights

ROOT = Path(__file__).parents[2]
# nil_v2 repeats nothing.
REPEATING = [name for name in NAMES if name != "nil_v2"]


def kills(folder: Path, count: int, seed: int, *names: str, timeout: float = 280) -> dict[str, int]:
    """Run ``killed_fits.py``; return what it counted."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.killed_fits", str(folder), str(count), str(seed), *names],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    print(f"seed {seed}, {', '.join(names)}: {counted}")
    return counted


def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    counted = kills(tmp_path, 10, 0, "nil", "nil_v1", "nil_global", "icarl", "derpp")
    assert counted["kills"] >= 10
    assert counted["later"] > 3


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_two_hundred_kills_while_saving(tmp_path: Path) -> None:
    counted = kills(tmp_path, 200, 1, "nil", "nil_v1", "nil_v4", "nil_global", timeout=3500)
    assert counted["kills"] >= 200


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_every_agent_killed_and_resumed_equals_uninterrupted(tmp_path: Path, seed: int) -> None:
    counted = kills(tmp_path, len(REPEATING), 100 + seed, *REPEATING, timeout=1700)
    assert counted["kills"] >= 1


class Stop(Exception):
    """Ends a fit where a kill would."""


class StopAt(pl.Callback):
    """Raises before the step after this one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step >= self.step:
            raise Stop


@pytest.mark.parametrize("name", ["nil_v1", "icarl"])
def test_a_run_that_is_resumed_again_and_again_is_the_run(tmp_path: Path, name: str) -> None:
    """After each step, so also in the epoch after one from whose end it was resumed."""

    def run(folder: Path, stop: int, ckpt: Path | None):
        data = make_data(batch_size=7)
        agent = make(name, data)
        saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = make_trainer(tmp_path, [StopAt(stop), saver], limit_val_batches=0)
        with contextlib.suppress(Stop):
            trainer.fit(agent, datamodule=data, ckpt_path=ckpt)
        return agent

    whole, last = run(tmp_path / "whole", 10**9, None), None
    steps = whole.trainer.global_step
    for step in range(1, steps + 1):
        again = run(tmp_path / "parts", step if step < steps else 10**9, last)
        last = tmp_path / "parts" / f"step={step}.ckpt"
    assert torch.equal(weights(again), weights(whole))
    assert torch.equal(matrix(again).nan_to_num(-1), matrix(whole).nan_to_num(-1))
