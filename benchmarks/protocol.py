"""The reference protocol on digits: final accuracy over all test images, mean of seeds.

Five tasks of two classes, MLP 64-100-100, batch 16, ten epochs a task, SGD with lr 0.05.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from dcl_lightning import NIL, ContinualAgent, ContinualDataModule, FineTuning, ICaRL
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import TaskReport
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.memory.size import MemorySize


def icarl(size: int) -> Callable[[ContinualDataModule], ContinualAgent]:
    """Return what builds iCaRL with so many exemplars."""
    return lambda data: ICaRL(
        MLP(),
        data.num_classes,
        rehearsal=MemorySize(buffer_size=size),
        bce_reduction="sum",
        logits="seen",
        momentum=0.9,
        epochs_per_task=10,
        input_spec=data.input_spec,
    )


def nil(size: int, **options: Any) -> Callable[[ContinualDataModule], ContinualAgent]:
    """Return what builds NIL with so many stored samples, c = r = 16, fixed quota."""
    return lambda data: NIL(
        MLP(),
        data.num_classes,
        rehearsal=RehearsalConfig(buffer_size=size, num_candidates=16, num_samples=16, **options),
        epochs_per_task=10,
        input_spec=data.input_spec,
    )


def finetuning(reset: bool = False) -> Callable[[ContinualDataModule], ContinualAgent]:
    """Return what builds fine-tuning."""
    return lambda data: FineTuning(
        MLP(), data.num_classes, reset_state_dict=reset, epochs_per_task=10, input_spec=data.input_spec
    )


CASES: dict[str, tuple[Callable[[ContinualDataModule], ContinualAgent], bool]] = {
    "naive": (finetuning(), False),
    "transfer": (finetuning(), True),
    "scratch": (finetuning(reset=True), True),
    "icarl, 50 exemplars": (icarl(50), False),
    "icarl, 200 exemplars": (icarl(200), False),
    "nil, 50 stored": (nil(50), False),
    "nil, 200 stored": (nil(200), False),
    "nil, 50 stored, weighting none": (nil(50, weighting="none"), False),
    "nil, 200 stored, weighting none": (nil(200, weighting="none"), False),
}


def final_accuracy(case: str, seed: int, folder: str, dataset: str = "digits") -> float:
    """Return the accuracy in % over all test images after the last task."""
    build, concatenate = CASES[case]
    pl.seed_everything(seed, verbose=False)
    data = ContinualDataModule(dataset, increment=2, batch_size=16, seed=seed, concatenate_tasksets=concatenate)
    agent = build(data)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[TaskReport(show_table=False)],
        default_root_dir=folder,
    )
    trainer.fit(agent, datamodule=data)
    return 100 * float(agent.clock.matrix.pooled[-1])


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", help="cases whose name starts so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # a network this small only loses by more
    rows = []
    folder = tempfile.mkdtemp()
    for case in (name for name in CASES if name.startswith(options.only or "")):
        values = [final_accuracy(case, seed, folder) for seed in range(options.seeds)]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| {case} | {statistics.mean(values):.1f} | {spread:.1f} | {len(values)} |", flush=True)
        rows.append({"name": case, "value": statistics.mean(values), "unit": "%", "baseline": None, "ratio": None})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
