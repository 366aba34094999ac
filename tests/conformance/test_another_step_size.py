"""A run resumed with another batch size continues at the same place of the stream."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.conformance.small_stream import make_agent, make_data, make_trainer, matrix


class Watch(pl.Callback):
    """Epoch, batch, samples and rate of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, list[int]]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.steps.append((trainer.current_epoch, index, batch.sample_ids.tolist()))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def run(folder: Path, batch_size: int, callbacks=(), ckpt=None, **trainer):
    data, watch = make_data(batch_size=batch_size), Watch()
    agent = make_agent("base", data, epochs_per_task=3, milestones=[1, 2])
    make_trainer(folder, [watch, *callbacks], **trainer).fit(agent, datamodule=data, ckpt_path=ckpt)
    return agent, watch


@pytest.mark.parametrize("batch_size", [3, 7])
def test_it_goes_on_after_as_many_samples(tmp_path: Path, batch_size: int) -> None:
    """Tasks of 14 samples; every step of the second task and the ends of epochs, with five samples a step."""
    steps = ModelCheckpoint(tmp_path / "s", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    ends = ModelCheckpoint(tmp_path / "e", every_n_epochs=1, save_top_k=-1, filename="{step}")
    run(tmp_path, 5, [steps, ends])
    whole, wanted = run(tmp_path, batch_size)
    per_epoch = -(-14 // batch_size)
    for step in (10, 11, 12, 14, 18):
        epoch, done = divmod(step, 3)
        first = epoch * per_epoch + min(done * 5, 14) // batch_size
        for folder in ("s", "e") if done == 0 else ("s",):
            again, watch = run(tmp_path / "again", batch_size, ckpt=tmp_path / folder / f"step={step}.ckpt")
            assert watch.steps == wanted.steps[first:], (step, folder)
            assert watch.rates == pytest.approx(wanted.rates[first:]), (step, folder)
            assert torch.equal(matrix(again).isnan(), matrix(whole).isnan())


def test_the_same_batch_size_changes_nothing(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "s", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    _, wanted = run(tmp_path, 5, [saver])
    _, watch = run(tmp_path / "again", 5, ckpt=tmp_path / "s" / "step=4.ckpt")
    assert watch.steps == wanted.steps[4:]
    assert watch.rates == wanted.rates[4:]
