"""A trainer's whole life on two workers against one process; running statistics at a task's end."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from dcl_lightning import ContinualDataModule, ICaRL
from dcl_lightning._lightning import callbacks_of
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from tests.distributed.programs.place import rank
from tests.distributed.toy import Toy, samples, shard, trainer, weights


class Full(Toy):
    """Validates, tests and predicts as well."""

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log a loss of all workers, and a value that from the third epoch on rises on worker 1 alone."""
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("val", loss, sync_dist=True, batch_size=len(batch[0]))
        self.log("own", float(self.current_epoch if rank() and self.current_epoch > 1 else -self.current_epoch))

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("test", loss, sync_dist=True, batch_size=len(batch[0]))

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        out: Tensor = self.net(batch[0])
        return out


class CountingIO(TorchCheckpointIO):
    """Records which files this worker writes and removes."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.removed: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.written.append(Path(path).name)
        super().save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: str | Path) -> None:
        self.removed.append(Path(path).name)
        super().remove_checkpoint(path)


class Fit:
    """A fit that saves the two best checkpoints and the last one.

    Args:
        strategy: ``auto`` has all samples, ``horovod`` every second one.
        folder: of its checkpoints.
        callbacks: more of them.
        module: another one than a new ``Full``.
        ckpt: to resume from.
        options: of the trainer.
    """

    def __init__(
        self, strategy: str, folder: Path, callbacks: Sequence[pl.Callback] = (), module: Full | None = None,
        ckpt: Path | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.io = CountingIO()
        self.saver = ModelCheckpoint(folder, monitor="val", save_top_k=2, save_last=True)
        self.trainer = trainer(
            strategy, enable_checkpointing=True, callbacks=[self.saver, *callbacks], plugins=[self.io], **options
        )
        self.module = module or Full()
        self.shard = (0, 1, 16) if strategy == "auto" else (rank(), 2, 8)
        self.go_on(ckpt)

    def go_on(self, ckpt: Path | None = None) -> None:
        """Fit, perhaps once more; the trainer's callbacks stay as they were."""
        before = list(callbacks_of(self.trainer))
        self.trainer.fit(self.module, shard(*self.shard), shard(*self.shard), ckpt_path=ckpt)
        assert callbacks_of(self.trainer) == before


def lifecycle(root: Path) -> None:
    """Two workers beside one process, which each of them runs for itself."""
    alone = Fit("auto", root / f"one_{rank()}", max_epochs=4)
    both = Fit("horovod", root / "two", max_epochs=4)
    check_files(alone, both, root)
    check_evaluation(alone, both)
    check_resume(root)
    check_early_stopping(root)
    check_refusal(root)


def check_files(alone: Fit, both: Fit, root: Path) -> None:
    """The same files as one process writes, and each once, by worker 0 alone."""
    assert Path(both.saver.best_model_path).name == Path(alone.saver.best_model_path).name
    assert both.io.written == (alone.io.written if rank() == 0 else [])
    assert both.io.removed == (alone.io.removed if rank() == 0 else [])
    both.trainer.strategy.barrier()
    names = sorted(f.name for f in (root / "two").iterdir())
    assert names == sorted(f.name for f in (root / f"one_{rank()}").iterdir())
    assert len(names) == 3
    torch.testing.assert_close(weights(both.module), weights(alone.module), atol=1e-6, rtol=1e-6)


def check_evaluation(alone: Fit, both: Fit) -> None:
    """Validate, test and predict with the same trainer, uneven shards, the best checkpoint; then fit on."""
    whole = DataLoader(samples(), batch_size=8)
    mine = DataLoader(Subset(samples(), [range(41), range(41, 64)][rank()]), 8)
    for name in ("validate", "test"):
        (wanted,) = getattr(alone.trainer, name)(alone.module, whole, ckpt_path="best", verbose=False)
        (found,) = getattr(both.trainer, name)(both.module, mine, ckpt_path="best", verbose=False)
        for key in set(wanted) - {"own"}:
            assert abs(found[key] - wanted[key]) < 1e-6, (key, found, wanted)
    ours: Any = both.trainer.predict(both.module, mine)
    theirs: Any = alone.trainer.predict(alone.module, whole)
    expected = torch.split(torch.cat(theirs), [41, 23])[rank()]
    torch.testing.assert_close(torch.cat(ours), expected, atol=1e-6, rtol=1e-6)
    for job in (alone, both):
        job.trainer.fit_loop.max_epochs = 6
        job.go_on()
        assert job.trainer.current_epoch == 6
    torch.testing.assert_close(weights(both.module), weights(alone.module), atol=2e-6, rtol=2e-6)
    assert not torch.distributed.is_initialized()


def check_resume(root: Path) -> None:
    """From the end of an epoch as if never stopped, bit for bit."""
    straight = Fit("horovod", root / "straight", max_epochs=4)
    Fit("horovod", root / "halves", max_epochs=2)
    resumed = Fit("horovod", root / "halves", module=Full(seed=7), ckpt=root / "halves" / "last.ckpt", max_epochs=4)
    assert torch.equal(weights(resumed.module), weights(straight.module))


def check_early_stopping(root: Path) -> None:
    """What one worker alone sees stops all of them, after the same epoch."""
    for monitor, epochs in (("own", 3), ("val", 2)):
        stop = EarlyStopping(monitor, patience=1, min_delta=0.0 if monitor == "own" else 10.0)
        job = Fit("horovod", root / f"stop_{monitor}", [stop], max_epochs=50)
        ends = job.trainer.strategy.all_gather(torch.tensor(job.trainer.current_epoch)).tolist()
        assert ends == [epochs, epochs]
        both = job.trainer.strategy.all_gather(weights(job.module))
        assert torch.equal(both[0], both[1])


class Refused(Full):
    """Is refused on all workers."""

    def setup(self, stage: str) -> None:
        raise ConfigurationError("no")


def check_refusal(root: Path) -> None:
    """The trainer is left as it was, and the next fit saves after an exception again."""
    saver = ModelCheckpoint(root / "refused", save_on_exception=True)
    t = trainer("horovod", enable_checkpointing=True, callbacks=[saver], max_epochs=1)
    before = list(callbacks_of(t))
    with contextlib.suppress(ConfigurationError):
        t.fit(Refused(), shard(rank(), 2, 8))
    assert callbacks_of(t) == before
    assert saver.save_on_exception
    t.fit(Full(), shard(rank(), 2, 8))
    assert callbacks_of(t) == before
    assert t.current_epoch == 1


class Normed(MLP):
    """Ends with a batch normalisation."""

    def build(self, spec: Any) -> int:
        width = super().build(spec)
        self.layers.append(nn.BatchNorm1d(width))
        return width


class Looking(ICaRL):
    """Compares the running statistics of both workers in validation, in a step, and at the end of a task."""

    looks: list[tuple[str, bool]] = []

    def look(self, when: str) -> None:
        layers: Any = self.backbone.layers
        mine, theirs = self.trainer.strategy.all_gather(layers[-1].running_mean)
        self.looks.append((when, torch.equal(mine, theirs)))

    def on_validation_epoch_end(self) -> None:
        """Look before what is shown."""
        self.look("validation")
        super().on_validation_epoch_end()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.look("step")

    def on_task_end(self, task: Any) -> None:
        """Look before exemplars are chosen."""
        self.look("task end")
        super().on_task_end(task)


def statistics() -> None:
    """They are each worker's own in training, and worker 0's as soon as they are used."""
    data = ContinualDataModule("digits", increment=5, batch_size=32, validate_on="test")
    agent = Looking(Normed([8]), data.num_classes, input_spec=data.input_spec, epochs_per_task=1)
    t = trainer("horovod", max_epochs=-1, num_sanity_val_steps=0)
    t.fit(agent, datamodule=data)
    assert ("step", False) in agent.looks, "each worker has statistics of its own in training"
    assert set(agent.looks) - {("step", False), ("step", True)} == {("validation", True), ("task end", True)}
    state = torch.cat([v.double().flatten() for v in agent.state_dict().values()])
    both = t.strategy.all_gather(state)
    assert torch.equal(both[0], both[1]), "the teachers differ"
