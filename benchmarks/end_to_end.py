"""Whole fits and single steps beside plain Lightning, a loop written by hand and, where it is installed, Avalanche.

Fits (samples per second; MLP 100-100; 5 tasks of one epoch; batches of 64 new and, with a memory, 64 rehearsed images):

- ours: ``Trainer.fit`` with ``ContinualDataModule`` and the agent ``base`` or ``nil`` (inline) as a user gets it;
- plain Lightning: a small module, ``DataLoader``s over the same tensors, torchvision's transforms image by image;
- a loop by hand over the same ``DataLoader``s, with no Lightning;
- Avalanche's Naive and Replay over the same tensors and transforms: ``pip install 'dcl-lightning[peers]'``.

Data are uint8 images in memory, read before the clock starts: 1x28x28 as they are, 3x32x32 cropped, mirrored and
normalised. Images are counted where they go through the network, new and rehearsed. For ``nil`` the plain sides have a
class-balanced memory written by hand, with the same weights, whose images are stored as the loader gave them and not
augmented again, which is less work than ours; Avalanche's Replay rehearses from the second task on. Left out on all
sides: evaluation (what ours spends on it is taken off), loggers, checkpoints, progress bars, pictures.

Steps (milliseconds; one task, the memory full from the start): ours within ``Trainer.fit`` over plain Lightning and a
loop by hand that take the very same batches, made beforehand, and do the same work on them: the same crops of the
whole batch, the weighted loss, the SGD step, for ``nil`` the memory by hand. A warm-up and the last step are left out.
One row has Lightning's bar on on both sides, written to a file, and plain Lightning's loss logged for it at each step:
there ours shows no bar, and computes and logs loss and accuracy at the steps that a logger would write.

One thread; the sides of a round follow each other in an order that rotates; a row is the median over the rounds of the
ratio within a round, with the 95 % interval of that median from a bootstrap.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from common import CLASSES, HEADER, QUIET, WARM_UP, Filled, Size, StepTimer, report, rounds_of, step_ms
from plain import CANDIDATES, DRAWN, LR, NEW, Made, Memory, Plain, Samples, by_hand, plain_network
from rehearsal import full_buffer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from dcl_lightning import NIL, ContinualAgent, ContinualDataModule, FineTuning
from dcl_lightning.backbones import MLP, Backbone, ResNet
from dcl_lightning.callbacks import TaskReport
from dcl_lightning.data.transforms import augment, normalise
from dcl_lightning.memory.config import RehearsalConfig

TASKS, STORED = 5, 2000
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # of the data set ``synthetic``
Fit = Callable[[], tuple[int, float]]  # trains, and returns images and seconds


class Work(NamedTuple):
    """Images of one kind.

    Args:
        name: in the table.
        classes: of the whole stream, a multiple of the number of tasks.
        stored: rows of the memory.
        transform: of one image, as a user writes it.
        target: of ours over Avalanche.
    """

    name: str
    classes: int
    stored: int
    transform: Callable[[Tensor], Tensor]
    target: str


TO_FLOAT = v2.ToDtype(torch.float32, scale=True)
CROP = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), TO_FLOAT, v2.Normalize(MEAN, STD)])
MNIST_SIZED = Work("1x28x28", 10, 500, TO_FLOAT, ">= 1.5")
CIFAR_SIZED = Work("3x32x32 augmented", CLASSES, STORED, CROP, ">= 3")


def agent_of(backbone: Backbone, data: ContinualDataModule, stored: int) -> ContinualAgent:
    """Return ours, with a memory if anything is stored."""
    common: dict[str, Any] = {"input_spec": data.input_spec, "lr": LR}
    if not stored:
        return FineTuning(backbone, data.num_classes, **common)
    config = RehearsalConfig(buffer_size=stored, num_candidates=CANDIDATES, num_samples=DRAWN)
    return NIL(backbone, data.num_classes, config, **common)


# -- whole fits ------------------------------------------------------------------------------------


class Counted:
    """How many images go through a module in training.

    Args:
        module: whose first argument is a batch.
    """

    def __init__(self, module: nn.Module) -> None:
        self.images = 0
        module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        self.images += len(inputs[0]) if module.training else 0


def stream_of(work: Work, images: int) -> ContinualDataModule:
    """Return so many training images, read, as a stream of tasks."""
    per_class, increment = images // work.classes, work.classes // TASKS
    if work.transform is CROP:
        options = {"num_classes": work.classes, "size": 32, "per_class": per_class}
        data = ContinualDataModule("synthetic", increment=increment, batch_size=NEW, source_options=options)
    else:
        labels = np.repeat(np.arange(work.classes), per_class)
        inputs = np.random.default_rng(0).integers(256, size=(len(labels), 1, 28, 28), dtype=np.uint8)
        tested = inputs[::per_class], labels[::per_class]
        data = ContinualDataModule((inputs, labels, *tested), increment=increment, batch_size=NEW)
    data.setup()
    return data


def our_fit(data: ContinualDataModule, stored: int) -> tuple[int, float]:
    """Train ours; return images and seconds."""
    agent = agent_of(MLP(), data, stored)
    counted = Counted(agent.backbone)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = pl.Trainer(callbacks=[TaskReport(pictures=False)], default_root_dir=folder, **QUIET)
        started = time.perf_counter()
        trainer.fit(agent, datamodule=data)
        return counted.images, time.perf_counter() - started - agent.clock.wall_time["evaluate"]


def plain_fit(data: ContinualDataModule, work: Work, stored: int, lightning: bool) -> tuple[int, float]:
    """Train with plain Lightning or in a loop by hand; return images and seconds."""
    network = plain_network(MLP(), data)
    tasks = [data.train_indices(task) for task in range(TASKS)]
    parts = [Samples(data.train_inputs[ids], data.train_targets[ids], work.transform) for ids in tasks]
    loaders = [DataLoader(part, NEW, shuffle=True) for part in parts]
    memory = Memory(parts[0][0][0][None], stored, work.classes) if stored else None
    counted = Counted(network[0])
    with tempfile.TemporaryDirectory() as folder:
        each_epoch = {"max_epochs": TASKS, "reload_dataloaders_every_n_epochs": 1, "default_root_dir": folder}
        trainer, module = pl.Trainer(**each_epoch, **QUIET), Plain(network, _as_it_is, loaders, memory)
        started = time.perf_counter()
        if lightning:
            trainer.fit(module)
        else:
            by_hand(network, _as_it_is, loaders, memory)
        return counted.images, time.perf_counter() - started


def _as_it_is(inputs: Tensor, ids: Tensor | None) -> Tensor:
    return inputs


def avalanche_fit(data: ContinualDataModule, work: Work, stored: int) -> Fit:
    """Return what trains Avalanche's Replay, or Naive where nothing is stored."""
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training.supervised import Naive, Replay

    splits = ((data.train_inputs, data.train_targets), (data.test_inputs, data.test_targets))
    train, test = (Samples(inputs, targets, None) for inputs, targets in splits)
    cut: dict[str, Any] = {"n_experiences": TASKS, "task_labels": False}
    order = list(range(work.classes))
    stream = nc_benchmark(train, test, **cut, fixed_class_order=order, train_transform=work.transform)

    def run() -> tuple[int, float]:
        network = plain_network(MLP(), data)
        counted = Counted(network[0])
        common: dict[str, Any] = {"criterion": nn.CrossEntropyLoss(), "train_mb_size": NEW, "evaluator": None}
        common |= {"model": network, "optimizer": torch.optim.SGD(network.parameters(), LR)}
        strategy = Replay(mem_size=stored, **common) if stored else Naive(**common)
        with contextlib.redirect_stderr(io.StringIO()):  # it warns of itself
            started = time.perf_counter()
            for experience in stream.train_stream:
                strategy.train(experience)
            return counted.images, time.perf_counter() - started

    return run


def has_avalanche() -> bool:
    """Return whether Avalanche is installed."""
    return importlib.util.find_spec("avalanche") is not None


def fits(data: ContinualDataModule, work: Work, stored: int, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of whole fits of one agent: ``nil`` where rows are stored, else ``base``.

    Raises:
        RuntimeError: without a memory, if a side trained on another number of images than there are.
    """
    sides: dict[str, Fit] = {
        "ours": lambda: our_fit(data, stored),
        "plain Lightning": lambda: plain_fit(data, work, stored, lightning=True),
        "a loop by hand": lambda: plain_fit(data, work, stored, lightning=False),
    }
    if has_avalanche():
        sides["Avalanche"] = avalanche_fit(data, work, stored)

    def rate_of(name: str) -> Callable[[], float]:
        def rate() -> float:
            images, seconds = sides[name]()
            if not stored and images != len(data.train_targets):
                raise RuntimeError(f"{name} trained on {images} images of {len(data.train_targets)}")
            return images / seconds

        return rate

    measured = rounds_of({name: rate_of(name) for name in sides}, rounds)
    what = f"fit, {work.name}, {'nil' if stored else 'base'}, ours over"
    return [
        report(
            f"{what} {peer}", "images/s", measured["ours"], rates, work.target if peer == "Avalanche" else "reported"
        )
        for peer, rates in measured.items()
        if peer != "ours"
    ]


def fits_of(work: Work, rounds: int, images: int) -> list[dict[str, Any]]:
    """Return the rows of whole fits on images of one kind."""
    data = stream_of(work, images)
    return [row for stored in (0, work.stored) for row in fits(data, work, stored, rounds)]


# -- steps -----------------------------------------------------------------------------------------


def cropped(inputs: Tensor, ids: Tensor | None) -> Tensor:
    """Return images cropped, mirrored and normalised, all at once, each by its id."""
    assert ids is not None
    return normalise(augment(inputs, ids, seed=0, epoch=0), MEAN, STD)


def one_task(batches: int) -> ContinualDataModule:
    """Return images for so many batches at least, read, as one task."""
    options = {"num_classes": CLASSES, "size": 32, "per_class": -(-batches * NEW // CLASSES)}
    data = ContinualDataModule("synthetic", scenario="none", batch_size=NEW, seed=0, source_options=options)
    data.setup()
    return data


def made(data: ContinualDataModule) -> Made:
    """Return the batches of a fit's first epoch: inputs, targets, and ids for the crops."""
    return Made([(batch.inputs, batch.targets, batch.draw_ids) for batch in data.train_dataloader()])


def steps(
    name: str, backbone: Callable[[], Backbone], stored: int, size: Size, targets: dict[str, str]
) -> list[dict[str, Any]]:
    """Return the rows of single steps of one network and agent.

    Args:
        name: of the network.
        backbone: makes it.
        stored: rows of the memory, all there from the start; 0 for ``base``.
        size: rounds and steps.
        targets: of ours over each peer.
    """
    data = one_task(WARM_UP + size.steps + 2)
    batches = made(data)
    filled = [Filled(full_buffer(stored, 32, len(data.train_targets)))] if stored else []

    def ours() -> float:
        return step_ms(agent_of(backbone(), data, stored), data, size.steps, *filled)

    def memory() -> Memory | None:
        return Memory(batches.batches[0][0], stored, CLASSES, full=True) if stored else None

    def lightning() -> float:
        return lightning_ms(Plain(plain_network(backbone(), data), cropped, [batches], memory()), size.steps)

    def loop() -> float:
        return by_hand(plain_network(backbone(), data), cropped, [batches], memory(), size.steps)

    measured = rounds_of({"ours": ours, "plain Lightning": lightning, "a loop by hand": loop}, size.rounds)
    what = f"step, {name}, {'nil' if stored else 'base'}, ours over"
    return [report(f"{what} {peer}", "ms", measured["ours"], measured[peer], goal) for peer, goal in targets.items()]


def lightning_ms(module: Plain, steps: int, **options: Any) -> float:
    """Return the mean time of a step of plain Lightning; options are the trainer's."""
    timer = StepTimer(steps)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        pl.Trainer(callbacks=[timer], max_epochs=1, default_root_dir=folder, **(QUIET | options)).fit(module)
    return timer.step_ms


def steps_with_a_bar(size: Size) -> dict[str, Any]:
    """Return the row of single steps of the MLP where a bar is asked for, and its output goes to a file."""
    data, bar = one_task(WARM_UP + size.steps + 2), {"enable_progress_bar": True}
    batches = made(data)
    sides = {
        "ours": lambda: step_ms(agent_of(MLP(), data, 0), data, size.steps, **bar),
        "plain Lightning": lambda: lightning_ms(
            Plain(plain_network(MLP(), data), cropped, [batches], None, logs=True), size.steps, **bar
        ),
    }
    ours, lightning = rounds_of(sides, size.rounds).values()
    name = "step, MLP, base, ours over plain Lightning with a bar and its loss logged for it"
    return report(name, "ms", ours, lightning, "reported")


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds of few steps: whether it runs, no figures")
    parser.add_argument(
        "--only",
        default="",
        help="parts to run: letters of fits on 1x28x28 (m) and 3x32x32 (c), of steps of an MLP (s), of the same where "
        "a bar is asked for (b), of a ResNet (r)",
    )
    parser.add_argument("--rounds", type=int, help="instead of each part's own number")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def size(rounds: int, steps: int) -> Size:
        return Size(2, min(steps, 3)) if options.quick else Size(options.rounds or rounds, steps)

    images = 1_000 if options.quick else 10_000
    small = {"plain Lightning": "<= 1.15", "a loop by hand": "reported"}
    large = {"plain Lightning": "reported", "a loop by hand": "<= 1.10"}
    both = (0, STORED)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "m": lambda: fits_of(MNIST_SIZED, size(9, 0).rounds, images),
        "c": lambda: fits_of(CIFAR_SIZED, size(9, 0).rounds, images),
        "s": lambda: [row for stored in both for row in steps("MLP", MLP, stored, size(15, 100), small)],
        "b": lambda: [steps_with_a_bar(size(15, 100))],
        "r": lambda: [
            row for stored in both for row in steps("ResNet-32", lambda: ResNet(32), stored, size(7, 6), large)
        ],
    }
    print(HEADER)
    rows = [row for key, part in parts.items() if not options.only or key in options.only for row in part()]
    if not has_avalanche():
        print("\nAvalanche is not installed: its rows are left out.")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
