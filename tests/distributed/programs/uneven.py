"""Workers with different numbers of batches: plain modules, tiny tasks, and streams without a length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from dcl_lightning import ContinualDataModule, FineTuning, Rehearsal, RehearsalConfig
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import DataError
from tests.distributed.programs.place import rank
from tests.distributed.toy import Toy, samples, trainer, weights


class Stream(IterableDataset[Any]):
    """As many samples on each worker, without a length."""

    def __init__(self, *counts: int) -> None:
        self.count = counts[rank()]

    def __iter__(self) -> Iterator[Any]:
        return iter(Subset(samples(), range(self.count)))


class AllowsNone(Toy):
    """Lets a worker have no batch at all."""

    def __init__(self) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True


def refused(data: DataLoader[Any], *words: str, module: Toy | None = None, **options: Any) -> int:
    """Fit, look at the error, and return after which step it came."""
    t = trainer("horovod", **options)
    with pytest.raises(DataError) as error:
        t.fit(module or Toy(), data)
    assert all(word in str(error.value) for word in words)
    return t.global_step


def loader(*batches: int) -> DataLoader[Any]:
    """Return as many batches on each worker, of two samples each."""
    return DataLoader(Subset(samples(), range(2 * batches[rank()])), batch_size=2)


def three_workers() -> None:
    """Tiny tasks are made even; what differs is refused on all workers alike."""
    torch.set_num_threads(1)
    # Tasks of 1, 2 and 6 samples on three workers, two a batch.
    y = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2])
    x = torch.randn(9, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    data = ContinualDataModule((x, y, x, y), increment=1, batch_size=2)
    agent = FineTuning(MLP([4]), data.num_classes, input_spec=data.input_spec)
    t = trainer("horovod", max_epochs=-1, num_sanity_val_steps=0)
    t.fit(agent, datamodule=data)
    assert t.global_step == 3
    assert agent.clock.schedule.evaluated == 3
    gathered = t.strategy.all_gather(weights(agent))
    assert gathered.isfinite().all()
    assert (gathered == gathered[0]).all()
    # As many batches as asked for, though the loaders differ.
    t = trainer("horovod", limit_train_batches=3)
    t.fit(Toy(), loader(4, 3, 5))
    assert t.global_step == 9
    assert refused(loader(4, 4, 3), "epoch 0: ", "worker 0 has 4, worker 1 has 4, worker 2 has 3") == 0
    # Without a length they differ only as the shortest ends, in a step that all have.
    streams = DataLoader(Stream(8, 4, 8), batch_size=2)
    assert refused(streams, "the epoch ends on worker 1 after 2 batches") == 2
    # A limit may hide it as well.
    assert refused(loader(4, 2, 4), "worker 1 has 2", limit_train_batches=3) == 0
    assert refused(loader(2, 2, 0), "worker 2 has 0", module=AllowsNone()) == 0


def streams_beside_a_memory() -> None:
    """A hang would be seen by the deadline of the test: a collective may take 30 minutes."""
    torch.set_num_threads(1)
    ways: list[tuple[Any, Any]] = [
        ("local", "inline"), ("local", "blocking"), ("global", "inline"), ("global", "blocking")
    ]  # fmt: skip
    for scope, execution in ways:
        config = RehearsalConfig(
            buffer_size=8, num_samples=2, policy="reservoir", weighting="none", scope=scope, execution=execution
        )
        streams = DataLoader(Stream(8, 12), batch_size=2)
        words = "the epoch ends on worker 0 after 4 batches"
        assert refused(streams, words, callbacks=[Rehearsal(config)]) == 4, (scope, execution)
