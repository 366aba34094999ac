"""The reference protocol on digits: final accuracy over all test images, mean of seeds.

Five tasks of two classes, MLP 64-100-100, batch 16, ten epochs a task, SGD with lr 0.05 without momentum unless said.
On two workers each has half the batch, half the rehearsed samples and half the memory. What is set beside another case
is compared seed by seed: the mean of the differences and its 90 % interval.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from common import quiet_trainer
from lightning.pytorch.utilities import rank_zero_only
from scipy.stats import t as student

from dcl_lightning import NIL, ContinualAgent, ContinualDataModule, FineTuning, ICaRL
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.memory.config import MemorySize, RehearsalConfig


class Case(NamedTuple):
    """One row of the table.

    Args:
        build: makes the agent for a data module.
        concatenate: each task has the samples of all tasks so far.
        workers: of the job; more than one under Horovod.
        beside: name of the case that it is compared with.
        scenario: of the stream; ``none`` for all data at once.
    """

    build: Callable[[ContinualDataModule], ContinualAgent]
    concatenate: bool = False
    workers: int = 1
    beside: str = ""
    scenario: str = "class"


def icarl(size: int, workers: int = 1, beside: str = "", **options: Any) -> Case:
    """Return iCaRL with so many exemplars in all; options are the agent's."""
    return Case(
        lambda data: ICaRL(
            MLP(),
            data.num_classes,
            rehearsal=MemorySize(buffer_size=size),
            bce_reduction="sum",
            train_classes="seen",
            **{"momentum": 0.9} | options,
            epochs_per_task=10,
            input_spec=data.input_spec,
        ),
        workers=workers,
        beside=beside,
    )


def nil(size: int, workers: int = 1, beside: str = "", lr: float = 0.05, momentum: float = 0.0, **options: Any) -> Case:
    """Return NIL with so many stored samples in all, fixed quota, c = r = 16 unless said, a worker's part of each."""
    moved = {key: options.pop(key, 16) // workers for key in ("num_candidates", "num_samples")}
    return Case(
        lambda data: NIL(
            MLP(),
            data.num_classes,
            rehearsal=RehearsalConfig(buffer_size=size, **moved, **options),
            epochs_per_task=10,
            lr=lr,
            momentum=momentum,
            input_spec=data.input_spec,
        ),
        workers=workers,
        beside=beside,
    )


def agent(
    name: str,
    size: int | None = None,
    memory: dict[str, Any] | None = None,
    workers: int = 1,
    beside: str = "",
    **options: Any,
) -> Case:
    """Return the agent of a short name, with so many stored samples in all and 16 rehearsed beside each batch."""
    drawn = {"buffer_size": size, "num_samples": 16 // workers}
    stored = {} if size is None else {"rehearsal": drawn | (memory or {})}
    return Case(
        lambda data: getattr(short_names, name)(
            MLP(), data.num_classes, epochs_per_task=10, input_spec=data.input_spec, **stored, **options
        ),
        concatenate=name == "cumulative",
        workers=workers,
        beside=beside,
        scenario="none" if name == "joint" else "class",
    )


def finetuning(reset: bool = False, concatenate: bool = False) -> Case:
    """Return fine-tuning."""
    return Case(
        lambda data: FineTuning(
            MLP(), data.num_classes, reset_state_dict=reset, epochs_per_task=10, input_spec=data.input_spec
        ),
        concatenate,
    )


AT_TASK_ENDS = {"policy": "class_balanced", "quota": "adaptive", "update": "task_end", "draw_from": "past"}
# Chosen on digits_dev among learning rates with and without momentum.
TUNED = {"lr": 0.02, "momentum": 0.9}
CASES: dict[str, Case] = {
    "naive": finetuning(),
    "transfer": finetuning(concatenate=True),
    "scratch": finetuning(reset=True, concatenate=True),
    "icarl, 50 exemplars": icarl(50),
    "icarl, 200 exemplars": icarl(200),
    # As many exemplars a step as the protocol's other agents rehearse, in place of each once an epoch.
    "icarl, 16 a step, 50 exemplars": icarl(50, exemplars="per_step", num_samples=16),
    "icarl, 16 a step, 200 exemplars": icarl(200, exemplars="per_step", num_samples=16),
}
# On images of 28x28 iCaRL with its summed loss ends near chance at the protocol's rate, and DER++ may be lost.
SLOWER = {"lr": 0.01, "momentum": 0.9}
for stored in (50, 200):
    by_union = f"icarl, {stored} exemplars"
    CASES[f"icarl, lr 0.01, {stored} exemplars"] = icarl(stored, beside=by_union, **SLOWER)
    one = f"nil, {stored} stored"
    at_ends, summed = f"er of the tasks' ends, {stored} stored", f"er of the tasks' ends, sum, {stored} stored"
    derpp, derpp_ends = f"derpp, {stored} stored", f"derpp_task_end, {stored} stored"
    few = f"icarl, 16 a step, {stored} exemplars"
    two: dict[str, Any] = {"workers": 2}
    CASES |= {
        one: nil(stored),
        f"{one}, weighting none": nil(stored, weighting="none"),
        f"{one}, tuned": nil(stored, **TUNED, beside=one),
        f"nil_global, {stored} stored, two workers": nil(stored, workers=2, beside=one, scope="global"),
        f"er, {stored} stored": agent("er", stored),
        at_ends: agent("er", stored, AT_TASK_ENDS),
        summed: agent("er", stored, AT_TASK_ENDS | {"loss": "sum"}),
        f"er of the tasks' ends, sum, tuned, {stored} stored": agent(
            "er", stored, AT_TASK_ENDS | {"loss": "sum"}, **TUNED
        ),
        f"er_ace, {stored} stored": agent("er_ace", stored),
        # Factors chosen on digits_dev among 0.5 and 1.
        f"der, {stored} stored": agent("der", stored, alpha=1.0),
        derpp: agent("derpp", stored, alpha=1.0, beta=1.0),
        derpp_ends: agent("derpp_task_end", stored, alpha=1.0, beta=1.0),
        f"derpp_task_end, lr 0.01, {stored} stored": agent(
            "derpp_task_end", stored, beside=derpp_ends, alpha=1.0, beta=1.0, lr=0.01
        ),
        f"derpp_task_end, tuned, {stored} stored": agent("derpp_task_end", stored, alpha=1.0, beta=1.0, **TUNED),
        f"agem, {stored} stored": agent("agem", stored),
        f"gem, {stored} stored": agent("gem", stored),
        f"gdumb, {stored} stored": agent("gdumb", stored),
        f"bic, {stored} stored": agent("bic", stored, held_out=0.2),
        f"{at_ends}, two workers": agent("er", stored, AT_TASK_ENDS, **two, beside=at_ends),
        f"{summed}, two workers": agent("er", stored, AT_TASK_ENDS | {"loss": "sum"}, **two, beside=summed),
        f"{derpp}, two workers": agent("derpp", stored, alpha=1.0, beta=1.0, **two, beside=derpp),
        f"{derpp_ends}, two workers": agent("derpp_task_end", stored, alpha=1.0, beta=1.0, **two, beside=derpp_ends),
        f"{few}, two workers": icarl(stored, **two, beside=few, exemplars="per_step", num_samples=8),
    }
CASES |= {name: agent(name) for name in ("lwf", "ewc", "si", "joint", "cumulative")}
# The bound of what has another optimizer.
CASES["joint, momentum 0.9"] = agent("joint", momentum=0.9)
CASES["joint, lr 0.02, momentum 0.9"] = agent("joint", **TUNED)
CASES["joint, lr 0.01"] = agent("joint", lr=0.01)
CASES["joint, lr 0.01, momentum 0.9"] = agent("joint", **SLOWER)


def final_accuracy(case: Case, seed: int, folder: str, dataset: str = "digits") -> float:
    """Return the accuracy in % over all test images after the last task."""
    pl.seed_everything(seed, verbose=False)
    batch = 16 // case.workers
    data = ContinualDataModule(
        dataset, scenario=case.scenario, increment=2, batch_size=batch, seed=seed, concatenate_tasksets=case.concatenate
    )
    learner = case.build(data)
    several = {"strategy": "horovod", "devices": case.workers} if case.workers > 1 else {}
    with contextlib.redirect_stdout(io.StringIO()):
        quiet_trainer(folder, **several).fit(learner, datamodule=data)
    return 100 * float(learner.clock.matrix.pooled[-1])


def of_seeds(name: str, seeds: int, dataset: str) -> list[float]:
    """Return the accuracy of each seed; a case of several workers has a process of its own, which starts the others."""
    if CASES[name].workers > 1:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "accuracies.json")
            command = [sys.executable, __file__, "--worker", name, "--seeds", str(seeds), "--dataset", dataset]
            subprocess.run([*command, "--json", str(file)], stdout=subprocess.DEVNULL, check=True)
            return json.loads(file.read_text())
    folder = tempfile.mkdtemp()
    return [final_accuracy(CASES[name], seed, folder, dataset) for seed in range(seeds)]


def compared(values: list[float], others: list[float]) -> str:
    """Return the mean of the differences and its 90 % interval."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean, count = statistics.mean(differences), len(differences)
    half = (
        float(student.ppf(0.95, count - 1)) * statistics.stdev(differences) / count**0.5 if count > 1 else float("nan")
    )
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", default="", help="cases whose name starts so")
    parser.add_argument("--dataset", default="digits", help="digits, or digits_dev for choices")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a network this small only loses by more
    if options.worker:
        folder = tempfile.mkdtemp()
        values = [final_accuracy(CASES[options.worker], seed, folder, options.dataset) for seed in range(options.seeds)]
        rank_zero_only(options.json.write_text)(json.dumps(values))
        return
    found: dict[str, list[float]] = {}
    print("| case | mean | deviation | seeds | beside |\n|---|---|---|---|---|")
    rows = []
    for name in (name for name in CASES if name.startswith(options.only)):
        values = found[name] = of_seeds(name, options.seeds, options.dataset)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        other = found.get(CASES[name].beside)
        beside = "" if other is None else f"{compared(values, other)} of {CASES[name].beside}"
        mean = statistics.mean(values)
        print(f"| {name} | {mean:.1f} | {spread:.1f} | {len(values)} | {beside} |", flush=True)
        baseline = None if other is None else statistics.mean(other)
        ratio = None if baseline is None else mean / baseline
        rows.append({"name": name, "value": mean, "unit": "%", "baseline": baseline, "ratio": ratio})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
