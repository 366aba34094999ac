"""Seconds of training until the stream so far is learnt, after each task: rehearsal beside training from scratch.

The reference protocol on digits (``protocol.py``): MLP 64-100-100, batch 16, ten epochs a task, SGD with lr 0.05. When
a task has come, rehearsal (``nil`` and ``er``, 200 stored in all, 16 rehearsed beside each batch) trains on its samples
alone; ``scratch`` begins anew, from the initial weights, on those of all tasks so far (``data.concatenate_tasksets``
with ``model.reset_state_dict``, the original program's way), and ``cumulative`` trains the weights that it has on them.
So with equal tasks the first two need time in proportion to their number, the others in proportion to its square.

Each fit is Lightning's own with the real data module, agent and callbacks. Seconds are those of training, added up over
the tasks; evaluation, reading of data and set-up are left out, and on no side does anything stop early. Accuracies are
over the test images of all classes so far, in %. A round is a seed; the sides of a round follow each other in an order
that rotates; a row is the median over the rounds of the ratio to scratch within a round, with the 95 % interval of that
median from a bootstrap. One thread.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from common import HEADER, QUIET, report
from protocol import CASES, Case
from reproduce import training_seconds

from dcl_lightning import ContinualDataModule
from dcl_lightning.callbacks import TaskReport

SIDES = {"nil": "nil, 200 stored", "er": "er, 200 stored", "scratch": "scratch", "cumulative": "cumulative"}
BASELINE = "scratch"


class TaskEnd(NamedTuple):
    """What a task's end found.

    Args:
        seconds: of training since the start of the stream.
        accuracy: in %, over the test images of all classes so far.
    """

    seconds: float
    accuracy: float


class Watch(pl.Callback):
    """Notes the seconds of training after each task, before anything is evaluated."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_task_end(self, trainer: pl.Trainer, agent: Any, task: Any) -> None:
        """Read the clock, which has stopped."""
        self.seconds.append(training_seconds(agent.clock.wall_time))


def learn(case: Case, seed: int, increment: int, epochs: int | None) -> list[TaskEnd]:
    """Return what each task's end found.

    Args:
        case: of the protocol.
        seed: of weights, order and draws.
        increment: classes of a task.
        epochs: of each task; the protocol's if None.
    """
    pl.seed_everything(seed, verbose=False)
    data = ContinualDataModule(
        "digits", increment=increment, batch_size=16, seed=seed, concatenate_tasksets=case.concatenate
    )
    agent, watch = case.build(data), Watch()
    agent.clock.epochs_per_task = epochs or agent.clock.epochs_per_task
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        callbacks = [watch, TaskReport(show_table=False, pictures=False)]
        pl.Trainer(callbacks=callbacks, default_root_dir=folder, **QUIET).fit(agent, datamodule=data)
    accuracies = agent.clock.matrix.pooled.tolist()
    return [TaskEnd(s, 100 * a) for s, a in zip(watch.seconds, accuracies, strict=True)]


def learnt(rounds: int, increment: int, epochs: int | None) -> dict[str, list[list[TaskEnd]]]:
    """Return for each side, for each round, what the tasks' ends found."""
    names: list[str] = list(SIDES)
    found: dict[str, list[list[TaskEnd]]] = {name: [] for name in names}
    learn(CASES[SIDES[BASELINE]], 0, increment, 1)  # warms up
    for seed in range(rounds):
        shift = seed % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(learn(CASES[SIDES[name]], seed, increment, epochs))
    return found


def rows_of(found: dict[str, list[list[TaskEnd]]]) -> list[dict[str, Any]]:
    """Print and return the rows of every side over the baseline: seconds after each task, accuracy at the end."""
    tasks, rows = range(len(found[BASELINE][0])), []
    for name in found:
        if name == BASELINE:
            continue
        for task in tasks:
            ours, theirs = ([ends[task].seconds for ends in found[side]] for side in (name, BASELINE))
            rows.append(report(f"{name}, training up to task {task + 1}", "s", ours, theirs, "reported"))
        ours, theirs = ([ends[-1].accuracy for ends in found[side]] for side in (name, BASELINE))
        rows.append(report(f"{name}, accuracy after the last task", "%", ours, theirs, "reported"))
    return rows


def table(found: dict[str, list[list[TaskEnd]]]) -> str:
    """Return the table of tasks: median seconds of training and mean accuracy of each side."""
    lines = ["| task | " + " | ".join(f"{name}, s | {name}, %" for name in found) + " |"]
    lines.append("|---" * (1 + 2 * len(found)) + "|")
    for task in range(len(found[BASELINE][0])):
        cells = []
        for rounds in found.values():
            cells.append(f"{statistics.median(ends[task].seconds for ends in rounds):.2f}")
            cells.append(f"{statistics.mean(ends[task].accuracy for ends in rounds):.1f}")
        lines.append(f"| {task + 1} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables; with --json also write the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch a task: whether it runs, no figures")
    parser.add_argument("--rounds", type=int, default=5, help="seeds, from 0 on")
    parser.add_argument("--increment", type=int, default=2, help="classes of a task")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = learnt(1, options.increment, 1) if options.quick else learnt(options.rounds, options.increment, None)
    print(HEADER)
    rows = rows_of(found)
    print(f"\nAdded up over the tasks:\n\n{table(found)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
