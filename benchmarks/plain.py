"""The sides of ``end_to_end.py`` and ``convnet.py`` that are written by hand.

Memories, a Lightning module, and loops without Lightning; what they take of the package are its pure functions and the
tensors and tasks of its data module.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from common import WARM_UP
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dcl_lightning import ContinualDataModule
from dcl_lightning.backbones import Backbone
from dcl_lightning.data.transforms import augment, normalise
from dcl_lightning.functional import herding

NEW, DRAWN, CANDIDATES, LR = 64, 64, 20, 0.05
# Makes of a batch, and the ids of its samples if there are any, what the network takes.
Look = Callable[[Tensor, Tensor | None], Tensor]


def plain_network(backbone: Backbone, data: ContinualDataModule) -> nn.Sequential:
    """Return the network of the sides that are not ours: the same backbone, one linear layer behind it."""
    backbone.adapt(data.input_spec)
    return nn.Sequential(backbone, nn.Linear(backbone.feature_dim, data.num_classes))


class Samples(Dataset[tuple[Tensor, int]]):
    """Images in memory, transformed one by one.

    Args:
        inputs: ``(n, C, H, W)``.
        targets: ``(n,)`` int64.
        transform: of one image; None if others transform.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, transform: Callable[[Tensor], Tensor] | None) -> None:
        self.inputs, self.targets, self.transform = inputs, targets.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.inputs[index]
        return image if self.transform is None else self.transform(image), self.targets[index]


class Made:
    """A loader over batches that were made beforehand.

    Args:
        batches: in their order.
    """

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Shuffled:
    """Batches of rows in a random order, taken from tensors by indexing.

    Args:
        inputs: ``(n, C, H, W)``.
        targets: ``(n,)`` int64.
        rows: ``(k,)`` int64, those that are visited.
        batch_size: of all batches but the last.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, rows: Tensor, batch_size: int) -> None:
        self.inputs, self.targets, self.rows, self.batch_size = inputs, targets, rows, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(len(self.rows), device=self.rows.device)
        for rows in self.rows[order].split(self.batch_size):
            yield self.inputs.index_select(0, rows), self.targets[rows], rows


class Reservoir:
    """A reservoir as one writes it by hand: it lies on the device of its example, and is drawn from by indexing.

    Args:
        example: a batch of what is stored.
        stored: rows in all.
        drawn: of them for each batch.
    """

    def __init__(self, example: Tensor, stored: int, drawn: int) -> None:
        self.rows = example.new_zeros((stored, *example.shape[1:]))
        self.targets = torch.zeros(stored, dtype=torch.int64, device=example.device)
        self.drawn, self.offered = drawn, 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Offer the rows of a batch one after the other; of several that take one slot the last keeps it."""
        taken: dict[int, int] = {}
        for place in range(len(targets)):
            slot = self.offered if self.offered < len(self.rows) else random.randrange(self.offered + 1)
            if slot < len(self.rows):
                taken[slot] = place
            self.offered += 1
        if taken:
            slots, places = torch.tensor([[*taken], [*taken.values()]], device=targets.device)
            self.rows.index_copy_(0, slots, inputs.index_select(0, places))
            self.targets.index_copy_(0, slots, targets[places])

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return drawn rows, their labels, weights, all 1, and slots; none from an empty memory."""
        size, device = min(self.offered, len(self.rows)), self.targets.device
        slots = torch.randperm(size, device=device)[: self.drawn]
        return self.rows.index_select(0, slots), self.targets[slots], torch.ones(len(slots), device=device), slots


class Memory:
    """A class-balanced memory as one writes it by hand: each class has an equal part of the rows.

    Args:
        example: a batch of what is stored.
        stored: rows in all.
        classes: of the whole stream.
        full: whether all rows are there from the start.
    """

    def __init__(self, example: Tensor, stored: int, classes: int, full: bool = False) -> None:
        self.room = stored // classes
        self.rows = torch.zeros((self.room * classes, *example.shape[1:]), dtype=example.dtype)
        self.filled = torch.arange(len(self.rows))
        self.size = len(self.rows) if full else 0
        self.counts = [self.room if full else 0] * classes
        self.offered = torch.tensor(self.counts)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Store candidates of a batch; of a full class they overwrite random rows."""
        chosen = torch.randperm(len(targets))[:CANDIDATES]
        slots = []
        for label in targets[chosen].tolist():
            place = self.counts[label]
            if place < self.room:
                self.filled[self.size] = label * self.room + place
                self.counts[label] += 1
                self.size += 1
            else:
                place = random.randrange(self.room)
            slots.append(label * self.room + place)
        self.rows.index_copy_(0, torch.tensor(slots), inputs.index_select(0, chosen))
        self.offered += torch.bincount(targets[chosen], minlength=len(self.offered))

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return drawn rows, their labels, weights and slots; none from an empty memory."""
        slots = self.filled[torch.randperm(self.size)[:DRAWN]]
        labels = slots // self.room
        ratio = self.offered[labels] * (NEW / (CANDIDATES * max(self.size, 1)))
        return self.rows.index_select(0, slots), labels, ratio.clamp(min=math.e).log(), slots


def plain_loss(
    network: nn.Module, look: Look, batch: Sequence[Any], memory: Memory | Reservoir | None, step: int
) -> Tensor:
    """Return the weighted cross entropy of a batch of inputs, targets and, if any, ids, and of what is drawn to it."""
    inputs, targets, ids = (*batch, None)[:3]
    weights = torch.ones(len(targets), device=targets.device)
    if memory is not None:
        rows, labels, more, slots = memory.draw()
        memory.add(inputs, targets)
        inputs, targets, weights = (torch.cat(pair) for pair in ((inputs, rows), (targets, labels), (weights, more)))
        ids = None if ids is None else torch.cat((ids, slots + (step << 32)))
    losses = F.cross_entropy(network(look(inputs, ids)), targets, reduction="none")
    return (weights * losses).sum() / weights.sum()


class Plain(pl.LightningModule):
    """The smallest Lightning module that does the work.

    Args:
        network: that is trained.
        look: makes of a batch what the network takes.
        loaders: one for each epoch.
        memory: None without rehearsal.
        logs: whether each step's loss is logged for the bar.
    """

    def __init__(
        self, network: nn.Module, look: Look, loaders: list[Any], memory: Memory | None, logs: bool = False
    ) -> None:
        super().__init__()
        self.network, self.look, self.loaders, self.memory, self.logs = network, look, loaders, memory, logs

    def train_dataloader(self) -> Iterable[Any]:
        """Return the loader of this epoch's task."""
        return self.loaders[self.trainer.current_epoch]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        loss = plain_loss(self.network, self.look, batch, self.memory, batch_idx)
        if self.logs:
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.network.parameters(), LR)


def now_of(network: nn.Module) -> float:
    """Return the time in s at which the network's device has done what it was given."""
    if next(network.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def by_hand(
    network: nn.Module, look: Look, loaders: list[Any], memory: Memory | Reservoir | None, steps: int = 0
) -> float:
    """Train on all loaders in turn, as ``Plain`` does, in a loop.

    Args:
        network: that is trained.
        look: makes of a batch what the network takes.
        loaders: one for each epoch.
        memory: None without rehearsal.
        steps: that are timed behind a warm-up, after which training ends; 0 to train on everything.

    Returns:
        The mean time of the timed steps, in ms; of all of them if ``steps`` is 0.
    """
    optimizer = torch.optim.SGD(network.parameters(), LR)
    first = WARM_UP if steps else 0
    started = now_of(network)
    for step, batch in enumerate(batch for loader in loaders for batch in loader):
        if step == first:
            started = now_of(network)
        elif steps and step == first + steps:
            return 1e3 * (now_of(network) - started) / steps
        loss = plain_loss(network, look, batch, memory, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 1e3 * (now_of(network) - started) / (step + 1 - first)


# -- iCaRL -----------------------------------------------------------------------------------------

# Makes the batches of an epoch, as the network takes them with their labels, from rows and the number of the epoch.
Batches = Callable[[Tensor, int], Iterable[tuple[Tensor, Tensor]]]


def icarl_by_hand(
    network: nn.Sequential,
    data: ContinualDataModule,
    epochs: int,
    stored: int,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    batches: Batches | None = None,
) -> float:
    """Train iCaRL (Rebuffi et al. 2017) on tasks of new classes, each followed by an evaluation of the classes so far.

    Args:
        network: backbone and head.
        data: read, its classes in the order of their ids, normalised.
        epochs: of each task.
        stored: exemplars in all.
        optimizer: makes that of a task.
        batches: of an epoch; images cropped and mirrored all at once if None.

    Returns:
        The accuracy over all test images after the last task, by the nearest mean.
    """
    device = next(network.parameters()).device
    inputs, targets = data.train_inputs.to(device), data.train_targets.to(device)
    tests, labels = data.test_inputs.to(device), data.test_targets.to(device)
    assert data.normalisation is not None
    mean, std = data.normalisation
    exemplars: dict[int, Tensor] = {}
    teacher: nn.Module | None = None
    old, accuracy = 0, 0.0

    def cropped(rows: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, wanted, ids in Shuffled(inputs, targets, rows, data.batch_size):
            yield normalise(augment(images, ids, seed=0, epoch=epoch), mean, std), wanted

    @torch.no_grad()
    def features(images: Tensor, mirrored: bool = False) -> Tensor:
        parts = (normalise(part, mean, std) for part in images.split(data.eval_batch_size))
        return herding.normalise(torch.cat([network[0](part.flip(-1) if mirrored else part).float() for part in parts]))

    for task in range(data.num_tasks):
        own = data.train_indices(task).to(device)
        classes = targets[own].unique().tolist()
        descent = optimizer(network.parameters())
        network.train()
        for epoch in range(epochs):
            rows = torch.cat([own, *exemplars.values()])
            for images, wanted in (batches or cropped)(rows, task * epochs + epoch):
                goals = F.one_hot(wanted, data.num_classes).float()
                if teacher is not None:
                    with torch.no_grad():
                        goals[:, :old] = teacher(images)[:, :old].sigmoid()
                loss = F.binary_cross_entropy_with_logits(network(images), goals)
                descent.zero_grad()
                loss.backward()
                descent.step()
        network.eval()
        old += len(classes)
        quota, found = stored // old, features(inputs[own]).cpu()  # one exemplar after the other: a GPU would wait
        exemplars = {y: rows[:quota] for y, rows in exemplars.items()}
        for y in classes:
            mine = targets[own] == y
            exemplars[y] = own[mine][herding.herd(found[mine.cpu()], quota).to(device)]
        rows = torch.cat([*exemplars.values()])
        means = sum(
            herding.class_means(features(inputs[rows], mirrored), targets[rows], data.num_classes)[0]
            for mirrored in (False, True)
        )
        known = torch.arange(data.num_classes, device=device) < old
        seen = labels < old
        scores = herding.nearest_mean_scores(features(tests[seen]), herding.normalise(means), known)
        accuracy = float((scores.argmax(1) == labels[seen]).float().mean())
        teacher = copy.deepcopy(network)
    return accuracy
