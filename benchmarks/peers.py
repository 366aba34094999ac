"""Avalanche's strategies under the reference protocol: final accuracy over all test images, seed by seed.

The same split, order of classes, network, batch, epochs, optimizer and seeds as the cases of ``protocol.py`` beside
which ``results.py`` puts them; factors that mean the same are those of ours, all else is Avalanche's own. Needs the
extra ``peers``; what was measured is kept in benchmarks/peers.json. The BiC of Avalanche 0.6.0 does not start with
torch 2.14.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import FIRST_SEED, keep
from plain import Samples, plain_network
from torch import nn

from dcl_lightning import ContinualDataModule
from dcl_lightning.backbones import MLP
from dcl_lightning.data.transforms import normalise

FIGURES = Path(__file__).with_name("peers.json")
BATCH, EPOCHS, TASKS = 16, 10, 5
# Makes a strategy from what all take, a network, and the number of stored samples.
Build = Callable[[dict[str, Any], int], Any]


def _supervised(name: str, **options: Any) -> Build:
    """Return what makes a strategy that stores nothing."""

    def build(common: dict[str, Any], size: int) -> Any:
        from avalanche.training import supervised

        return getattr(supervised, name)(**options, **common)

    return build


def _storing(name: str, **options: Any) -> Build:
    """Return what makes a strategy that stores so many samples."""
    return lambda common, size: _supervised(name, mem_size=size, **options)(common, size)


def _per_task(name: str, **options: Any) -> Build:
    """Return what makes a strategy that stores equally many samples of each task."""
    return lambda common, size: _supervised(name, patterns_per_exp=size // TASKS, **options)(common, size)


def _replay(common: dict[str, Any], size: int) -> Any:
    from avalanche.training.plugins import ReplayPlugin
    from avalanche.training.storage_policy import ClassBalancedBuffer
    from avalanche.training.supervised import Naive

    plugin = ReplayPlugin(size, batch_size_mem=BATCH, storage_policy=ClassBalancedBuffer(size))
    return Naive(**common, plugins=[plugin])


def _icarl(common: dict[str, Any], size: int) -> Any:
    from avalanche.training.supervised import ICaRL

    features, classifier = common.pop("model")
    del common["criterion"]  # it has its own
    return ICaRL(features, classifier, **common, memory_size=size, buffer_transform=None, fixed_memory=True)


# By the names of ``protocol.CASES`` without their sizes.
PEERS: dict[str, Build] = {
    "naive": _supervised("Naive"),
    "cumulative": _supervised("Cumulative"),
    "er of the tasks' ends": _replay,
    "derpp_task_end": _storing("DER", batch_size_mem=BATCH, alpha=1.0, beta=1.0),
    "er_ace": _storing("ER_ACE", batch_size_mem=BATCH),
    "icarl": _icarl,
    "agem": _per_task("AGEM", sample_size=BATCH),
    "gem": _per_task("GEM", memory_strength=0.5),
    "gdumb": _storing("GDumb"),
    "lwf": _supervised("LwF", alpha=1.0, temperature=2.0),
    "ewc": _supervised("EWC", ewc_lambda=1.0, mode="online", decay_factor=1.0),
    "si": _supervised("SynapticIntelligence", si_lambda=0.1),
}
WITHOUT_MEMORY = ("naive", "cumulative", "lwf", "ewc", "si")


def cases() -> dict[str, tuple[str, int]]:
    """Return each case's peer and number of stored samples, by the name of the case in ``protocol.CASES``."""
    found = {name: (name, 0) for name in WITHOUT_MEMORY}
    for size in (50, 200):
        for name in PEERS.keys() - set(WITHOUT_MEMORY):
            found[f"{name}, {size} {'exemplars' if name == 'icarl' else 'stored'}"] = name, size
    return dict(sorted(found.items()))


@lru_cache
def stream_of(dataset: str) -> tuple[ContinualDataModule, Any]:
    """Return the data, and the same as Avalanche's stream of five tasks."""
    from avalanche.benchmarks import nc_benchmark

    data = ContinualDataModule(dataset, increment=2, batch_size=BATCH, seed=0)
    data.setup()
    splits = ((data.train_inputs, data.train_targets), (data.test_inputs, data.test_targets))
    assert data.normalisation is not None, "a data set of a name"
    train, test = (Samples(normalise(inputs, *data.normalisation), targets, None) for inputs, targets in splits)
    order = list(range(data.num_classes))
    return data, nc_benchmark(train, test, n_experiences=TASKS, task_labels=False, fixed_class_order=order)


def final_accuracy(name: str, size: int, seed: int, dataset: str) -> float:
    """Return the accuracy in % over all test images after the last task."""
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    data, stream = stream_of(dataset)
    pl.seed_everything(seed, verbose=False)
    network = plain_network(MLP(), data)
    momentum = 0.9 if name == "icarl" else 0.0
    common: dict[str, Any] = {
        "model": network,
        "optimizer": torch.optim.SGD(network.parameters(), 0.05, momentum=momentum),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": BATCH,
        "train_epochs": EPOCHS,
        "eval_mb_size": 256,
        "evaluator": EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
    }
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        strategy = PEERS[name](common, size)
        for experience in stream.train_stream:
            strategy.train(experience)
        told = strategy.eval(stream.test_stream)
    (accuracy,) = (value for key, value in told.items() if key.startswith("Top1_Acc_Stream"))
    return 100 * accuracy


def main() -> None:
    """Measure and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name starts so; the others keep their figures")
    parser.add_argument("--dataset", default="digits", help="digits or mnist5k")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a network this small only loses by more
    for case, (name, size) in cases().items():
        if not case.startswith(options.only):
            continue
        seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
        values = [final_accuracy(name, size, seed, options.dataset) for seed in seeds]
        keep(FIGURES, options.dataset, case, [round(value, 3) for value in values])
        print(f"{case}: {statistics.mean(values):.1f}", flush=True)


if __name__ == "__main__":
    main()
