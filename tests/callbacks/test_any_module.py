"""A stream of tasks with a LightningModule that knows nothing of this package."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from dcl_lightning import ContinualDataModule, Rehearsal, RehearsalConfig, TaskClock, TaskReport
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import ON, make_data, make_trainer


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6))
        self.seen: list[tuple[int, int, set[int]]] = []

    def forward(self, inputs):
        assert not self.training or torch.is_grad_enabled()
        return self.network(inputs)

    def training_step(self, batch, batch_idx):
        new = set(batch.targets[: batch.num_new].tolist())
        self.seen.append((self.current_epoch, len(batch.targets) - batch.num_new, new))
        return F.cross_entropy(self(batch.inputs), batch.targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Validated(Plain):
    """Logs over all tasks: what a step logs has another name with a second loader."""

    def on_validation_epoch_start(self):
        self.losses = []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.losses.append(F.cross_entropy(self(batch.inputs), batch.targets, reduction="none"))

    def on_validation_epoch_end(self):
        self.validated = [*getattr(self, "validated", []), len(torch.cat(self.losses))]
        self.log("loss", torch.cat(self.losses).mean())


class OneLoader(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch.inputs), batch.targets))


class Two(Plain):
    def forward(self, inputs):
        return self.network(inputs), inputs


class Evaluates(Two):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch.inputs)[0], batch.targets)

    def evaluate(self, batch):
        return F.one_hot(batch.targets * 0, 6).float()


def trainer(folder: Path, *callbacks: pl.Callback, **kwargs) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, **(ON | {"num_sanity_val_steps": 0} | kwargs),
    )  # fmt: skip


@pytest.mark.parametrize("kind", [Plain, Validated])
def test_the_stream_runs_task_by_task(tmp_path: Path, kind: type) -> None:
    clock, module, data = TaskClock(epochs_per_task=[1, 2, 3]), kind(), make_data(validate_on="test")
    trainer(tmp_path, clock, TaskReport(pictures=False)).fit(module, datamodule=data)
    epochs = {epoch: new for epoch, _, new in module.seen}
    assert epochs == {0: {0, 1}, 1: {2, 3}, 2: {2, 3}, 3: {4, 5}, 4: {4, 5}, 5: {4, 5}}
    assert len(module.seen) == 6 * 3
    module.eval()
    right = (module(data.test_inputs).argmax(1) == data.test_targets).double()
    by_hand = [right[(data.test_targets // 2) == task].mean() for task in range(3)]
    assert clock.matrix.compute()[2].tolist() == pytest.approx(torch.stack(by_hand).tolist())
    assert (tmp_path / "report" / "accuracy_matrix.json").exists()


@pytest.mark.parametrize("draw_from", ["seen", "past"])
def test_a_memory_beside_the_clock(tmp_path: Path, draw_from: str) -> None:
    config = RehearsalConfig(buffer_size=12, num_samples=4, policy="reservoir", weighting="none", draw_from=draw_from)
    memory, module = Rehearsal(config), Plain()
    trainer(tmp_path, TaskClock(2), memory).fit(module, datamodule=make_data())
    assert memory.manager is not None
    assert len(memory.manager.buffer) == 12
    rehearsed = [sum(r for epoch, r, _ in module.seen if epoch // 2 == task) for task in range(3)]
    assert (rehearsed[0] > 0) == (draw_from == "seen")
    assert rehearsed[2] > 0


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        ({"policy": "nil", "weighting": "nil"}, "weighting='none'"),
        ({"policy": "reservoir", "weighting": "none", "loss": "sum"}, "loss='mean'"),
    ],
)
def test_a_memory_whose_weights_the_loss_must_know_is_refused(tmp_path: Path, config: dict, remedy: str) -> None:
    module, memory = Plain(), Rehearsal(RehearsalConfig(buffer_size=12, **config))
    with pytest.raises(ConfigurationError, match=remedy):
        trainer(tmp_path, TaskClock(), memory).fit(module, datamodule=make_data())
    assert module.seen == []
    module.weighs_rows = True  # it says that its loss does
    trainer(tmp_path, TaskClock(), memory).fit(module, datamodule=make_data())
    assert sum(rehearsed for _, rehearsed, _ in module.seen)


@pytest.mark.parametrize("execution", ["inline", "blocking"])
@pytest.mark.parametrize("config", [{}, {"row_format": "index"}, {"update": "task_end", "draw_from": "past"}])
def test_every_rehearsed_row_is_one_of_the_data_sets(tmp_path: Path, config: dict, execution: str) -> None:
    count = 42
    targets = torch.arange(count) // 7
    inputs = torch.zeros(count, 1, 4, 4)
    inputs[:, 0, 0, 0] = torch.arange(count)  # an input says which sample it is
    rehearsed = []

    class Looks(Plain):
        def training_step(self, batch, batch_idx):
            ids = batch.inputs[:, 0, 0, 0].round().long()
            assert torch.equal(ids, batch.sample_ids)
            assert torch.equal(targets[ids], batch.targets)
            assert torch.equal(targets[ids] // 2, batch.task_ids)
            rehearsed.append((self.current_epoch // 2, set(batch.task_ids[batch.num_new :].tolist())))
            return super().training_step(batch, batch_idx) * 0  # ids are large for a network

    options = {"buffer_size": 12, "num_samples": 4, "policy": "reservoir", "weighting": "none", "execution": execution}
    data = ContinualDataModule((inputs, targets, inputs, targets), increment=2, batch_size=5, seed=0)
    memory = Rehearsal(RehearsalConfig(**options | config))
    trainer(tmp_path, TaskClock(2), memory).fit(Looks(), datamodule=data)
    allowed = {task: set(range(task + ("update" not in config))) for task in range(3)}
    assert all(tasks <= allowed[task] for task, tasks in rehearsed)
    assert set().union(*(tasks for task, tasks in rehearsed if task == 2)) >= {0, 1}


def test_early_stopping_and_resume(tmp_path: Path) -> None:
    def run(**kwargs):
        pl.seed_everything(0)
        stopper = EarlyStopping("loss", stopping_threshold=100.0)
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        clock, module = TaskClock(5), Validated()
        trainer(tmp_path, clock, stopper, saver).fit(module, datamodule=make_data(select_on_test=True), **kwargs)
        return clock, module

    clock, module = run()
    assert len(module.seen) == 3 * 3
    assert module.validated == [14, 28, 42]
    for step, validated in ((3, [14, 28, 42]), (4, [28, 42]), (6, [28, 42])):  # 3 and 6: a task's last
        again_clock, again = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again.validated == validated, step
        assert torch.equal(again.network[1].weight, module.network[1].weight)
        assert torch.equal(again_clock.matrix.compute().nan_to_num(-1), clock.matrix.compute().nan_to_num(-1))


def test_an_evaluate_of_ones_own_is_asked(tmp_path: Path) -> None:
    clock = TaskClock()
    trainer(tmp_path, clock).fit(Evaluates(), datamodule=make_data())
    assert clock.matrix.compute()[2].tolist() == [0.5, 0.0, 0.0]


def test_without_scores_there_is_no_matrix_and_a_line_says_why(tmp_path: Path) -> None:
    class NoScores(Evaluates):
        evaluate = None

    clock = TaskClock()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path, clock, TaskReport(pictures=False)).fit(NoScores(), datamodule=make_data())
    lines = [str(w.message) for w in told if "no accuracy matrix" in str(w.message)]
    assert len(lines) == 1
    assert "NoScores has no evaluate(batch), and its forward(inputs) gives a tuple for 2 samples" in lines[0]
    assert not clock.evaluates
    assert not (tmp_path / "report").exists()


def test_without_a_clock_several_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"callbacks=\[TaskClock\(epochs_per_task=...\)\]"):
        trainer(tmp_path, max_epochs=1).fit(Plain(), datamodule=make_data())


@pytest.mark.parametrize(
    "callbacks", [[], [Rehearsal(RehearsalConfig(buffer_size=12, policy="reservoir", weighting="none"))]]
)
def test_one_task_needs_no_clock(tmp_path: Path, callbacks: list) -> None:
    module = Plain()
    trainer(tmp_path, *callbacks, max_epochs=2).fit(module, datamodule=make_data(scenario="none"))
    assert {y for _, _, new in module.seen for y in new} == set(range(6))


def test_a_validation_step_for_one_loader_is_refused_before_training(tmp_path: Path) -> None:
    module = OneLoader()
    with pytest.raises(ConfigurationError, match="dataloader_idx=0"):
        trainer(tmp_path, TaskClock()).fit(module, datamodule=make_data(validate_on="test"))
    assert module.seen == []
    trainer(tmp_path, TaskClock(), limit_val_batches=0).fit(module, datamodule=make_data(validate_on="test"))


class Theirs(pl.LightningModule):
    """A module that knows nothing of this package, with hooks and hyperparameters of its own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(width, 3)
        self.calls: list[str] = []

    def on_train_start(self) -> None:
        self.calls.append("start")

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        self.calls.append("batch")

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.calls.append("validation")

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_hooks_of_a_users_module_are_called_once_and_evaluation_leaves_the_memory_alone(
    tmp_path: Path,
) -> None:
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6)
    memory = Rehearsal(RehearsalConfig(buffer_size=8, policy="reservoir", weighting="none", num_samples=2))
    module = Theirs()
    trainer = make_trainer(tmp_path, [memory], max_epochs=2, enable_checkpointing=False)
    trainer.validate(module, loader, verbose=False)
    assert memory.manager is None
    trainer.fit(module, loader)
    assert module.calls == ["validation"] * 4 + ["start"] + ["batch"] * 8
    before = len(memory.manager.buffer), memory.manager.buffer.state.offers
    trainer.test(module, loader, verbose=False)
    assert (len(memory.manager.buffer), memory.manager.buffer.state.offers) == before == (8, 8)
    assert dict(module.hparams) == {"width": 4}
