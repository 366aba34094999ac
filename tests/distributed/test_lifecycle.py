"""All that a trainer does, one after the other on the same two workers: nothing is left over, all agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.workers import assert_ended_well, run_workers


def test_running_statistics_are_worker_0s_on_all_workers_once_a_task_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for the report
    assert_ended_well(run_workers(STATISTICS, 2))


def test_fit_validate_test_predict_fit_again_resume_and_stop_early(tmp_path: Path) -> None:
    assert_ended_well(run_workers(SOURCE.replace("FOLDER", str(tmp_path)), 2))


SOURCE = """
import os, torch, lightning.pytorch as pl
from pathlib import Path
from torch import nn
from torch.utils.data import DataLoader, Subset
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tests.distributed.toy import Toy, samples, shard, trainer, weights
import dcl_lightning

rank = int(os.environ["HOROVOD_RANK"])
root = Path("FOLDER")


class Full(Toy):
    def validation_step(self, batch, index):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("val", loss, sync_dist=True, batch_size=len(batch[0]))
        # Another value on each worker: it falls on worker 0 and rises on worker 1 from the third epoch on.
        self.log("own", float(self.current_epoch if rank and self.current_epoch > 1 else -self.current_epoch))
    def test_step(self, batch, index):
        self.log("test", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True,
                 batch_size=len(batch[0]))
    def predict_step(self, batch, index):
        return self.net(batch[0])


class CountingIO(TorchCheckpointIO):
    written, removed = [], []
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.written.append(Path(path).name)
        super().save_checkpoint(checkpoint, path, storage_options)
    def remove_checkpoint(self, path):
        self.removed.append(Path(path).name)
        super().remove_checkpoint(path)


def train(strategy, folder, batch, callbacks=(), model=None, ckpt=None, **options):
    CountingIO.written.clear(), CountingIO.removed.clear()
    saver = ModelCheckpoint(root / folder, monitor="val", save_top_k=2, save_last=True)
    t = trainer(strategy, enable_checkpointing=True, callbacks=[saver, *callbacks], plugins=[CountingIO()], **options)
    model = model or Full()
    place = (0, 1) if strategy == "auto" else (rank, 2)
    before = list(t.callbacks)
    t.fit(model, shard(*place, batch), shard(*place, batch), ckpt_path=ckpt)
    assert t.callbacks == before
    return t, model, saver

# -- checkpoints: the same files as one process writes, and each once, by worker 0 alone
t1, m1, s1 = train("auto", f"one_{rank}", 16, max_epochs=4)
written, removed = list(CountingIO.written), list(CountingIO.removed)
t, m, s = train("horovod", "two", 8, max_epochs=4)
assert Path(s.best_model_path).name == Path(s1.best_model_path).name
assert CountingIO.written == (written if rank == 0 else []), (CountingIO.written, written)
assert CountingIO.removed == (removed if rank == 0 else [])
t.strategy.barrier()
names = sorted(f.name for f in (root / "two").iterdir())
assert names == sorted(f.name for f in (root / f"one_{rank}").iterdir()) and len(names) == 3, names
torch.testing.assert_close(weights(m), weights(m1), atol=1e-6, rtol=1e-6)

# -- validate, test and predict with the same trainer, uneven shards, the best checkpoint; then fit on
whole, mine = DataLoader(samples(), batch_size=8), DataLoader(Subset(samples(), [range(41), range(41, 64)][rank]), 8)
for name in ("validate", "test"):
    wanted = getattr(t1, name)(m1, whole, ckpt_path="best", verbose=False)[0]
    found = getattr(t, name)(m, mine, ckpt_path="best", verbose=False)[0]
    for key in set(wanted) - {"own"}:
        assert abs(found[key] - wanted[key]) < 1e-6, (key, found, wanted)
torch.testing.assert_close(
    torch.cat(t.predict(m, mine)), torch.cat(t1.predict(m1, whole)).split([41, 23])[rank], atol=1e-6, rtol=1e-6
)
for trained, model, place, batch in ((t1, m1, (0, 1), 16), (t, m, (rank, 2), 8)):
    trained.fit_loop.max_epochs = 6
    trained.fit(model, shard(*place, batch), shard(*place, batch))
    assert trained.current_epoch == 6
torch.testing.assert_close(weights(m), weights(m1), atol=2e-6, rtol=2e-6)
assert not torch.distributed.is_initialized()

# -- resume: from the end of an epoch as if never stopped, bit for bit
_, straight, _ = train("horovod", "straight", 8, max_epochs=4)
train("horovod", "halves", 8, max_epochs=2)
_, resumed, _ = train("horovod", "halves", 8, max_epochs=4, model=Full(seed=7), ckpt=root / "halves" / "last.ckpt")
assert torch.equal(weights(resumed), weights(straight))

# -- early stopping: what one worker alone sees stops all of them, after the same epoch
for monitor, epochs in (("own", 3), ("val", 2)):
    stop = EarlyStopping(monitor, patience=1, min_delta=0.0 if monitor == "own" else 10.0)
    t, m, _ = train("horovod", f"stop_{monitor}", 8, [stop], max_epochs=50)
    ends = t.strategy.all_gather(torch.tensor(t.current_epoch)).tolist()
    assert ends == [epochs, epochs], ends
    both = t.strategy.all_gather(weights(m))
    assert torch.equal(both[0], both[1])

# -- what is refused on all workers leaves the trainer as it was, and the next fit saves after an exception again
class Refused(Full):
    def setup(self, stage):
        raise dcl_lightning.errors.ConfigurationError("no")

saver = ModelCheckpoint(root / "refused", save_on_exception=True)
t = trainer("horovod", enable_checkpointing=True, callbacks=[saver], max_epochs=1)
before = list(t.callbacks)
try:
    t.fit(Refused(), shard(rank, 2, 8))
except dcl_lightning.errors.ConfigurationError:
    pass
assert t.callbacks == before and saver.save_on_exception
t.fit(Full(), shard(rank, 2, 8))
assert t.callbacks == before and t.current_epoch == 1
"""

STATISTICS = """
import os, torch
from torch import nn
from tests.distributed.toy import trainer
from dcl_lightning import ContinualDataModule, ICaRL
from dcl_lightning.backbones import MLP


class Normed(MLP):
    def build(self, spec):
        width = super().build(spec)
        self.layers.append(nn.BatchNorm1d(width))
        return width


class Looking(ICaRL):
    # Values of all workers at three times: in validation, before and after the end of a task.
    looks = []
    def look(self, when):
        mean = self.backbone.layers[-1].running_mean
        mine, theirs = self.trainer.strategy.all_gather(mean)
        self.looks.append((when, torch.equal(mine, theirs)))
    def on_validation_epoch_end(self):
        self.look("validation")
        super().on_validation_epoch_end()
    def on_before_optimizer_step(self, optimizer):
        self.look("step")
    def on_task_end(self, task):
        self.look("task end")
        super().on_task_end(task)


data = ContinualDataModule("digits", increment=5, batch_size=32)
agent = Looking(Normed([8]), data.num_classes, input_spec=data.input_spec, epochs_per_task=1)
t = trainer("horovod", max_epochs=-1, num_sanity_val_steps=0)
t.fit(agent, datamodule=data)
assert ("step", False) in agent.looks, "each worker has statistics of its own in training"
assert set(agent.looks) - {("step", False), ("step", True)} == {("validation", True), ("task end", True)}, agent.looks
state = torch.cat([v.double().flatten() for v in agent.state_dict().values()])
both = t.strategy.all_gather(state)
assert torch.equal(both[0], both[1]), "the teachers differ"
"""
