"""Convolutional networks on CIFAR: whole fits beside Avalanche and a loop written by hand, which is the limit.

Two recipes, each with one thread and with two, with the convolutions in PyTorch's order and in ``channels_last``:

- online: ER on CIFAR-10 in five tasks of two classes, one pass, 10 new and 10 rehearsed images a step in one forward
  pass, a reservoir, a ResNet-18 of width 20 with the 3x3 stem;
- icarl: ``configs/icarl_cifar100.yaml`` in small: ResNet-32, batches of 128 of the task's images and the exemplars, two
  tasks of ten classes, few epochs, and at the end of each task exemplars, class means and an evaluation.

All images are cropped and mirrored. The sides:

- ours: ``Trainer.fit`` with ``ContinualDataModule`` and the agent ``er`` or ``icarl`` as a user gets it, but without a
  bar, a logger and pictures;
- a loop by hand (``plain.py``): the same network, optimizer and losses, images that lie on the device, crops and
  mirrors of the whole batch by the package's own functions, rows of the memory by indexing;
- Avalanche, where it is installed, in PyTorch's order, as it comes, and in ``channels_last``: its own loader, with
  torchvision's transforms image by image. Online it is ``Naive`` with ``ReplayPlugin`` over a stream in which each
  batch is an experience, as in ContinualAI/continual-learning-baselines; for icarl its own ``ICaRL``.

Online fits are compared in images per second, new and rehearsed ones, of which each side trains on as many; evaluation
is left out on all sides. Online steps are those of one task within a fit, without a warm-up and the last step: the
order of the convolutions in which the loop by hand is faster has the target. The seconds of icarl are those of the
whole fit, from the untrained network to the evaluation after the last task. Reading the images is left out everywhere.

``--gpu`` measures the same on a GPU instead, in float32 and in bfloat16 (``bf16-mixed``), and beside it a fourth side,
the way that Mammoth's documentation describes (datasets/build_a_dataset): ``DataLoader`` workers that transform each
image by Pillow and also return it as it was, which is what the memory stores; what is drawn from it is transformed
again, row by row, in the training process.

The sides of a round follow each other in an order that rotates; a row is the median over the rounds of the ratio within
a round, with the 95 % interval of that median from a bootstrap.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import end_to_end
import lightning.pytorch as pl
import torch
from common import HEADER, QUIET, WARM_UP, Size, report, rounds_of, step_ms
from end_to_end import Counted
from PIL import Image
from plain import LR, Batches, Reservoir, Shuffled, by_hand, icarl_by_hand, now_of, plain_network
from reproduce_peer import STRATEGIES, experiences_of, stream_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from dcl_lightning import ER, ContinualAgent, ContinualDataModule, ICaRL
from dcl_lightning.backbones import ResNet
from dcl_lightning.callbacks import TaskReport
from dcl_lightning.data.transforms import augment, normalise
from dcl_lightning.errors import DatasetNotFoundError

NEW, DRAWN, BATCH = 10, 10, 128
ORDERS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Of icarl_cifar100.yaml; its rate first falls after more epochs than there are here.
ICARL = {"lr": 2.0, "momentum": 0.9, "weight_decay": 2e-5}
AVALANCHE, LOOP, ONE_BY_ONE = "Avalanche", "a loop by hand", "transforms in workers"
WORKERS = 8  # processes of the last of these
Sides = dict[str, Callable[[], float]]
# What trains a network, to be timed from outside.
Train = Callable[["Setting", nn.Sequential], object]


class Images(NamedTuple):
    """Which images a fit is of.

    Args:
        dataset: a name of ``ContinualDataModule``.
        classes: of the stream, the first of the data set.
        increment: classes of a task.
        per_class: training images of each.
        tests: test images of each.
        stored: images that a memory holds, of all classes.
    """

    dataset: str
    classes: int
    increment: int
    per_class: int
    tests: int
    stored: int


class Scale(NamedTuple):
    """How much is measured.

    Args:
        online: images of the first recipe.
        fits: rounds of its whole fits.
        steps: rounds of its steps, and steps of each.
        icarl: images of the second recipe.
        epochs: of its tasks.
        rounds: of its whole fits.
    """

    online: Images
    fits: int
    steps: Size
    icarl: Images
    epochs: int
    rounds: int


CPU = Scale(Images("cifar10", 10, 2, 100, 10, 500), 7, Size(9, 20), Images("cifar100", 20, 10, 64, 10, 240), 2, 5)
GPU = Scale(Images("cifar10", 10, 2, 500, 10, 1000), 5, Size(7, 100), Images("cifar100", 20, 10, 500, 100, 2000), 5, 5)
SMALL = Scale(Images("synthetic", 4, 2, 10, 2, 20), 2, Size(2, 2), Images("synthetic", 4, 2, 10, 2, 8), 1, 2)
THREADS = (1, 2)


class Setting(NamedTuple):
    """How a side computes.

    Args:
        threads: of PyTorch.
        order: of the weights and maps of convolutions, a key of ``ORDERS``.
        precision: of the trainer; None on a CPU.
    """

    threads: int
    order: str
    precision: str | None = None

    @property
    def name(self) -> str:
        """What sets it apart, in a row's name."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{threads if self.precision is None else f'GPU {self.precision}'}, {self.order}"

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device("cpu" if self.precision is None else "cuda")

    @property
    def trainer(self) -> dict[str, Any]:
        """Options of our trainer besides ``QUIET``."""
        on_gpu = {"accelerator": "gpu", "devices": 1, "benchmark": True, "precision": self.precision}
        return {} if self.precision is None else on_gpu

    def network(self, backbone: ResNet, data: ContinualDataModule) -> nn.Sequential:
        """Return the network of a side that is not ours."""
        return plain_network(backbone, data).to(self.device).to(memory_format=ORDERS[self.order])

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute so in the loops that are not ours, with what they print to stderr left out."""
        mixed = self.precision == "bf16-mixed"
        # Weights change within: no copy of theirs in bfloat16 may be kept.
        autocast = torch.autocast(self.device.type, torch.bfloat16, mixed, cache_enabled=False)
        with contextlib.redirect_stderr(io.StringIO()), autocast:
            yield


Groups = list[list[Setting]]  # whose sides take turns within a group


def present(setting: Setting, loop: Train, avalanche: Train, one_by_one: Train) -> dict[str, Train]:
    """Return those sides of whole fits beside ours that there are: one only where it is installed, one on a GPU."""
    found = {LOOP: loop}
    if end_to_end.has_avalanche():
        importlib.import_module("avalanche.training.supervised")  # else within the time of its first fit
        found[AVALANCHE] = avalanche
    if setting.precision is not None:
        found[ONE_BY_ONE] = one_by_one
    return found


def read(images: Images, root: str, batch_size: int) -> ContinualDataModule:
    """Return images as a stream of tasks, read.

    Raises:
        DatasetNotFoundError: the data set is not there.
    """
    options: dict[str, Any] = {"root": root}
    if images.dataset == "synthetic":
        options["source_options"] = {"num_classes": images.classes, "size": 32, "per_class": images.per_class}
    whole = ContinualDataModule(images.dataset, scenario="none", **options)
    whole.setup()

    def first(inputs: Any, targets: Tensor, count: int) -> tuple[Any, Any]:
        rows = torch.cat([torch.nonzero(targets == y).flatten()[:count] for y in range(images.classes)])
        return inputs[rows].numpy(), targets[rows].numpy()

    assert whole.normalisation is not None
    mean, std = map(list, whole.normalisation)
    data = ContinualDataModule(
        (
            *first(whole.train_inputs, whole.train_targets, images.per_class),
            *first(whole.test_inputs, whole.test_targets, images.tests),
        ),
        increment=images.increment,
        batch_size=batch_size,
        augment=True,
        normalize={"mean": mean, "std": std},
        seed=0,
    )
    data.setup()
    return data


def our_seconds(agent: ContinualAgent, data: ContinualDataModule, setting: Setting) -> float:
    """Return how long a whole fit of ours takes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        silent = TaskReport(show_table=False, pictures=False)
        trainer = pl.Trainer(callbacks=[silent], default_root_dir=folder, **(QUIET | setting.trainer))
        started = time.perf_counter()
        trainer.fit(agent, datamodule=data)
        return now_of(agent) - started


def crops_of(data: ContinualDataModule) -> list[Callable[[Any], Any]]:
    """Return the transforms that crop and mirror one image."""
    return [transforms.RandomCrop(data.input_spec.height, padding=4), transforms.RandomHorizontalFlip()]


def one_by_one(data: ContinualDataModule) -> transforms.Compose:
    """Return the transforms of one image of Pillow's."""
    assert data.normalisation is not None
    return transforms.Compose([*crops_of(data), transforms.ToTensor(), transforms.Normalize(*data.normalisation)])


class Views(Dataset[tuple[Tensor, int, Tensor]]):
    """Training images transformed one by one, their labels, and the images as they were, as float.

    Args:
        data: whose images they are.
    """

    def __init__(self, data: ContinualDataModule) -> None:
        self.pixels = data.train_inputs.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets, self.transform = data.train_targets.tolist(), one_by_one(data)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        image = Image.fromarray(self.pixels[index])
        return self.transform(image), self.targets[index], transforms.functional.to_tensor(image)


def loaded(views: Views, rows: Tensor, batch_size: int) -> DataLoader[tuple[Tensor, int, Tensor]]:
    """Return the loader of rows, ``(n,)`` int64, whose workers transform them."""
    part = Subset(views, rows.tolist())
    return DataLoader(part, batch_size, shuffle=True, num_workers=WORKERS, pin_memory=torch.cuda.is_available())


def avalanche_options(
    data: ContinualDataModule, setting: Setting, optimizer: torch.optim.Optimizer, epochs: int = 1
) -> dict[str, Any]:
    """Return what Avalanche's strategies of both recipes take."""
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    return {
        "optimizer": optimizer,
        "train_mb_size": data.batch_size,
        "train_epochs": epochs,
        "eval_mb_size": data.eval_batch_size,
        "device": setting.device,
        "evaluator": EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
    }


# -- online ----------------------------------------------------------------------------------------


class Online:
    """The sides of the online recipe.

    Args:
        data: read.
        stored: rows of the memory.
    """

    def __init__(self, data: ContinualDataModule, stored: int) -> None:
        self.data, self.stored = data, stored

    def backbone(self) -> ResNet:
        """Return the network without its head."""
        return ResNet(18, stem="cifar", width=20, init="torch")

    def agent(self, setting: Setting) -> ContinualAgent:
        """Return ours."""
        memory = {"policy": "reservoir", "buffer_size": self.stored, "num_samples": DRAWN}
        order: Any = setting.order
        known = {"num_classes": self.data.num_classes, "input_spec": self.data.input_spec}
        return ER(self.backbone(), rehearsal=memory, lr=LR, memory_format=order, **known)

    def loop(self, setting: Setting, network: nn.Sequential, steps: int = 0) -> float:
        """Train in a loop by hand; return the time of a step as ``by_hand`` does."""
        data = self.data
        inputs, targets = data.train_inputs.to(setting.device), data.train_targets.to(setting.device)
        tasks = [data.train_indices(task).to(setting.device) for task in range(data.num_tasks)]
        assert data.normalisation is not None
        mean, std = data.normalisation

        def look(images: Tensor, ids: Tensor | None) -> Tensor:
            assert ids is not None
            return normalise(augment(images, ids, seed=0, epoch=0), mean, std)

        loaders = [Shuffled(inputs, targets, rows, data.batch_size) for rows in tasks]
        with setting.computing():
            return by_hand(network, look, loaders, Reservoir(inputs[:1], self.stored, DRAWN), steps)

    def one_by_one(self, setting: Setting, network: nn.Sequential) -> None:
        """Train on images that workers transform, and on rows that the training process does."""
        data, views = self.data, Views(self.data)
        optimizer = torch.optim.SGD(network.parameters(), LR)
        memory = Reservoir(torch.zeros((1, *data.input_spec)), self.stored, DRAWN)
        again = transforms.Compose([transforms.ToPILImage(), views.transform])
        with setting.computing():
            for task in range(data.num_tasks):
                for images, targets, as_they_were in loaded(views, data.train_indices(task), data.batch_size):
                    rows, labels, *_ = memory.draw()
                    memory.add(as_they_were, targets)
                    seen = torch.stack([*images, *map(again, rows)]).to(setting.device, non_blocking=True)
                    wanted = torch.cat([targets, labels]).to(setting.device, non_blocking=True)
                    loss = F.cross_entropy(network(seen), wanted)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

    def avalanche(self, setting: Setting, network: nn.Sequential) -> None:
        """Train Avalanche's strategy."""
        common = avalanche_options(self.data, setting, torch.optim.SGD(network.parameters(), LR))
        common |= {"criterion": nn.CrossEntropyLoss(), "model": network}
        memory = {"buffer_size": self.stored, "policy": "reservoir", "num_samples": DRAWN}
        strategy = STRATEGIES["er"][0](common, memory)
        with setting.computing():
            for task in stream_of(self.data).train_stream:
                for experience in experiences_of(task, self.data.batch_size, online=True):
                    strategy.train(experience, num_workers=0, drop_last=True)

    def rates(self, setting: Setting) -> Sides:
        """Return the sides of whole fits, each of which returns its images per second.

        A side raises ``RuntimeError`` if it trains on another number of images than the others.
        """

        def rate(seconds: float, counted: Counted) -> float:
            images = 2 * len(self.data.train_targets) - NEW  # nothing is rehearsed at the first step
            if counted.images != images:
                raise RuntimeError(f"a side trained on {counted.images} images, the others on {images}")
            return images / seconds

        def ours() -> float:
            agent = self.agent(setting)
            counted = Counted(agent.backbone)
            return rate(our_seconds(agent, self.data, setting) - agent.clock.wall_time["evaluate"], counted)

        def another(train: Train) -> float:
            network = setting.network(self.backbone(), self.data)
            counted, started = Counted(network[0]), now_of(network)
            train(setting, network)
            return rate(now_of(network) - started, counted)

        return {
            name: partial(another, train)
            for name, train in present(setting, self.loop, self.avalanche, self.one_by_one).items()
        } | {"ours": ours}

    def steps(self, setting: Setting, steps: int) -> Sides:
        """Return the sides of single steps, each of which returns their mean time in ms."""
        return {
            "ours": lambda: step_ms(self.agent(setting), self.data, steps, **setting.trainer),
            LOOP: lambda: self.loop(setting, setting.network(self.backbone(), self.data), steps),
        }


def online_fits(scale: Scale, root: str, groups: Groups) -> list[dict[str, Any]]:
    """Return the rows of whole online fits."""
    online = Online(read(scale.online, root, NEW), scale.online.stored)
    return rows_of("online fit", "images/s", groups, scale.fits, online.rates, {AVALANCHE: ">= 1.5"})


def online_steps(scale: Scale, root: str, groups: Groups) -> list[dict[str, Any]]:
    """Return the rows of online steps; in each group that has the target in which the loop by hand is fastest."""
    size, images = scale.steps, scale.online
    per_class = -(-(WARM_UP + size.steps + 2) * NEW // images.classes)
    data = read(images._replace(increment=images.classes, per_class=per_class), root, NEW)
    sides = partial(Online(data, images.stored).steps, steps=size.steps)
    return rows_of("online step", "ms", groups, size.rounds, sides, {LOOP: "<= 1.05"}, of_the_fastest=LOOP)


# -- icarl -----------------------------------------------------------------------------------------


class Exemplars:
    """The sides of iCaRL's recipe.

    Args:
        data: read.
        stored: exemplars in all.
        epochs: of a task.
    """

    def __init__(self, data: ContinualDataModule, stored: int, epochs: int) -> None:
        self.data, self.stored, self.epochs = data, stored, epochs

    def backbone(self) -> ResNet:
        """Return the network without its head."""
        return ResNet(32)

    def agent(self, setting: Setting) -> ContinualAgent:
        """Return ours."""
        order: Any = setting.order
        known = {"num_classes": self.data.num_classes, "input_spec": self.data.input_spec}
        memory = {"buffer_size": self.stored}
        options: dict[str, Any] = {"nme_flip": True, "epochs_per_task": self.epochs, **known, **ICARL}
        return ICaRL(self.backbone(), rehearsal=memory, memory_format=order, **options)

    def loop(self, setting: Setting, network: nn.Sequential, batches: Batches | None = None) -> float:
        """Train and evaluate in a loop by hand; return the accuracy at the end."""
        optimizer = partial(torch.optim.SGD, **ICARL)
        with setting.computing():
            return icarl_by_hand(network, self.data, self.epochs, self.stored, optimizer, batches)

    def one_by_one(self, setting: Setting, network: nn.Sequential) -> float:
        """Do the same on images that workers transform."""
        views = Views(self.data)

        def batches(rows: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for images, targets, _ in loaded(views, rows.cpu(), self.data.batch_size):
                yield images.to(setting.device, non_blocking=True), targets.to(setting.device, non_blocking=True)

        return self.loop(setting, network, batches)

    def avalanche(self, setting: Setting, network: nn.Sequential) -> None:
        """Train and evaluate Avalanche's iCaRL, whose exemplars are cropped and mirrored, too."""
        from avalanche.training import supervised

        optimizer = torch.optim.SGD(network.parameters(), **ICARL)
        strategy = supervised.ICaRL(
            feature_extractor=network[0],
            classifier=network[1],
            memory_size=self.stored,
            buffer_transform=transforms.Compose(crops_of(self.data)),
            fixed_memory=True,
            **avalanche_options(self.data, setting, optimizer, self.epochs),
        )
        stream = stream_of(self.data)
        with setting.computing():
            for task, experience in enumerate(stream.train_stream):
                strategy.train(experience, num_workers=0)
                strategy.eval(stream.test_stream[: task + 1])

    def seconds(self, setting: Setting) -> Sides:
        """Return the sides of whole fits, each of which returns its seconds."""

        def another(train: Train) -> float:
            network = setting.network(self.backbone(), self.data)
            started = now_of(network)
            train(setting, network)
            return now_of(network) - started

        return {
            name: partial(another, train)
            for name, train in present(setting, self.loop, self.avalanche, self.one_by_one).items()
        } | {"ours": lambda: our_seconds(self.agent(setting), self.data, setting)}


def icarl_fits(scale: Scale, root: str, groups: Groups) -> list[dict[str, Any]]:
    """Return the rows of whole fits of iCaRL."""
    exemplars = Exemplars(read(scale.icarl, root, BATCH), scale.icarl.stored, scale.epochs)
    return rows_of("icarl fit", "s", groups, scale.rounds, exemplars.seconds, {LOOP: "<= 1.15"})


# -- all -------------------------------------------------------------------------------------------


def rows_of(
    what: str,
    unit: str,
    groups: Groups,
    rounds: int,
    sides_of: Callable[[Setting], Sides],
    targets: dict[str, str],
    of_the_fastest: str | None = None,
) -> list[dict[str, Any]]:
    """Measure and return the rows of ours over each other side, in each setting.

    Args:
        what: is measured.
        unit: of what a side returns.
        groups: of settings.
        rounds: of each group.
        sides_of: returns the sides of a setting, ours among them as ``ours``.
        targets: of ours over the others, on a CPU.
        of_the_fastest: side by whose median, in ms, a target is only that of the fastest setting of a group.
    """

    def with_threads(setting: Setting, side: Callable[[], float]) -> float:
        torch.set_num_threads(setting.threads)
        return side()

    rows = []
    for group in groups:
        sides = {(s, name): partial(with_threads, s, side) for s in group for name, side in sides_of(s).items()}
        found = rounds_of(sides, rounds)
        fastest = group
        if of_the_fastest is not None:
            fastest = [min(group, key=lambda setting: statistics.median(found[setting, of_the_fastest]))]
        for (setting, peer), values in found.items():
            if peer == "ours":
                continue
            aimed, name = setting in fastest and setting.precision is None, f"{what}, {setting.name}, ours over {peer}"
            ours = setting
            if peer == AVALANCHE and setting.order == "contiguous":
                # As each comes: on a CPU ours chooses channels_last.
                ours = setting._replace(order="channels_last")
                name = f"{what}, {ours.name}, ours over {peer} in its contiguous"
            elif peer == AVALANCHE:
                aimed = False
            target = targets.get(peer, "reported") if aimed else "reported"
            rows.append(report(name, unit, found[ours, "ours"], values, target))
    return rows


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trial = "few synthetic images: whether it runs, no figures"
    parser.add_argument("--quick", "--small", action="store_true", help=trial)
    parser.add_argument("--only", default="", help="parts to run: letters of online fits (f) and steps (s), icarl (i)")
    parser.add_argument("--gpu", action="store_true", help="on a GPU instead, also in bfloat16")
    parser.add_argument("--root", default="datasets", help="folder of CIFAR-10 and CIFAR-100")
    parser.add_argument("--rounds", type=int, help="instead of each part's own number")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a GPU, and PyTorch finds none")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.showwarning = lambda *_, **__: None  # Avalanche switches its own on at every step
    torch.backends.cudnn.benchmark = options.gpu
    scale = SMALL if options.quick else GPU if options.gpu else CPU
    if options.rounds:
        steps = scale.steps._replace(rounds=options.rounds)
        scale = scale._replace(fits=options.rounds, steps=steps, rounds=options.rounds)
    groups = [[Setting(threads, order) for order in ORDERS] for threads in THREADS]
    if options.gpu:
        groups = [[Setting(1, order, precision) for order in ORDERS] for precision in ("32-true", "bf16-mixed")]
    parts = {"f": online_fits, "s": online_steps, "i": icarl_fits}
    print(HEADER)
    rows, notes = [], []
    for key, part in parts.items():
        if options.only and key not in options.only:
            continue
        try:
            rows += part(scale, options.root, groups)
        except DatasetNotFoundError as error:
            notes.append(f"Left out ({key}): {error}")
    if end_to_end.has_avalanche():
        notes.append(f"Avalanche {version('avalanche-lib')}.")
    else:
        notes.append("Avalanche is not installed: its rows are left out.")
    print("", *notes, sep="\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
