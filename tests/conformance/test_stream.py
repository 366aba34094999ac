"""One fit over a stream: hooks, resume, early stopping, fast_dev_run, repetition."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import MemorySize
from tests.conformance.agents import make
from tests.conformance.small_stream import make_agent, make_data, make_trainer, matrix, weights


@pytest.mark.parametrize(
    ("kind", "options"),
    [("base", {}), ("icarl", {}), ("icarl", {"exemplars": "per_step", "num_samples": 2, "execution": "blocking"})],
)
def test_every_step_resumes_to_the_same_end(tmp_path: Path, kind: str, options: dict) -> None:
    saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    data = make_data()
    agent = make_agent(kind, data, milestones=[1], **options)
    trainer = make_trainer(tmp_path, [saver])
    trainer.fit(agent, datamodule=data)
    assert agent.clock.schedule.evaluated == 3
    assert torch.isfinite(matrix(agent).diagonal()).all()
    last = trainer.global_step
    for step in range(1, last):
        data2 = make_data()
        again = make_agent(kind, data2, seed=5, milestones=[1], **options)
        trainer2 = make_trainer(tmp_path / "again")
        trainer2.fit(again, datamodule=data2, ckpt_path=tmp_path / "steps" / f"step={step}.ckpt")
        assert trainer2.global_step == last
        assert torch.equal(weights(again), weights(agent)), f"weights differ after resume from step {step}"
        assert torch.equal(matrix(again).nan_to_num(-1), matrix(agent).nan_to_num(-1)), step


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_ends_tasks_not_the_stream(tmp_path: Path, first: bool) -> None:
    stop = EarlyStopping("constant", patience=1)
    saver = ModelCheckpoint(tmp_path)
    data = make_data(validate_on="test")
    agent = make_agent("base", data, epochs_per_task=10)
    epochs: list[int] = []

    class Spy(pl.Callback):
        def on_validation_epoch_end(self, trainer, module):
            module.log("constant", torch.tensor(1.0))

        def on_train_epoch_start(self, trainer, module):
            epochs.append(agent.clock.task_at(trainer.current_epoch))

    callbacks = [stop, saver, Spy()] if first else [Spy(), saver, stop]
    make_trainer(tmp_path, callbacks).fit(agent, datamodule=data)
    assert epochs == [0, 0, 1, 1, 2, 2]
    assert agent.clock.schedule.evaluated == 3


def test_every_step_of_a_stream_with_early_stopping_resumes(tmp_path: Path) -> None:
    class Constant(pl.Callback):
        def on_validation_epoch_end(self, trainer, module):
            module.log("constant", torch.tensor(1.0))

    def callbacks():
        return [EarlyStopping("constant", patience=1), Constant()]

    saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    boundary = ModelCheckpoint(tmp_path / "epochs", save_top_k=-1, filename="{epoch}")
    data = make_data(validate_on="test")
    agent = make_agent("icarl", data, epochs_per_task=5)
    trainer = make_trainer(tmp_path, [*callbacks(), saver, boundary])
    trainer.fit(agent, datamodule=data)
    assert trainer.current_epoch == 6
    for path in [*sorted((tmp_path / "steps").glob("*.ckpt"))[::3], *sorted((tmp_path / "epochs").glob("*.ckpt"))]:
        data2 = make_data(validate_on="test")
        again = make_agent("icarl", data2, seed=5, epochs_per_task=5)
        trainer2 = make_trainer(tmp_path / "again", callbacks(), enable_checkpointing=False)
        trainer2.fit(again, datamodule=data2, ckpt_path=path)
        assert trainer2.current_epoch == 6, path
        assert torch.equal(weights(again), weights(agent)), path
        assert torch.equal(matrix(again).nan_to_num(-1), matrix(agent).nan_to_num(-1)), path


class Stop(pl.Callback):
    """Asks for the fit's end before it begins, as a ``Timer`` whose time is over, and saves at that end."""

    def __init__(self, path, stops):
        self.path, self.stops = path, stops

    def on_fit_start(self, trainer, module):
        trainer.should_stop |= self.stops

    def on_train_end(self, trainer, module):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("limit", ["steps", "time"])
@pytest.mark.parametrize("kind", ["base", "icarl", "derpp_task_end"])
def test_a_task_ends_in_a_resumed_fit_that_has_no_step_left(tmp_path: Path, kind: str, limit: str) -> None:
    """The checkpoint of a task's last step, from before the end of the task: 3 steps an epoch, 2 epochs a task."""

    def fit(callbacks, ckpt=None, **trainer):
        agent = make(kind, data := make_data(), epochs_per_task=2)
        made = make_trainer(tmp_path, callbacks, **trainer)
        made.fit(agent, datamodule=data, ckpt_path=ckpt)
        return agent, made

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    stopped, _ = fit([saver], max_steps=6)
    ended, trainer = fit([Stop(tmp_path / "ended.ckpt", limit == "time")], tmp_path / "step=6.ckpt", max_steps=6)
    assert trainer.global_step == 6
    assert trainer.max_steps == 6
    assert torch.equal(matrix(ended).nan_to_num(-1), matrix(stopped).nan_to_num(-1))
    assert not matrix(ended)[0, 0].isnan()
    assert torch.equal(weights(ended), weights(stopped))
    (whole, _), (on, _) = fit([]), fit([], tmp_path / "ended.ckpt")
    assert torch.equal(matrix(on).nan_to_num(-1), matrix(whole).nan_to_num(-1))
    assert torch.equal(weights(on), weights(whole))


def test_fast_dev_run_crosses_a_boundary(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("icarl", data)
    trainer = make_trainer(tmp_path, fast_dev_run=1)
    trainer.fit(agent, datamodule=data)
    assert trainer.global_step == 2
    assert agent.clock.schedule.evaluated == 2


@pytest.mark.parametrize("kind", ["base", "icarl"])
def test_same_seed_same_result(tmp_path: Path, kind: str) -> None:
    ends = []
    for seed in (0, 0, 1):
        data = make_data(seed=seed)
        agent = make_agent(kind, data, seed=seed)
        make_trainer(tmp_path).fit(agent, datamodule=data)
        ends.append(weights(agent))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_old_classes_are_trained_on_with_icarl_only(tmp_path: Path) -> None:
    for kind in ("base", "icarl"):
        data = make_data()
        agent = make_agent(kind, data)
        seen: dict[int, set[int]] = {}
        inner = agent.training_loss

        def spy(batch, inner=inner, seen=seen, agent=agent):
            task = agent.clock.task_at(agent.trainer.current_epoch)
            seen.setdefault(task, set()).update(batch.targets.tolist())
            return inner(batch)

        agent.training_loss = spy
        make_trainer(tmp_path).fit(agent, datamodule=data)
        assert seen[0] == {0, 1}
        assert seen[2] == (set(range(6)) if kind == "icarl" else {4, 5})


def test_icarl_memory_is_within_budget_and_balanced(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("icarl", data)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    assert {y: len(ids) for y, ids in agent.exemplars.items()} == dict.fromkeys(range(6), 2)


def test_icarl_predicts_only_classes_seen(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("icarl", data)

    class Stop(pl.Callback):
        def on_task_evaluated(self, trainer, agent, task):
            trainer.should_stop = True

    trainer = make_trainer(tmp_path, [Stop()])
    trainer.fit(agent, datamodule=data)
    predicted = [label for task in trainer.predict(agent, datamodule=data) for batch in task for label in batch.labels]
    assert len(predicted) == 42
    assert set(predicted) <= {0, 1}


def test_momentum_and_rate_start_anew_with_each_task(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("base", data, milestones=[1])
    rates: list[float] = []
    plain: list[bool] = []  # of each epoch's first step: whether it is that of descent without momentum

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.rate, self.before = trainer.optimizers[0].param_groups[0]["lr"], weights(module)

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.gradient = torch.cat([p.grad.cpu().flatten() for p in module.parameters()])

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 0:
                rates.append(self.rate)
                plain.append(torch.allclose(weights(module), self.before - self.rate * self.gradient, atol=1e-7))

    make_trainer(tmp_path, [Spy()]).fit(agent, datamodule=data)
    assert rates == pytest.approx([0.05, 0.005] * 3)
    assert plain == [True, False] * 3


@pytest.mark.parametrize("reset", [True, False])
def test_momentum_is_kept_over_tasks_where_optimizer_reset_is_off(reset: bool, tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("base", data, milestones=[1], optimizer_reset=reset)
    empty: list[bool] = []
    rates: list[float] = []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.current_epoch % 2 == 0 and batch_idx == 0:
                empty.append(not trainer.optimizers[0].state)
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    # After the clock's own hook, which starts the task.
    trainer = make_trainer(tmp_path)
    agent.configure_callbacks = lambda: [agent.clock, agent.report, Spy()]
    trainer.fit(agent, datamodule=data)
    assert empty == ([True] * 3 if reset else [True, False, False])
    assert rates[0] == 0.05
    assert (rates[1] == 0.05) is reset


def test_scratch_starts_each_task_from_the_same_weights(tmp_path: Path) -> None:
    data = make_data(concatenate_tasksets=True)
    agent = make_agent("base", data, reset_state_dict=True)
    starts: list[torch.Tensor] = []
    inner = agent.training_loss

    def spy(batch):
        if agent.trainer.fit_loop.batch_idx == 0:
            starts.append(weights(agent).clone())
        return inner(batch)

    agent.training_loss = spy
    make_trainer(tmp_path).fit(agent, datamodule=data)
    first, second = starts[0::2], starts[1::2]  # two epochs a task
    assert len(first) == len(second) == 3
    assert all(torch.equal(start, first[0]) for start in first)
    assert not any(torch.equal(start, first[0]) for start in second)


def test_max_epochs_is_refused_with_the_remedy(tmp_path: Path) -> None:
    data = make_data()
    with pytest.raises(ConfigurationError, match="epochs_per_task"):
        make_trainer(tmp_path, max_epochs=7).fit(make_agent("base", data), datamodule=data)


def test_selection_on_test_data_is_refused(tmp_path: Path) -> None:
    data = make_data()
    stop = EarlyStopping("val/acc", mode="max")
    with pytest.raises(ConfigurationError, match="val_ratio"):
        make_trainer(tmp_path, [stop]).fit(make_agent("base", data), datamodule=data)


def test_memory_smaller_than_the_classes_is_refused(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("icarl", data)
    agent.rehearsal = MemorySize(buffer_size=5)
    with pytest.raises(ConfigurationError, match="6 classes"):
        make_trainer(tmp_path).fit(agent, datamodule=data)
