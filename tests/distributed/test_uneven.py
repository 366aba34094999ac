"""Workers with different numbers of batches: refused on all alike, never waited for; tiny tasks are made even."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.workers import assert_ended_well, run_workers


def test_uneven_shards_on_three_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for the report
    assert_ended_well(run_workers(UNEVEN, 3))


UNEVEN = """
import os, torch, lightning.pytorch as pl
from torch.utils.data import DataLoader, IterableDataset, Subset
from tests.distributed.toy import Toy, samples, trainer, weights
from dcl_lightning import ContinualDataModule, FineTuning
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import DataError

rank = int(os.environ["HOROVOD_RANK"])
torch.set_num_threads(1)

# Tasks of 1, 2 and 6 samples on three workers, two a batch.
y = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2])
x = torch.randn(9, 1, 2, 2, generator=torch.Generator().manual_seed(0))
data = ContinualDataModule((x, y, x, y), increment=1, batch_size=2)
agent = FineTuning(MLP([4]), data.num_classes, input_spec=data.input_spec)
t = trainer("horovod", max_epochs=-1, num_sanity_val_steps=0)
t.fit(agent, datamodule=data)
assert t.global_step == 3 and agent.clock.evaluated_rows == 3, t.global_step
gathered = t.strategy.all_gather(weights(agent))
assert gathered.isfinite().all() and (gathered == gathered[0]).all()

def loader(lengths):
    return DataLoader(Subset(samples(), range(2 * lengths[rank])), batch_size=2)

class Stream(IterableDataset):
    def __iter__(self):
        return iter(Subset(samples(), range([8, 4, 8][rank])))

def refused(data, *words, model=Toy, **options):
    t = trainer("horovod", **options)
    try:
        t.fit(model(), data)
    except DataError as error:
        assert all(word in str(error) for word in words), error
        return t.global_step
    raise AssertionError("not refused")

# As many batches as asked for, though the loaders differ.
t = trainer("horovod", limit_train_batches=3)
t.fit(Toy(), loader([4, 3, 5]))
assert t.global_step == 9
assert refused(loader([4, 4, 3]), "epoch 0: ", "worker 0 has 4, worker 1 has 4, worker 2 has 3") == 0
# Without a length they differ only as the shortest ends, in a step that all have.
assert refused(DataLoader(Stream(), batch_size=2), "the epoch ends on worker 1 after 2 batches") == 2
# A limit may hide it as well.
assert refused(loader([4, 2, 4]), "worker 1 has 2", limit_train_batches=3) == 0
class Allows(Toy):
    def __init__(self):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
assert refused(loader([2, 2, 0]), "worker 2 has 0", model=Allows) == 0
"""


def test_streams_of_unequal_length_beside_a_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_ended_well(run_workers(STREAMS, 2))


# A hang would be seen by the deadline of this test: a collective may take 30 minutes.
STREAMS = """
import os, torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from tests.distributed.toy import Toy, samples, trainer
from dcl_lightning import Rehearsal, RehearsalConfig
from dcl_lightning.errors import DataError

rank = int(os.environ["HOROVOD_RANK"])
torch.set_num_threads(1)

class Stream(IterableDataset):
    def __iter__(self):
        return iter(Subset(samples(), range([8, 12][rank])))

for scope, execution in (("local", "inline"), ("local", "blocking"), ("global", "inline"), ("global", "blocking")):
    config = RehearsalConfig(
        buffer_size=8, num_samples=2, policy="reservoir", weighting="none", scope=scope, execution=execution
    )
    t = trainer("horovod", callbacks=[Rehearsal(config)])
    try:
        t.fit(Toy(), DataLoader(Stream(), batch_size=2))
    except DataError as error:
        assert "the epoch ends on worker 0 after 4 batches" in str(error), error
        assert t.global_step == 4
    else:
        raise AssertionError((scope, execution))
"""
