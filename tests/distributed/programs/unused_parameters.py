"""Parameters without a gradient and without ``find_unused_parameters``: heads that are used in some steps only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dcl_lightning import HorovodStrategy
from tests.distributed.programs.place import rank
from tests.distributed.toy import samples, shard, trainer, weights


class Heads(pl.LightningModule):
    """A head that is always used, and a spare one.

    Args:
        used: is the spare head used in this step, at this batch?
    """

    def __init__(self, used: Callable[[int, int], bool]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head, self.spare = nn.Linear(5, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.used = used

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor | None:
        hidden = self.trunk(batch[0]).tanh()
        out = self.head(hidden)
        if self.used(self.trainer.global_step, index):
            out = out + self.spare(hidden)
        return nn.functional.mse_loss(out, batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Thawed(Heads):
    """Trains its spare head in the second epoch only."""

    def __init__(self) -> None:
        super().__init__(lambda step, index: True)
        self.spare.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.spare.requires_grad_(self.current_epoch == 1)


class Manual(Heads):
    """Trains one head after the other by hand."""

    def __init__(self) -> None:
        super().__init__(lambda step, index: True)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        """Return one for each head."""
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.head, self.spare)]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer, part in zip(optimizers, (self.head, self.spare), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(part(self.trunk(batch[0])), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def agreed() -> None:
    """Where all workers agree on what is used they equal one process that has the global batches."""

    def compare(make: Callable[[], Heads], **options: Any) -> None:
        mine, alone = make(), make()
        trainer(HorovodStrategy(), max_epochs=2, **options).fit(mine, shard(rank(), 2, 4))
        trainer("auto", max_epochs=2, **options).fit(alone, DataLoader(samples(), 8))
        torch.testing.assert_close(weights(mine), weights(alone))

    compare(lambda: Heads(lambda step, index: step % 3 == 1))
    # In one batch of each accumulation.
    compare(lambda: Heads(lambda step, index: index % 2 == 0), accumulate_grad_batches=2)
    compare(lambda: Heads(lambda step, index: index % 2 == 1), accumulate_grad_batches=2)
    compare(Thawed)
    compare(Manual)


def one_worker_without() -> None:
    """Worker 1 leaves the spare head out from the fourth step on."""
    trainer(HorovodStrategy()).fit(Heads(lambda step, index: rank() == 0 or step < 3), shard(rank(), 2, 8))


def in_turn() -> None:
    """From the fourth step on worker 0 uses the spare head in even steps, worker 1 in odd ones."""
    trainer(HorovodStrategy()).fit(Heads(lambda step, index: step < 3 or step % 2 == rank()), shard(rank(), 2, 4))
