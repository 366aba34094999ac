"""What users of Lightning rely on, over a stream of tasks."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning import ContinualDataModule
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import make_agent, make_data, make_trainer, matrix, weights


class Hooks(pl.Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_task_start(self, trainer, agent, task):
        self.calls.append(f"start {task.index}")

    def on_task_end(self, trainer, agent, task):
        self.calls.append(f"end {task.index}")

    def on_train_epoch_start(self, trainer, agent):
        self.calls.append("epoch")


def test_every_task_gets_its_epochs_and_hooks(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("base", data, epochs_per_task=[1, 2, 3])
    hooks = Hooks()
    make_trainer(tmp_path, [hooks]).fit(agent, datamodule=data)
    expected = []
    for task, epochs in enumerate([1, 2, 3]):
        expected += ["epoch"] * epochs
        expected.insert(len(expected) - epochs + 1, f"start {task}")
        expected.append(f"end {task}")
    # A user's callback sees its epoch start before the clock, which runs last, starts the task.
    assert hooks.calls == expected


def test_max_steps_bounds_the_whole_run(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("base", data)
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.fit(agent, datamodule=data)
    assert trainer.global_step == 4


def test_validate_and_test_leave_clock_and_memory_alone(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("icarl", data)
    trainer = make_trainer(tmp_path)
    trainer.validate(agent, datamodule=data, verbose=False)
    assert agent.clock.schedule.evaluated == 0
    trainer.fit(agent, datamodule=data)
    before = matrix(agent), dict(agent.exemplars), weights(agent)
    result = trainer.test(agent, datamodule=data, verbose=False)
    assert torch.equal(before[0].nan_to_num(-1), matrix(agent).nan_to_num(-1))
    assert before[1] == agent.exemplars
    assert torch.equal(before[2], weights(agent))
    assert result[0]["test/acc"] == pytest.approx(float(agent.clock.matrix.pooled[-1]))


def test_a_second_fit_trains_again(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("icarl", data)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    trainer = make_trainer(tmp_path)
    trainer.fit(agent, datamodule=make_data())
    assert trainer.global_step == 30
    assert agent.clock.schedule.evaluated == 3


def test_val_acc_can_be_monitored_and_each_task_saves_its_best(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val/acc", mode="max", save_top_k=1, filename="{epoch}")
    data = make_data(val_ratio=0.3)
    agent = make_agent("base", data)
    make_trainer(tmp_path, [saver]).fit(agent, datamodule=data)
    epochs = sorted(int(p.stem.split("=")[1]) for p in tmp_path.glob("epoch=*.ckpt"))
    assert [e // 2 for e in epochs] == [0, 1, 2]


def test_per_task_accuracies_are_logged_beside_val_acc(tmp_path: Path) -> None:
    data = make_data(validate_on="test")
    agent = make_agent("base", data)
    trainer = make_trainer(tmp_path)
    trainer.fit(agent, datamodule=data)
    names = {"val/acc", "val/loss", "val/acc_task_0", "val/acc_task_1", "val/acc_task_2", "train/loss", "train/acc"}
    assert names <= set(trainer.callback_metrics)


def test_validation_state_does_not_leak(tmp_path: Path) -> None:
    """A model that always says class 0 has accuracy 1/2 on task 0 and 0 on task 1, at every validation."""
    data = make_data(validate_on="test")
    agent = make_agent("base", data, epochs_per_task=1)
    agent.evaluate = lambda batch: torch.nn.functional.one_hot(batch.targets * 0, 6).float()
    seen: list[list[float]] = []

    class Spy(pl.Callback):
        def on_validation_end(self, trainer, module):
            metrics = trainer.callback_metrics
            seen.append([float(metrics[f"val/acc_task_{j}"]) for j in range(3) if f"val/acc_task_{j}" in metrics])

    trainer = make_trainer(tmp_path, [Spy()], num_sanity_val_steps=1)
    trainer.fit(agent, datamodule=data)
    assert seen[1:] == [[0.5], [0.5, 0.0], [0.5, 0.0, 0.0]]
    assert matrix(agent)[2].tolist() == [0.5, 0.0, 0.0]


def test_agents_own_callbacks_are_not_doubled(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("base", data)
    mine = type(agent.clock)(epochs_per_task=1)
    trainer = make_trainer(tmp_path, [mine])
    trainer.fit(agent, datamodule=data)
    assert agent.clock is mine
    assert trainer.current_epoch == 3


def test_load_from_checkpoint_and_predict(tmp_path: Path) -> None:
    from dcl_lightning import ICaRL
    from dcl_lightning.backbones import MLP

    saver = ModelCheckpoint(tmp_path, save_last=True)
    data = make_data()
    agent = make_agent("icarl", data)
    trainer = make_trainer(tmp_path, [saver])
    trainer.fit(agent, datamodule=data)
    again = ICaRL.load_from_checkpoint(tmp_path / "last.ckpt", backbone=MLP([8]))
    assert torch.equal(weights(again), weights(agent))
    first, second = (
        [b for part in make_trainer(tmp_path).predict(one, datamodule=data) for b in part] for one in (agent, again)
    )
    assert [b.labels for b in first] == [b.labels for b in second]
    assert all(torch.equal(a.probabilities, b.probabilities) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"class_order": [5, 4, 3, 2, 1, 0]}, ["class_order", "[0, 1, 2", "[5, 4, 3"]),
        ({"increment": [1, 2, 3]}, ["classes of the tasks"]),
        ({"val_ratio": 0.5}, ["val_ratio 0.0", "0.5"]),
    ],
)
def test_resume_with_another_stream_is_refused(tmp_path: Path, changed: dict, words: list[str]) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    data = make_data()
    make_trainer(tmp_path, [saver], max_steps=7).fit(make_agent("base", data), datamodule=data)
    other = make_data(**changed)
    with pytest.raises(ConfigurationError) as error:
        make_trainer(tmp_path).fit(make_agent("base", other), datamodule=other, ckpt_path=tmp_path / "last.ckpt")
    assert all(word in str(error.value) for word in words)


def test_resume_under_another_seed_goes_on_with_the_runs_own(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    data = make_data()
    agent = make_agent("base", data)
    make_trainer(tmp_path, [saver]).fit(agent, datamodule=data)
    other = make_data(seed=9)
    again = make_agent("base", other, seed=9)
    make_trainer(tmp_path).fit(again, datamodule=other, ckpt_path=tmp_path / "step=8.ckpt")
    assert torch.equal(weights(again), weights(agent))


def test_the_clock_evaluates_as_trainer_test_does(tmp_path: Path) -> None:
    """Normalised once and never augmented, though it happens within training."""
    options = {"num_classes": 4, "size": 8, "per_class": 20}
    data = ContinualDataModule("synthetic", increment=2, batch_size=8, augment=True, seed=0, source_options=options)
    agent = make_agent("icarl", data)
    seen: list[torch.Tensor] = []
    inner = agent.evaluate
    agent.evaluate = lambda batch: (seen.append(batch.inputs), inner(batch))[1]
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    during = seen[-1]
    result = make_trainer(tmp_path).test(agent, datamodule=data, verbose=False)
    assert torch.equal(during, seen[-1])
    assert result[0]["test/acc"] == pytest.approx(float(agent.clock.matrix.pooled[-1]))


def test_a_task_cut_off_by_a_limit_is_ended_before_the_next_one_begins(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    data = make_data()
    make_trainer(tmp_path, [saver], max_steps=8).fit(make_agent("icarl", data, epochs_per_task=1), datamodule=data)
    data = make_data()
    agent = make_agent("icarl", data, epochs_per_task=1)
    trainer = make_trainer(tmp_path)
    trainer.fit(agent, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert sorted(agent.exemplars) == list(range(6))
    assert trainer.global_step == 8 + 6, "the last task trains on the exemplars of the one before, too"


def test_double_precision_resumes_bit_for_bit(tmp_path: Path) -> None:
    """What Lightning loads before it has made the network double would be rounded to single precision."""
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    data = make_data()
    agent = make_agent("base", data)
    make_trainer(tmp_path, [saver], precision="64-true").fit(agent, datamodule=data)
    for step in (3, 18):
        again, other = make_agent("base", data, seed=5), make_data()
        trainer = make_trainer(tmp_path, precision="64-true")
        trainer.fit(again, datamodule=other, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert weights(again).dtype == torch.float64
        assert torch.equal(weights(again), weights(agent)), step
