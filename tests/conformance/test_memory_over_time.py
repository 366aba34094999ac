"""What a memory keeps, loses and gives back over batches, epochs, tasks, fits and resumes.

A sample's input says which sample it is, so that each rehearsed row is compared with the data set.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dcl_lightning import ContinualDataModule, Rehearsal, RehearsalConfig
from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.memory.manager import MemoryManager
from tests.conformance.agents import make
from tests.conformance.rehearsal_runs import make_nil, watch
from tests.conformance.small_stream import make_data, make_trainer, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def numbered(count: int = 60, num_classes: int = 6, **kwargs: Any) -> ContinualDataModule:
    """Float inputs, each pixel the sample's number."""
    x = torch.arange(count, dtype=torch.float32)[:, None].repeat(1, 16)
    y = torch.arange(count) % num_classes
    return ContinualDataModule((x, y, x[:12], y[:12]), **{"increment": 2, "batch_size": 5, "seed": 0} | kwargs)


def wrong_rows(inputs: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, num_classes: int = 6) -> int:
    """How many rows are not the data set's own: input, label and number have to be one sample's."""
    numbers = inputs.flatten(1)[:, 0]
    return int(((numbers != ids.float()) | (targets != ids % num_classes)).sum())


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the memory's work lag behind the step, now and then."""
    advance, turns = MemoryManager.advance, iter(range(10**6))

    def slow(self, *args, **kwargs):
        if next(turns) % 3 == 1:
            time.sleep(0.01)
        return advance(self, *args, **kwargs)

    monkeypatch.setattr(MemoryManager, "advance", slow)


class WritesIntoItsBatch(nn.Module):
    """A network whose first layer works in place, as many do."""

    feature_dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, inputs):
        return self.layer(inputs.mul_(0).flatten(1))


# -- one batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"execution": "nonblocking", "prefetch": "device"},
        {"execution": "nonblocking", "prefetch": "batch"},
        {"execution": "nonblocking"},
        {"execution": "blocking", "prefetch": "device"},
        {"execution": "blocking", "row_format": "augmented"},
        {"draw_from": "past"},
    ],
)
def test_batches_hold_the_data_sets_rows_whoever_writes_into_them(config, tmp_path: Path, monkeypatch) -> None:
    slow_down(monkeypatch)
    data = numbered()
    agent = make_nil(data, **{"buffer_size": 30, "num_samples": 6} | config)
    agent.backbone = WritesIntoItsBatch()
    agent.head = nn.Linear(16, 6)
    wrong, kept = [], []
    inner = agent.training_loss

    def spy(batch):
        wrong.append(wrong_rows(batch.inputs, batch.targets, batch.sample_ids))
        kept.append((batch, batch._replace(inputs=batch.inputs * 0)))
        return inner(batch)

    agent.training_loss = spy
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    assert not any(wrong)
    assert sum(len(batch.targets) - batch.num_new for batch, _ in kept) > 20
    # A batch that somebody keeps stays as it was when the step ended.
    assert all(torch.equal(batch.inputs, then.inputs) for batch, then in kept)
    store = agent.rehearsal.manager.buffer
    rows = store.store.gather(store.slots_at(torch.arange(len(store))))
    assert not wrong_rows(rows["inputs"], rows["targets"], rows["sample_ids"])


def test_a_step_that_is_left_out_stores_no_columns_of_another(tmp_path: Path) -> None:
    data = make_data()
    agent = make("der", data)
    inner, logits = agent.training_step, {}

    def step(batch, batch_idx):
        if batch_idx % 2:
            return None
        loss = inner(batch, batch_idx)
        for sample, row in zip(batch.sample_ids[: batch.num_new].tolist(), agent._logits, strict=True):
            logits.setdefault(sample, []).append(row.clone())
        return loss

    agent.training_step = step
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    buffer = agent.rehearsal.manager.buffer
    rows = buffer.store.gather(buffer.slots_at(torch.arange(len(buffer))))
    assert len(buffer) > 4
    for sample, row in zip(rows["sample_ids"].tolist(), rows["logits"], strict=True):
        assert any(torch.equal(row, once) for once in logits[sample])


# -- epochs and tasks that end early ---------------------------------------------------------------


class FirstBatches(pl.Callback):
    """The tasks whose samples are rehearsed in the first batch of each epoch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            rehearsed = sorted(set(batch.task_ids[batch.num_new :].tolist()))
            self.seen.append((module.clock.task_at(trainer.current_epoch), rehearsed))


@pytest.mark.parametrize("update", ["step", "task_end"])
def test_a_task_that_ends_amid_an_epoch_leaves_nothing_pending(update: str, tmp_path: Path, monkeypatch) -> None:
    slow_down(monkeypatch)
    found = []
    for execution in ("inline", "blocking"):
        data = numbered(val_ratio=0.2, batch_size=4)
        agent = make_nil(
            data, execution=execution, update=update, draw_from="past", policy="class_balanced", weighting="none",
            buffer_size=30, num_samples=30, agent={"epochs_per_task": 3},
        )  # fmt: skip
        stopper = EarlyStopping("val/acc", patience=1, mode="min")
        first, losses = FirstBatches(), watch(agent)
        make_trainer(tmp_path, [stopper, first], val_check_interval=0.5, enable_checkpointing=False).fit(
            agent, datamodule=data
        )
        # A task stopped amid its epoch, and the first batch of the next one rehearses all the tasks before.
        assert agent.clock.schedule.boundaries != [0, 3, 6, 9]
        assert all(rehearsed == list(range(task)) for task, rehearsed in first.seen), first.seen
        found.append((torch.stack(losses), weights(agent)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", ["derpp_task_end", "agem", "bic"])
@pytest.mark.parametrize("cut", [10, 11])  # within a task, in its last epoch
def test_a_task_that_a_limit_cut_off_ends_with_its_memory_at_resume(name: str, cut: int, tmp_path: Path) -> None:
    def run(ckpt=None, **options):
        data = numbered()
        agent = make(name, data, memory={"num_candidates": 5} if name != "derpp_task_end" else {}, epochs_per_task=1)
        first = FirstBatches()
        saver = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
        trainer = make_trainer(tmp_path, [saver, first], limit_val_batches=0, **options)
        trainer.fit(agent, datamodule=data, ckpt_path=ckpt)
        return agent, first

    # Four batches a task: the second task is cut off after two or three.
    run(max_steps=cut - 4)
    agent, first = run(tmp_path / "last.ckpt")
    assert first.seen[-1][0] == 2
    assert set(first.seen[-1][1]) == {0, 1}
    assert agent.clock.schedule.evaluated == 3
    assert torch.isfinite(agent.clock.matrix.compute()[2]).all()


# -- several fits ----------------------------------------------------------------------------------


class Classifier(pl.LightningModule):
    """As people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 6)
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.batches.append((x.clone(), y.clone()))
        return F.cross_entropy(self.net(x / 60), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def of_class(y: int, **kwargs: Any) -> DataLoader:
    numbers = torch.arange(60)[torch.arange(60) % 6 == y]
    return DataLoader(TensorDataset(numbers.float()[:, None].repeat(1, 16), numbers % 6), batch_size=5, **kwargs)


def remembering(**kwargs: Any) -> Rehearsal:
    config = {"buffer_size": 12, "num_samples": 4, "num_candidates": 5, "policy": "class_balanced", "quota": "adaptive"}
    return Rehearsal(RehearsalConfig(**config | {"weighting": "none"} | kwargs), label=1, num_classes=6)


def fit_of(memory: Rehearsal, module: Classifier, loader: DataLoader, folder: Path, **kwargs: Any) -> None:
    make_trainer(folder, [memory], max_epochs=1, enable_checkpointing=False, **kwargs).fit(module, loader)


@pytest.mark.parametrize("execution", ["inline", "blocking", "nonblocking"])
def test_one_fit_a_task_rehearses_the_tasks_before(execution: str, tmp_path: Path) -> None:
    memory, module = remembering(execution=execution), Classifier()
    draws = []
    for y in range(3):
        module.batches.clear()
        fit_of(memory, module, of_class(y), tmp_path)
        labels = torch.cat([labels[5:] for _, labels in module.batches])
        assert set(labels.tolist()) <= set(range(y + 1))
        if execution != "nonblocking":  # which waits for no draw
            assert y == 0 or set(range(y)) <= set(labels.tolist())
        for inputs, targets in module.batches:
            assert not wrong_rows(inputs, targets, inputs[:, 0].long())
        draws.append(memory.manager.steps)
    assert memory.manager.buffer.class_counts.tolist() == [4, 4, 4, 0, 0, 0]
    assert draws == sorted(set(draws))  # the stream of draws goes on
    memory.clear()
    module.batches.clear()
    fit_of(memory, module, of_class(5), tmp_path)
    assert set(torch.cat([labels for _, labels in module.batches]).tolist()) == {5}


def test_another_fit_with_another_memory_or_other_rows_is_refused(tmp_path: Path) -> None:
    memory, module = remembering(), Classifier()
    fit_of(memory, module, of_class(0), tmp_path)
    memory.config = RehearsalConfig(
        **vars(memory.config) | {"policy": "fifo", "execution": "blocking"}
    )  # what is stored differs, and who works
    with pytest.raises(ConfigurationError, match=r"policy=fifo: the memory was filled with class_balanced"):
        fit_of(memory, module, of_class(1), tmp_path)
    memory.config = RehearsalConfig(**vars(memory.config) | {"policy": "class_balanced"})
    fit_of(memory, module, of_class(1), tmp_path)
    assert memory.manager.buffer.class_counts[:2].tolist() == [6, 6]
    longer = DataLoader(TensorDataset(torch.zeros(10, 17), torch.zeros(10).long()), batch_size=5)
    with pytest.raises(DataError, match=r"column '0' has rows of \[17\] .* earlier rows have \[16\]"):
        fit_of(memory, Classifier(), longer, tmp_path)


def test_a_checkpoint_of_a_later_fit_has_all_that_is_stored(tmp_path: Path) -> None:
    def run(memory, module, y, **kwargs):
        saver = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(tmp_path, [memory, saver], max_epochs=1)
        trainer.fit(module, of_class(y), **kwargs)
        return [inputs[5:, 0] for inputs, _ in module.batches], memory.manager.buffer.class_counts

    pl.seed_everything(0)
    memory, module = remembering(execution="blocking"), Classifier()
    run(memory, module, 0)
    module.batches.clear()
    whole = run(memory, module, 1)
    pl.seed_everything(1)
    resumed = run(remembering(), Classifier(), 1, ckpt_path=tmp_path / "steps" / "step=1-v1.ckpt")
    assert torch.equal(resumed[0][0], whole[0][1])
    assert torch.equal(resumed[1], whole[1])


# -- refused ---------------------------------------------------------------------------------------


def test_a_module_that_fetches_its_batches_itself_is_refused(tmp_path: Path) -> None:
    class Fetches(Classifier):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(ConfigurationError, match=r"Fetches\.training_step\(dataloader_iter\)"):
        fit_of(remembering(), Fetches(), of_class(0), tmp_path)


def test_a_module_that_moves_its_batches_past_the_hooks_is_refused(tmp_path: Path) -> None:
    class Moves(Classifier):
        def _apply_batch_transfer_handler(self, batch, device=None, dataloader_idx=0):
            return batch

    with pytest.raises(ConfigurationError, match="came past on_after_batch_transfer"):
        fit_of(remembering(), Moves(), of_class(0), tmp_path)


def test_samples_of_several_lengths_are_refused_by_name(tmp_path: Path) -> None:
    def pad(samples):
        return {"tokens": nn.utils.rnn.pad_sequence(samples, batch_first=True)}

    class Text(Classifier):
        def training_step(self, batch, batch_idx):
            return self.net.weight.sum()

    texts = [torch.arange(length) for length in (3, 3, 4, 4)]
    memory = Rehearsal(RehearsalConfig(buffer_size=4, policy="reservoir", weighting="none"))
    with pytest.raises(DataError, match=r"column 'tokens' has rows of \[4\] .*\[3\].*pad"):
        fit_of(memory, Text(), DataLoader(texts, batch_size=2, collate_fn=pad), tmp_path)
