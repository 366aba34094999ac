"""Data: images per second, and what a new task costs, side by side in one run.

Throughput is that of loader and transforms alone, batch after batch, on one thread beside the processes, if any: our
loader and what the data module does to a batch on the device, here the CPU, against PyTorch's ``DataLoader`` over
continuum's own taskset of the same images with the same transforms, crop, mirror and normalise; its processes are
started before the clock is. Both give shuffled batches of 64 float images of 32 pixels.

The first batch of a task is timed from the moment at which Lightning asks for the task's loader; an ordinary one is the
mean of the others of that task, taken as fast as they come. Image files are JPEGs of 500 x 375 pixels, read by two
processes to 224 pixels; the files are in the system's cache on both sides.

The sides of a round follow each other, in an order that rotates; a row is the median over the rounds of the ratio
within a round, with the 95 % interval of that median from a bootstrap.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLASSES, HEADER, report, rounds_of, stream
from torch.utils.data import DataLoader

from dcl_lightning import ContinualDataModule

BATCH, PROCESSES = 64, 2
FILES_BATCH = 56


def _rate(batches: Callable[[], Iterable[Any]], images: int) -> float:
    started = time.perf_counter()
    for _ in batches():
        pass
    return images / (time.perf_counter() - started)


def _ours(data: ContinualDataModule) -> Iterable[torch.Tensor]:
    for batch in data.train_dataloader():
        yield data.prepare_batch(batch, train=True, epoch=0).inputs


def _taskset(data: ContinualDataModule, images: int) -> Any:
    from continuum import ClassIncremental
    from continuum.datasets import InMemoryDataset
    from torchvision import transforms

    x = data.train_inputs[:images].permute(0, 2, 3, 1).contiguous().numpy()
    chain = [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.5,) * 3, (0.25,) * 3),
    ]
    dataset = InMemoryDataset(x, np.arange(images) % CLASSES)
    return ClassIncremental(dataset, increment=CLASSES, transformations=chain)[0]


def throughput(rounds: int, images: int) -> list[dict[str, Any]]:
    """Return the rows of the batched path against a ``DataLoader`` over continuum's taskset."""
    ours = stream(images * 4, 32, BATCH)
    ours.setup()
    taskset = _taskset(ours, images)
    alone = DataLoader(taskset, BATCH, shuffle=True)
    helped = DataLoader(taskset, BATCH, shuffle=True, num_workers=PROCESSES, persistent_workers=True)
    for batches in (_ours(ours), alone, helped):
        next(iter(batches))
    measured = rounds_of(
        {
            "ours": lambda: _rate(lambda: _ours(ours), images * 4),
            "alone": lambda: _rate(lambda: alone, images),
            "helped": lambda: _rate(lambda: helped, images),
        },
        rounds,
    )
    return [
        report(
            "batched path over a DataLoader without workers", "images/s", measured["ours"], measured["alone"], ">= 8"
        ),
        report(f"over one with {PROCESSES}", "images/s", measured["ours"], measured["helped"], ">= 5"),
    ]


def _first_and_ordinary(data: ContinualDataModule) -> tuple[float, float]:
    """Return the milliseconds of a task's first batch and of its others, medians over the tasks."""
    firsts, others = [], []
    for task in range(1, data.num_tasks):
        data.task_id = task
        times = [time.perf_counter()]
        for _ in _ours(data):
            times.append(time.perf_counter())
        taken = np.diff(times) * 1e3
        firsts.append(float(taken[0]))
        others.append(float(taken[1:].mean()))
    return statistics.median(firsts), statistics.median(others)


def first_batch(name: str, data: ContinualDataModule, rounds: int) -> dict[str, Any]:
    """Return the row of the first batch of a task against the others."""
    data.setup()
    _first_and_ordinary(data)
    pairs = [_first_and_ordinary(data) for _ in range(rounds)]
    data.teardown("fit")
    return report(f"first batch of a task over the others, {name}", "ms", *map(list, zip(*pairs, strict=True)), "<= 2")


def _arrays(images: int) -> ContinualDataModule:
    labels = np.arange(images) % CLASSES
    x = np.random.default_rng(0).integers(256, size=(images, 3, 32, 32), dtype=np.uint8)
    return ContinualDataModule((x, labels, x[:CLASSES], labels[:CLASSES]), increment=20, batch_size=BATCH, augment=True)


def _files(folder: Path, per_class: int) -> ContinualDataModule:
    from PIL import Image

    generator, contents = np.random.default_rng(0), []
    for _ in range(16):
        small = Image.fromarray(generator.integers(256, size=(24, 32, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
        contents.append(file.getvalue())
    for i, content in enumerate(contents):
        (folder / f"{i}.jpg").write_bytes(content)
    for split, count in (("train", per_class), ("val", 1)):
        for name in range(10):
            (folder / split / f"{name}").mkdir(parents=True)
            for i in range(count):
                (folder / split / f"{name}" / f"{i}.jpg").hardlink_to(folder / f"{i % 16}.jpg")
    return ContinualDataModule(
        "folder", root=str(folder), increment=2, batch_size=FILES_BATCH, num_workers=PROCESSES
    )  # fmt: skip


def first_batch_of_files(rounds: int, per_class: int) -> dict[str, Any]:
    """Return the row of the first batch of image files."""
    folder = Path(tempfile.mkdtemp())
    try:
        return first_batch("image files", _files(folder, per_class), rounds)
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds of few images: whether it runs, no figures")
    parser.add_argument("--only", default="", help="parts to run: letters of throughput (t), arrays (a), files (f)")
    parser.add_argument("--rounds", type=int, help="instead of each part's own number")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def rounds(number: int) -> int:
        return 2 if options.quick else options.rounds or number

    few = options.quick
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "t": lambda: throughput(rounds(15), 256 if few else 5_000),
        "a": lambda: [first_batch("arrays", _arrays(2_000 if few else 50_000), rounds(15))],
        "f": lambda: [first_batch_of_files(rounds(7), 60 if few else 420)],
    }
    print(HEADER)
    rows = [row for key, part in parts.items() if not options.only or key in options.only for row in part()]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
