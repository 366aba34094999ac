"""The sides of ``end_to_end.py`` that are written by hand: a memory, a Lightning module, a loop without Lightning."""

from __future__ import annotations

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


def plain_loss(network: nn.Module, look: Look, batch: Sequence[Any], memory: Memory | None, step: int) -> Tensor:
    """Return the weighted cross entropy of a batch of inputs, targets and, if any, ids, and of what is drawn to it."""
    inputs, targets, ids = (*batch, None)[:3]
    weights = torch.ones(len(targets))
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


def by_hand(network: nn.Module, look: Look, loaders: list[Any], memory: Memory | None, steps: int = 0) -> float:
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
    started = time.perf_counter()
    for step, batch in enumerate(batch for loader in loaders for batch in loader):
        if step == first:
            started = time.perf_counter()
        elif steps and step == first + steps:
            return 1e3 * (time.perf_counter() - started) / steps
        loss = plain_loss(network, look, batch, memory, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 1e3 * (time.perf_counter() - started) / (step + 1 - first)
