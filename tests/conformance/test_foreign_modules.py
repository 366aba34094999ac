"""Rehearsal in another project's training script: any module, any batch, one added line."""

from __future__ import annotations

import copy
from collections import UserDict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dcl_lightning.callbacks.rehearsal import Rehearsal
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import RehearsalConfig
from tests.conformance.rehearsal_runs import memory_state, same
from tests.conformance.small_stream import make_trainer, weights

pytestmark = pytest.mark.usefixtures("one_thread")


class Images(pl.LightningModule):
    """As people write it; its hook works in place, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        self.train_batches: list[Any] = []
        self.val_sizes: list[int] = []
        self.calls: list[tuple[str, bool, int]] = []

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.calls.append(("before", self.trainer.training, len(batch[0])))
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls.append(("after", self.trainer.training, len(batch[0])))
        batch[0].mul_(0.5)
        return batch

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.train_batches.append((x.clone(), y.clone()))
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.val_sizes.append(len(batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def images(count: int = 20) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(count) * 4 // count  # sorted: class after class
    # Each image has its own first pixel, by which it is known again.
    x = torch.randn(count, 1, 4, 4, generator=g)
    x[:, 0, 0, 0] = torch.arange(count) * 2
    return DataLoader([(image.clone(), int(label)) for image, label in zip(x, y, strict=True)], batch_size=4)


def memory(size: int = 6, r: int = 3, **kwargs: Any) -> RehearsalConfig:
    given = {"policy": "reservoir", "weighting": "none"} | kwargs
    return RehearsalConfig(buffer_size=size, num_samples=r, **given)


@pytest.mark.parametrize("execution", ["inline", "blocking"])
def test_one_line_rehearses_for_an_image_classifier(tmp_path: Path, execution: str) -> None:
    pl.seed_everything(0)
    module = Images()
    rehearsal = Rehearsal(memory(execution=execution))
    make_trainer(tmp_path, [rehearsal], max_epochs=2).fit(module, images(), images(8))
    sizes = [len(y) for _, y in module.train_batches]
    assert sizes == [4] + [7] * 9
    assert module.val_sizes == [4] * 4
    # Its own hooks run once for each batch, after the memory's, and know nothing of it.
    training = [(name, size) for name, training, size in module.calls if training]
    assert training == [pair for size in sizes for pair in (("before", 4), ("after", size))]
    assert sum(not t for _, t, _ in module.calls) == 8
    assert "on_after_batch_transfer" not in module.__dict__
    assert "on_before_batch_transfer" not in module.__dict__
    # Stored is what the loader gave; each row was halved once, in the step that it was in, with its own label.
    buffer = rehearsal.manager.buffer
    x, y = buffer.store.gather(buffer.slots_at(torch.arange(6)))
    # A row has no place in a data set: the map of places does not grow with the samples seen.
    assert (rehearsal.manager.buffer.state.ids == -1).all()
    assert (y == (x[:, 0, 0, 0] / 2).long() * 4 // 20).all()
    for inputs, labels in module.train_batches:
        numbers = inputs[:, 0, 0, 0].round().long()
        assert (labels == numbers * 4 // 20).all()
    new = torch.cat([inputs[:4, 0, 0, 0] for inputs, _ in module.train_batches])
    assert new.round().tolist() == [*range(20)] * 2
    old = [set(inputs[4:, 0, 0, 0].round().tolist()) for inputs, _ in module.train_batches]
    assert all(len(drawn) == 3 for drawn in old[1:5])
    assert set.union(*old[:5]) <= set(range(16))


@pytest.mark.parametrize("summary", [True, False])
def test_a_script_is_told_of_its_memory_where_it_is_told_of_its_network(
    summary: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[Rehearsal(memory())], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=summary,
    )  # fmt: skip
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer.fit(Images(), images())
    assert caplog.text.count("Memory: room for 6 rows") == summary


def test_blocking_is_inline_and_resumes(tmp_path: Path) -> None:
    for config in ({"policy": "reservoir"}, {"policy": "fifo"}, {"scope": "global"}):
        ends = []
        for execution in ("inline", "blocking"):
            pl.seed_everything(0)
            module = Images()
            saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
            callbacks = [Rehearsal(memory(execution=execution, **config)), saver]
            make_trainer(tmp_path, callbacks, max_epochs=2).fit(module, images())
            ends.append(weights(module))
        assert torch.equal(*ends), config
        again = Images()
        callbacks = [Rehearsal(memory(execution="blocking", **config)), ModelCheckpoint(tmp_path / "again")]
        # The loader of this script cannot go on within an epoch: from the end of one.
        trainer = make_trainer(tmp_path, callbacks, max_epochs=2)
        trainer.fit(again, images(), ckpt_path=sorted(tmp_path.glob("step=9*.ckpt"))[-1])
        assert trainer.global_step == 10
        first = again.train_batches[0]
        assert any(torch.equal(first[0][4:], x[4:]) for x, _ in module.train_batches[9:10])
        for file in tmp_path.glob("*.ckpt"):
            file.unlink()


class Text(pl.LightningModule):
    def __init__(self, own_hook: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 3)
        self.batches: list[dict[str, torch.Tensor]] = []
        self.kinds: list[type] = []
        self.own_hook = own_hook

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.own_hook:  # a new entry and another in place of an old one, within the same dict
            batch["attention_mask"] = batch["attention_mask"].bool()
            batch["length"] = batch["attention_mask"].sum(1)
        return batch

    def training_step(self, batch, batch_idx):
        self.kinds.append(type(batch))
        self.batches.append(dict(batch))
        mask = batch["attention_mask"][..., None].float()
        features = (self.embed(batch["input_ids"]) * mask).sum(1) / mask.sum(1)
        return F.cross_entropy(self.head(features), batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Encoding(UserDict):
    """What a tokenizer returns: a mapping that is no dict."""


def texts(kind: type = dict) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30, (18, 5), generator=g)
    ids[:, 0] = torch.arange(18) // 6 + 1
    mask = torch.ones(18, 5, dtype=torch.int64)
    rows = TensorDataset(ids, mask, ids[:, 0] - 1)

    def collate(items):
        columns = [torch.stack(column) for column in zip(*items, strict=True)]
        return kind(dict(zip(("input_ids", "attention_mask", "labels"), columns, strict=True)))

    return DataLoader(rows, batch_size=3, collate_fn=collate)


@pytest.mark.parametrize(("kind", "own_hook"), [(dict, False), (dict, True), (Encoding, False), (Encoding, True)])
def test_one_line_rehearses_for_a_text_model(tmp_path: Path, kind: type, own_hook: bool) -> None:
    for execution in ("inline", "blocking"):
        module = Text(own_hook)
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        rehearsal = Rehearsal(memory(5, 2, execution=execution))
        trainer = make_trainer(tmp_path, [rehearsal, saver], max_epochs=1)
        trainer.fit(module, texts(kind))
        assert [len(b["labels"]) for b in module.batches] == [3] + [5] * 5
        assert set(module.kinds) == {kind}
        for batch in module.batches:
            assert torch.equal(batch["input_ids"][:, 0] - 1, batch["labels"])
            assert batch["attention_mask"].shape == batch["input_ids"].shape
        rows = rehearsal.manager.buffer.store.gather(torch.arange(5))
        assert set(rows) == {"input_ids", "attention_mask", "labels"}
        assert rows["attention_mask"].dtype == torch.int64
        assert torch.equal(rows["input_ids"][:, 0] - 1, rows["labels"])
    # Nothing of the script's own classes is in the file.
    torch.load(tmp_path / "step=4.ckpt", weights_only=True)


def test_class_balanced_with_labels(tmp_path: Path) -> None:
    for module, loader, label, classes in ((Images(), images(), 1, 4), (Text(), texts(), "labels", 3)):
        config = RehearsalConfig(
            buffer_size=classes * 2,
            num_samples=2,
            num_candidates=2,
            policy="class_balanced",
            weighting="none",
            execution="blocking",
        )
        rehearsal = Rehearsal(config, label=label, num_classes=classes)
        make_trainer(tmp_path, [rehearsal], max_epochs=1, enable_checkpointing=False).fit(module, loader)
        assert rehearsal.manager.buffer.class_counts.tolist() == [2] * classes
        labels = rehearsal.manager.buffer.store.gather(torch.arange(2 * classes))[label]
        assert torch.equal(labels, rehearsal.manager.buffer.labels_at(torch.arange(2 * classes)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"weighting": "nil", "policy": "nil"}, "weighting='none'"),
        ({"policy": "class_balanced"}, "label="),
        ({"policy": "nil"}, "label="),
        ({"loss": "sum"}, "loss='mean'"),
        ({"update": "task_end"}, "update='step'"),
        ({"draw_from": "past"}, "draw_from='seen'"),
        ({"execution": "blocking", "prefetch": "batch"}, "device"),
    ],
)
def test_what_needs_an_agent_is_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    module = Images()
    rehearsal = Rehearsal(memory(**config))
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(tmp_path, [rehearsal], max_epochs=1).fit(module, images())
    assert not module.train_batches
    assert "on_after_batch_transfer" not in module.__dict__


@pytest.mark.parametrize("given", [{"label": 1}, {"num_classes": 4}])
def test_label_and_number_of_classes_belong_together(given: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="give both, or neither"):
        Rehearsal(memory(), **given)


def test_a_share_of_an_unknown_set_is_refused(tmp_path: Path) -> None:
    config = RehearsalConfig(rehearsal_ratio=0.5, policy="reservoir", weighting="none")
    with pytest.raises(ConfigurationError, match="buffer_size"):
        make_trainer(tmp_path, [Rehearsal(config)], max_epochs=1).fit(Images(), images())


class Pair(NamedTuple):
    tokens: list[torch.Tensor]
    name: Any


def test_a_leaf_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Module(Text):
        def training_step(self, batch, batch_idx):
            self.batches.append({"labels": batch.tokens[0]})
            return self.head(self.embed(batch.tokens[0])).sum()

    def loader(name):
        return DataLoader(range(6), batch_size=2, collate_fn=lambda items: Pair([torch.tensor(items)], name(items)))

    with pytest.raises(TypeError, match=r"'name'.*str"):
        make_trainer(tmp_path, [Rehearsal(memory())], max_epochs=1).fit(Module(), loader(str))
    with pytest.raises(ValueError, match="name"):
        make_trainer(tmp_path, [Rehearsal(memory())], max_epochs=1).fit(Module(), loader(lambda _: torch.zeros(5)))
    module = Module()
    make_trainer(tmp_path, [Rehearsal(memory())], max_epochs=1).fit(module, loader(torch.tensor))
    assert [len(b["labels"]) for b in module.batches] == [2, 4, 5]


def test_a_hook_set_on_the_instance_comes_back(tmp_path: Path) -> None:
    module = Images()
    calls: list[int] = []

    def mine(batch, dataloader_idx):
        calls.append(len(batch[0]))
        return batch

    module.on_after_batch_transfer = mine
    make_trainer(tmp_path, [Rehearsal(memory())], max_epochs=1).fit(module, images())
    assert calls == [4, 7, 7, 7, 7]
    assert module.on_after_batch_transfer is mine


def test_the_hooks_of_a_data_module_run_too(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        sizes: list[int] = []

        def train_dataloader(self):
            return images()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.sizes.append(len(batch[0]))
            return batch

    class Plain(Images):
        on_after_batch_transfer = pl.LightningModule.on_after_batch_transfer

    data, module = Data(), Plain()
    make_trainer(tmp_path, [Rehearsal(memory(execution="blocking"))], max_epochs=1).fit(module, datamodule=data)
    assert data.sizes == [len(y) for _, y in module.train_batches] == [4, 7, 7, 7, 7]
    assert "on_after_batch_transfer" not in data.__dict__


def rows_are_whole(batches: list[tuple[torch.Tensor, torch.Tensor]], count: int = 20) -> bool:
    """Whether each row has the label of the image that its first pixel names, as ``images`` made it."""
    return all((y == x[:, 0, 0, 0].div(2).round().long() * 4 // count).all() for x, y in batches)


class Whole(Images):
    """Does nothing to its batches."""

    on_before_batch_transfer = pl.LightningModule.on_before_batch_transfer
    on_after_batch_transfer = pl.LightningModule.on_after_batch_transfer


@pytest.mark.parametrize("execution", ["inline", "blocking"])
def test_two_steps_of_two_optimizers_a_batch(tmp_path: Path, execution: str) -> None:
    class Manual(Whole):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(16, 4)

        def training_step(self, batch, batch_idx):
            self.train_batches.append((batch[0].clone(), batch[1].clone()))
            for optimizer, net in zip(
                self.optimizers(), (self.net, nn.Sequential(nn.Flatten(), self.other)), strict=True
            ):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.net, self.other)]

    module, rehearsal = Manual(), Rehearsal(memory(execution=execution, seed=1))
    trainer = make_trainer(tmp_path, [rehearsal], max_epochs=2)
    trainer.fit(module, images())
    assert trainer.global_step == 20
    assert [len(y) for _, y in module.train_batches] == [4] + [7] * 9
    assert rows_are_whole(module.train_batches)
    # Each sample was offered once a batch, however many steps that took.
    assert int(rehearsal.manager.state_dict()["buffer"]["slots"]["seen"]) == 40


@pytest.mark.parametrize("config", [{}, {"execution": "blocking"}, {"execution": "blocking", "prefetch": "device"}])
def test_batches_of_changing_sizes(tmp_path: Path, config: dict[str, Any]) -> None:
    everything, sizes = list(images().dataset), [4, 2, 5, 1, 3, 5]
    cuts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    batches = [everything[first:last] for first, last in pairwise(cuts)]
    loader = DataLoader([(torch.stack([x for x, _ in b]), torch.tensor([y for _, y in b])) for b in batches], None)
    module, rehearsal = Whole(), Rehearsal(memory(**config))
    make_trainer(tmp_path, [rehearsal], max_epochs=1).fit(module, loader)
    assert [len(y) for _, y in module.train_batches] == [4, *(size + 3 for size in sizes[1:])]
    assert rows_are_whole(module.train_batches)
    new = torch.cat([x[:size, 0, 0, 0] for (x, _), size in zip(module.train_batches, sizes, strict=True)])
    assert new.tolist() == [2.0 * i for i in range(20)]


def test_a_hook_set_on_the_instance_of_a_data_module(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return images()

    sizes: list[int] = []

    def mine(batch, dataloader_idx):
        sizes.append(len(batch[0]))
        return batch

    # Lightning asks the data module's hook, though the module's class has one, too.
    data, module = Data(), Images()
    data.on_after_batch_transfer = mine
    make_trainer(tmp_path, [Rehearsal(memory())], max_epochs=1).fit(module, datamodule=data)
    assert sizes == [len(y) for _, y in module.train_batches] == [4, 7, 7, 7, 7]
    assert data.on_after_batch_transfer is mine


@pytest.mark.parametrize("loaders", [lambda: [images(), images()], lambda: {"a": images(), "b": images(8)}])
def test_several_training_loaders_are_refused(tmp_path: Path, loaders: Any) -> None:
    module = Whole()
    with pytest.raises(ConfigurationError, match="2 training loaders"):
        make_trainer(tmp_path, [Rehearsal(memory())], max_epochs=1).fit(module, loaders())
    assert not module.train_batches


def test_a_search_leaves_the_memory_of_earlier_fits(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        batch_size = 4

        def train_dataloader(self):
            return DataLoader(images().dataset, batch_size=self.batch_size)

        def val_dataloader(self):
            return images(8)

    class Rated(Whole):
        lr = 0.1

    found = []
    for search in ([], [LearningRateFinder(num_training_steps=6, update_attr=False)], [BatchSizeFinder(max_trials=2)]):
        rehearsal, module, data = Rehearsal(memory(seed=3)), Rated(), Data()
        make_trainer(tmp_path, [rehearsal], max_epochs=1).fit(module, data)
        looked: list[Any] = []

        class Looks(pl.Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx, looked=looked, rehearsal=rehearsal):
                looked.append(copy.deepcopy(memory_state(rehearsal.manager)))

        make_trainer(tmp_path, [rehearsal, *search, Looks()], max_steps=1, max_epochs=1).fit(module, data)
        found.append(looked[-1])
    assert same(found[0], found[1])
    assert same(found[0], found[2])
