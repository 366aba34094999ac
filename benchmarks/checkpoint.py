"""Checkpoints: what saving costs a run, side by side within each fit.

A ResNet-32 on 64 new and 64 rehearsed CIFAR-sized images a step, with a memory of 100 MB, saves every 50 steps as
``ModelCheckpoint(every_n_train_steps=50)`` does: the memory beside the checkpoint, hashed, and all of it on the disk
before training goes on. A pair is the time of 50 steps and the save that follows them, over those steps alone, in the
same fit. The time of a resumed fit to its first batch and the size of what is written stand below the table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import CLASSES, HEADER, SPEC, Filled, quiet_trainer, report, stream
from lightning.pytorch.callbacks import ModelCheckpoint
from rehearsal import full_buffer

from dcl_lightning import NIL
from dcl_lightning.backbones import ResNet
from dcl_lightning.memory.config import RehearsalConfig

NEW, DRAWN, EVERY = 64, 64, 50
ROW_BYTES = 3 * 32 * 32


class Timed(ModelCheckpoint):
    """Notes the seconds between saves and those of each save."""

    def __init__(self, folder: str, every: int) -> None:
        super().__init__(folder, every_n_train_steps=every)
        self.trained: list[float] = []
        self.saved: list[float] = []
        self._mark = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop it, save, and start it again."""
        due = trainer.global_step % self._every_n_train_steps == 0
        before = time.perf_counter()
        super().on_train_batch_end(trainer, *args)
        if due:
            after = time.perf_counter()
            self.trained.append(before - self._mark)
            self.saved.append(after - before)
            self._mark = after


def measure(rounds: int, every: int, megabytes: int) -> tuple[list[float], list[float], int, float]:
    """Return seconds of the steps between saves, of the saves, bytes written, and seconds of taking a memory back."""
    rows = megabytes * 1_000_000 // ROW_BYTES
    samples = (rounds + 1) * every * NEW
    data = stream(samples, 32, NEW)
    filled = Filled(full_buffer(rows, 32, samples))
    config = RehearsalConfig(buffer_size=rows, num_samples=DRAWN, execution="blocking", prefetch="device")
    with tempfile.TemporaryDirectory(dir=".") as folder, contextlib.redirect_stdout(io.StringIO()):

        def fit(last: int, *callbacks: pl.Callback, ckpt: str | None = None) -> None:
            agent = NIL(ResNet(32), CLASSES, config, input_spec=SPEC)
            trainer = quiet_trainer(folder, *callbacks, max_steps=last, enable_checkpointing=True)
            trainer.fit(agent, datamodule=data, ckpt_path=ckpt)

        timed = Timed(f"{folder}/c", every)
        # The first part warms up.
        fit((rounds + 1) * every, filled, timed)
        written = sum(file.stat().st_size for file in Path(timed.best_model_path + ".memory").rglob("rank_*"))
        written += Path(timed.best_model_path).stat().st_size
        started = time.perf_counter()
        fit((rounds + 1) * every, ckpt=timed.best_model_path)
        resumed = time.perf_counter() - started
    return timed.trained[1:], timed.saved[1:], written, resumed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, a small memory: whether it runs")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--every", type=int, default=EVERY, help="steps between saves")
    parser.add_argument("--megabytes", type=int, default=100)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rounds, every, size = (2, 2, 2) if options.quick else (options.rounds, options.every, options.megabytes)
    trained, saved, written, resumed = measure(rounds, every, size)
    print(HEADER)
    both = [a + b for a, b in zip(trained, saved, strict=True)]
    report(f"{every} steps of ResNet-32 and a save with {size} MB stored", "s", both, trained, "<= 1.05")
    print(f"\na save: {statistics.median(saved):.3f} s for {written / 1e6:.1f} MB; a fit that had nothing left to do, "
          f"from its checkpoint: {resumed:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
