"""One run of a configuration of configs/reproduce by Avalanche; ``reproduce.py --peer avalanche`` calls it.

As in ours are the images, the hold-outs, the order of the classes, the network with its initialisation and its order in
memory, the optimizer, the sizes of batches and memory, the normalisation, and what is evaluated: after each task the
tasks so far. The loader, the transforms image by image, the memory and the loss are Avalanche's own, used as in the
programs of ContinualAI/continual-learning-baselines: for ER ``Naive`` with ``ReplayPlugin`` over a stream in which each
batch is an experience (experiments/split_cifar10/online_replay.py), for ER-ACE ``ER_ACE`` over the tasks
(experiments/split_cifar10/er_ace.py). ``configs/reproduce/peers.txt`` has the differences from each protocol. Loggers
and training metrics are left out.

A run saves its state at the end of each task and goes on from there. Its report has the form of ours. Needs the extra
``peers``.
"""

from __future__ import annotations

import argparse
import logging
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from plain import Samples
from reproduce import write
from torch import nn
from torchvision.transforms import v2

from dcl_lightning import ContinualDataModule, FineTuning
from dcl_lightning.backbones import ResNet
from dcl_lightning.metrics import AccuracyMatrix
from dcl_lightning.report.content import stream_metrics

STATE = "task_end.pt"
# Makes a strategy from what all take and the ``rehearsal`` of a configuration.
Build = Callable[[dict[str, Any], dict[str, Any]], Any]


def _replay(common: dict[str, Any], memory: dict[str, Any]) -> Any:
    from avalanche.training.plugins import ReplayPlugin
    from avalanche.training.storage_policy import ClassBalancedBuffer, ReservoirSamplingBuffer
    from avalanche.training.supervised import Naive

    policies = {"class_reservoir": ClassBalancedBuffer, "reservoir": ReservoirSamplingBuffer}
    size, policy = memory["buffer_size"], policies[memory["policy"]]
    plugin = ReplayPlugin(size, batch_size_mem=memory["num_samples"], storage_policy=policy(size))
    return Naive(**common, plugins=[plugin])


def _er_ace(common: dict[str, Any], memory: dict[str, Any]) -> Any:
    from avalanche.training.supervised import ER_ACE

    return ER_ACE(**common, mem_size=memory["buffer_size"], batch_size_mem=memory["num_samples"])


# By our agents: what makes the strategy, and whether each batch is an experience, or else each task.
STRATEGIES: dict[str, tuple[Build, bool]] = {"er": (_replay, True), "er_ace": (_er_ace, False)}


def stream_of(data: ContinualDataModule) -> Any:
    """Return Avalanche's stream with the tasks of ours: the samples that are trained on and those evaluated on."""
    from avalanche.benchmarks import nc_benchmark

    assert data.normalisation is not None, "a data set of a name"
    floats = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*data.normalisation)]
    crops = [v2.RandomCrop(data.input_spec.height, padding=4), v2.RandomHorizontalFlip()] if data.augment else []
    tasks, tests = range(data.num_tasks), data.evaluate_on == "test"
    trained = torch.cat([data.train_indices(task) for task in tasks])
    tested = torch.cat([data.stream.tested_indices(task) for task in tasks])
    inputs, targets = (data.test_inputs, data.test_targets) if tests else (data.train_inputs, data.train_targets)
    return nc_benchmark(
        Samples(data.train_inputs[trained], data.train_targets[trained], None),
        Samples(inputs[tested], targets[tested], None),
        n_experiences=data.num_tasks,
        task_labels=False,
        fixed_class_order=list(range(data.num_classes)),
        train_transform=v2.Compose([*crops, *floats]),
        eval_transform=v2.Compose(floats),
    )


def strategy_of(model: dict[str, Any], data: ContinualDataModule) -> Any:
    """Return Avalanche's strategy for the agent of a configuration.

    Args:
        model: ``class_path`` and ``init_args`` of the agent.
        data: of the configuration.
    """
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    options = model["init_args"]
    network = ResNet(**options["backbone"]["init_args"])
    kept = {key: options[key] for key in ("head", "head_scale", "memory_format") if key in options}
    agent = FineTuning(network, data.num_classes, data.input_spec, **kept)
    layers = nn.Sequential(agent.backbone, agent.head)
    rates = {key: options[key] for key in ("lr", "momentum", "weight_decay")}
    common: dict[str, Any] = {
        "model": layers,
        "optimizer": torch.optim.SGD(layers.parameters(), **rates),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": data.batch_size,
        "train_epochs": options["epochs_per_task"],
        "eval_mb_size": data.eval_batch_size,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "evaluator": EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
    }
    return STRATEGIES[model["class_path"]][0](common, options["rehearsal"])


def experiences_of(task: Any, batch: int, online: bool) -> Iterable[Any]:
    """Return the experiences of a task: itself, or its batches in a random order if ``online``."""
    if not online:
        return [task]
    from avalanche.benchmarks.scenarios import split_online_stream

    return split_online_stream([task], experience_size=batch, access_task_boundaries=False)


def learn(strategy: Any, stream: Any, experiences: Callable[[Any], Iterable[Any]], folder: Path) -> dict[str, Any]:
    """Train on all tasks, each followed by an evaluation of those so far, or go on behind the last one that was saved.

    Args:
        strategy: of Avalanche, untrained.
        stream: with ``train_stream`` and ``test_stream``, one experience for each task.
        experiences: returns those of a task.
        folder: of the saved state.

    Returns:
        Matrix, metrics and seconds, as in our reports.
    """
    file = folder / STATE
    matrix = AccuracyMatrix(len(stream.train_stream))
    wall_time, first = {"train": 0.0, "evaluate": 0.0}, 0
    if file.exists():
        saved = torch.load(file, weights_only=False)
        strategy, matrix, wall_time, first = saved["strategy"], saved["matrix"], saved["wall_time"], saved["tasks"]
        _set_generators(saved["generators"])
    for task in range(first, matrix.num_tasks):
        started = time.perf_counter()
        for experience in experiences(stream.train_stream[task]):
            strategy.train(experience, num_workers=0, drop_last=True)
        trained = time.perf_counter()
        told = strategy.eval(stream.test_stream[: task + 1])
        wall_time["train"] += trained - started
        wall_time["evaluate"] += time.perf_counter() - trained
        for column in range(task + 1):
            total = len(stream.test_stream[column].dataset)
            share = told[f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{column:03d}"]
            matrix.add_counts(round(share * total), total, task, column)
        state = {"strategy": strategy, "matrix": matrix, "wall_time": wall_time, "tasks": task + 1}
        draft = file.with_suffix(".tmp")
        torch.save(state | {"generators": _generators()}, draft)
        draft.replace(file)
    return {**stream_metrics(matrix), "wall_time_s": wall_time}


def _generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_generators(states: tuple[Any, ...]) -> None:
    for restore, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), states, strict=True):
        restore(state)


def main() -> None:
    """Run one configuration and seed, or go on with it, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the run, for its state and its report")
    parser.add_argument("--root", help="folder of the data sets (default: that of the configuration)")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.showwarning = lambda *_, **__: None  # Avalanche switches its own on at every step
    pl.seed_everything(options.seed, verbose=False)
    config = yaml.safe_load(options.config.read_text())
    data_options = config["data"]["init_args"] | ({} if options.root is None else {"root": options.root})
    data = ContinualDataModule(**data_options)
    data.setup()
    online = STRATEGIES[config["model"]["class_path"]][1]
    found = learn(
        strategy_of(config["model"], data),
        stream_of(data),
        lambda task: experiences_of(task, data.batch_size, online),
        options.folder,
    )
    found["peak_device_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    names = {"torch": "torch", "avalanche": "avalanche-lib"}
    found["versions"] = {name: version(package) for name, package in names.items()}
    found["versions"]["python"] = platform.python_version()
    write(options.folder / "version_0" / "report" / "accuracy_matrix.json", found)
    (options.folder / STATE).unlink()


if __name__ == "__main__":
    main()
