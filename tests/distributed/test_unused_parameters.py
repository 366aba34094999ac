"""Parameters without a gradient, without ``find_unused_parameters``: right where workers agree, named where not."""

from __future__ import annotations

import re

from tests.distributed.workers import assert_ended_well, run_workers

# Worker-dependent where WHEN says so; a head is used in the steps in which it holds.
MODULE = """
import os
import lightning.pytorch as pl, torch
from torch import nn
from torch.utils.data import DataLoader
from tests.distributed.toy import samples, shard, trainer, weights
from dcl_lightning import HorovodStrategy

rank = int(os.environ["HOROVOD_RANK"])

class Heads(pl.LightningModule):
    def __init__(self, used):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head, self.spare = nn.Linear(5, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.used = used

    def training_step(self, batch, index):
        hidden = self.trunk(batch[0]).tanh()
        out = self.head(hidden)
        if self.used(self.trainer.global_step, index):
            out = out + self.spare(hidden)
        return nn.functional.mse_loss(out, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
"""

AGREED = """
def both(make, **options):
    mine, alone = make(), make()
    trainer(HorovodStrategy(), max_epochs=2, **options).fit(mine, shard(rank, 2, 4))
    trainer("auto", max_epochs=2, **options).fit(alone, DataLoader(samples(), 8))
    torch.testing.assert_close(weights(mine), weights(alone))

both(lambda: Heads(lambda step, index: step % 3 == 1))
# In one batch of each accumulation.
both(lambda: Heads(lambda step, index: index % 2 == 0), accumulate_grad_batches=2)
both(lambda: Heads(lambda step, index: index % 2 == 1), accumulate_grad_batches=2)

class Thawed(Heads):
    def __init__(self):
        super().__init__(lambda step, index: True)
        self.spare.requires_grad_(False)

    def on_train_epoch_start(self):
        self.spare.requires_grad_(self.current_epoch == 1)

both(Thawed)

class Manual(Heads):
    def __init__(self):
        super().__init__(None)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.head, self.spare)]

    def training_step(self, batch, index):
        for optimizer, part in zip(self.optimizers(), (self.head, self.spare)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(part(self.trunk(batch[0])), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

both(Manual)
"""


def test_parameters_that_no_worker_uses_in_a_step_cost_nothing() -> None:
    """As one process that has the global batches: used now and then, thawed later, one after the other by hand."""
    assert_ended_well(run_workers(MODULE + AGREED, 2))


def test_a_worker_that_waits_for_a_gradient_learns_which_and_from_whom_it_does_not_come() -> None:
    workers = run_workers(
        MODULE + "trainer(HorovodStrategy()).fit(Heads(lambda step, index: rank == 0 or step < 3), shard(rank, 2, 8))",
        2,
    )
    assert [worker.code for worker in workers] == [1, 1], workers
    told = re.findall(r"^\S*ConfigurationError: (.*)$", workers[0].output, re.MULTILINE)
    assert told == [
        "worker 1's backward pass gave no gradient to spare.weight, spare.bias, and worker 0 waits for it: "
        "set find_unused_parameters=true of strategy=horovod"
    ], workers[0].output
    assert "ConfigurationError" not in workers[1].output, "the echo"


def test_gradients_of_two_steps_are_not_combined_in_silence() -> None:
    """Worker 0 uses it in even steps, worker 1 in odd ones: each would wait for the other's next step, and get that."""
    workers = run_workers(
        MODULE
        + "trainer(HorovodStrategy()).fit(Heads(lambda step, index: step < 3 or step % 2 == rank), shard(rank, 2, 4))",
        2,
    )
    assert [worker.code for worker in workers] == [1, 1], workers
    output = workers[0].output + workers[1].output
    assert "than on another worker: set find_unused_parameters=true of strategy=horovod" in output, output
    assert "none to spare.weight, spare.bias" in output
