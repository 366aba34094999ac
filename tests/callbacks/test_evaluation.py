"""Evaluation outside Lightning's loops: equal to Lightning's own, within its limits, without side effects."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from torch import nn
from torch.nn import functional as F

from dcl_lightning import FineTuning
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import make_data, make_trainer, matrix, weights

# Each runs the network at the end of a task in its own way.
RUNNING = ["base", "icarl", "bic", "ewc", "derpp_task_end"]


def make(name, data, backbone=None, **kwargs):
    pl.seed_everything(0)
    if name == "icarl":
        kwargs["rehearsal"] = {"buffer_size": 12}
    elif name not in ("base", "ewc"):
        kwargs["rehearsal"] = {"buffer_size": 12, "num_samples": 4}
    common = {"epochs_per_task": 1, "lr": 0.05, "input_spec": data.input_spec} | kwargs
    return getattr(short_names, name)(backbone or MLP([8]), data.num_classes, **common)


class Frozen(nn.Module):
    """Batch normalisation and dropout, frozen by their owner two levels down, and again not frozen."""

    feature_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(16, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5)).eval())
        self.free = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, inputs):
        return self.free(self.frozen(inputs.flatten(1)))


class Modes(pl.Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append({name: part.training for name, part in pl_module.named_modules()})


@pytest.mark.parametrize("name", RUNNING)
def test_each_part_keeps_its_mode_over_the_ends_of_tasks(tmp_path: Path, name: str) -> None:
    data = make_data(batch_size=6)  # with exemplars, too, no batch has one sample
    agent, modes = make(name, data, Frozen()), Modes()
    before = {name: part.training for name, part in agent.named_modules()}
    make_trainer(tmp_path, [modes], enable_checkpointing=False).fit(agent, datamodule=data)
    assert len(modes.seen) >= 9
    assert all(seen == before for seen in modes.seen)
    assert int(agent.backbone.frozen[1][0].num_batches_tracked) == 0
    assert int(agent.backbone.free[0].num_batches_tracked) == len(modes.seen)


def test_modes_and_gradients_are_as_before_after_an_exception(tmp_path: Path) -> None:
    class Failing(FineTuning):
        def evaluate(self, batch):
            assert not self.backbone.free.training
            raise ValueError("no such luck")

    data = make_data()
    agent = Failing(Frozen(), data.num_classes, epochs_per_task=1)
    before = {name: part.training for name, part in agent.named_modules()}
    with pytest.raises(ValueError, match="no such luck"):
        make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    assert {name: part.training for name, part in agent.named_modules()} == before
    assert torch.is_grad_enabled()


def test_a_mode_of_the_users_own_in_evaluation_is_used(tmp_path: Path) -> None:
    class Sampling(FineTuning):
        """Keeps dropout on while it is tested."""

        def on_test_model_eval(self):
            self.eval()
            self.backbone.free[1].train()

        def evaluate(self, batch):
            dropping.append(self.backbone.free[1].training)
            return super().evaluate(batch)

    dropping: list[bool] = []
    data = make_data()
    make_trainer(tmp_path, limit_val_batches=0).fit(Sampling(Frozen(), data.num_classes), datamodule=data)
    assert dropping
    assert all(dropping)


class Rounding(FineTuning):
    """Right in bfloat16, where 1 + 1/512 is 1, and wrong in float32."""

    def evaluate(self, batch):
        ones = torch.ones(len(batch.targets), 1)
        rest = F.linear(ones, torch.full((1, 1), 1 + 2**-9)).float() - 1
        right = F.one_hot(batch.targets, self.num_classes)
        return right - 2 * right * (rest > 0)


@pytest.mark.parametrize(("precision", "right"), [("bf16-mixed", 1.0), ("32-true", 0.0)])
def test_the_matrix_is_of_the_precision_that_is_trained_in(tmp_path: Path, precision: str, right: float) -> None:
    data = make_data(validate_on="test")
    agent = Rounding(MLP([8]), data.num_classes, data.input_spec, future_tasks=True)
    trainer = make_trainer(tmp_path, precision=precision)
    trainer.fit(agent, datamodule=data)
    assert torch.equal(matrix(agent), torch.full((3, 3), right, dtype=torch.float64))
    assert torch.equal(agent.results.baseline, torch.full((3,), right, dtype=torch.float64))
    # As in Lightning's own two loops.
    assert float(trainer.callback_metrics["val/acc"]) == right
    assert trainer.test(agent, datamodule=data, verbose=False)[0]["test/acc"] == right


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_all_that_runs_at_the_end_of_a_task_is_in_the_trainers_precision(
    tmp_path: Path, name: str, precision: str, dtype: torch.dtype
) -> None:
    data = make_data()
    agent = make(name, data)
    seen = []

    def look(layer, inputs, output):
        seen.append((layer.training, output.dtype))

    next(part for part in agent.backbone.modules() if isinstance(part, nn.Linear)).register_forward_hook(look)
    make_trainer(tmp_path, precision=precision, limit_val_batches=0).fit(agent, datamodule=data)
    assert {training for training, _ in seen} == {True, False}
    assert {kind for _, kind in seen} == {dtype}
    assert torch.get_default_dtype() == torch.float32


class Weights(pl.Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trained = [p.detach().flatten().clone() for p in pl_module.parameters() if p.requires_grad]
        self.seen.append(torch.cat(trained))


def averaging():
    if not hasattr(lightning_callbacks, "EMAWeightAveraging"):
        return {}
    ema = lightning_callbacks.EMAWeightAveraging
    return {
        "equally": lambda: lightning_callbacks.WeightAveraging(),
        "exponentially": lambda: ema(decay=0.8),
        "without buffers": lambda: ema(decay=0.8, use_buffers=False),
        "at the ends of epochs": lambda: ema(decay=0.5, update_every_n_steps=0, update_starting_at_epoch=0),
    }


@pytest.mark.parametrize("how", averaging())
@pytest.mark.parametrize("name", ["base", "icarl", "bic"])
def test_the_matrix_is_of_averaged_weights_where_these_are_kept(tmp_path: Path, name: str, how: str) -> None:
    def run(callbacks):
        pl.seed_everything(0)
        data, weights = make_data(batch_size=6), Weights()
        agent = make(name, data, Frozen(), epochs_per_task=2)
        trainer = make_trainer(tmp_path, [weights, *callbacks], enable_checkpointing=False)
        trainer.fit(agent, datamodule=data)
        return agent, weights.seen, trainer.test(agent, datamodule=data, verbose=False)[0]

    agent, weights, tested = run([averaging()[how]()])
    assert matrix(agent)[-1].tolist() == pytest.approx([tested[f"test/acc_task_{j}"] for j in range(3)])
    # What an agent notes is no weight: it is as without averaging.
    assert bool(agent.seen_classes.all())
    assert agent.current_classes.tolist() == [False] * 4 + [True] * 2
    if how != "at the ends of epochs":
        trained = torch.cat([p.detach().flatten() for p in agent.parameters() if p.requires_grad])
        assert not torch.equal(trained, weights[-1])
    if name == "base":  # the others learn from features of averaged weights
        _, alone, _ = run([])
        assert all(torch.equal(a, b) for a, b in zip(weights, alone, strict=True)), "training goes on as without"


@pytest.mark.parametrize("how", averaging())
def test_ewc_measures_the_weights_that_are_trained_not_their_average(tmp_path: Path, how: str) -> None:
    def run(callbacks):
        data = make_data(batch_size=7)
        agent = make("ewc", data)
        make_trainer(tmp_path, callbacks, limit_val_batches=0).fit(agent, datamodule=data)
        return agent

    plain, beside = run([]), run([averaging()[how]()])
    assert torch.equal(plain.fisher, beside.fisher)
    # Its weights are the averages by now.
    assert not torch.equal(weights(plain), weights(beside))


def test_stochastic_weight_averaging_is_refused_with_what_to_use(tmp_path: Path) -> None:
    data = make_data()
    trainer = make_trainer(tmp_path, [StochasticWeightAveraging(0.01)], enable_checkpointing=False)
    with pytest.raises(ConfigurationError, match=r"StochasticWeightAveraging .* use WeightAveraging or EMA"):
        trainer.fit(make("base", data), datamodule=data)


@pytest.mark.parametrize(
    ("option", "rows"),
    # Fourteen samples of each task are five batches of three, the last of two.
    [
        ({}, 14),
        ({"limit_test_batches": 2}, 6),
        ({"limit_test_batches": 0.5}, 6),
        ({"limit_test_batches": 5}, 14),
        ({"limit_test_batches": 9}, 14),
        ({"limit_test_batches": 1.0}, 14),
        ({"limit_test_batches": 0}, 0),
        ({"fast_dev_run": 2}, 6),
        ({"limit_val_batches": 1}, 14),
    ],
)
def test_limits_of_test_batches_hold_for_the_matrix(tmp_path: Path, option, rows: int) -> None:
    passed = []

    class Counting(FineTuning):
        def evaluate(self, batch):
            if not self.trainer.validating:
                passed.append(len(batch.targets))
            return super().evaluate(batch)

    data = make_data(eval_batch_size=3, validate_on="test")
    agent = Counting(MLP([8]), data.num_classes, data.input_spec)
    trainer = make_trainer(tmp_path, **option)
    trainer.fit(agent, datamodule=data)
    tasks = 2 if "fast_dev_run" in option else 3
    expected = torch.full((tasks, tasks), rows).tril()
    assert torch.equal(agent.clock.matrix.total[:tasks, :tasks], expected)
    assert sum(passed) == int(expected.sum())
    if rows and "fast_dev_run" not in option:
        tested = trainer.test(agent, datamodule=data, verbose=False)[0]
        assert matrix(agent)[-1].tolist() == pytest.approx([tested[f"test/acc_task_{j}"] for j in range(3)])


def test_a_share_of_test_batches_that_leaves_none_is_refused(tmp_path: Path) -> None:
    data = make_data(eval_batch_size=3)
    with pytest.raises(ConfigurationError, match=r"limit_test_batches=0\.1 of 5 batches .* at least 0\.2"):
        make_trainer(tmp_path, limit_test_batches=0.1).fit(make("base", data), datamodule=data)


@pytest.mark.parametrize(("limit", "rows"), [(1, 2), (2, 4), (0.5, 6), (1.0, 14), (20, 14)])
@pytest.mark.parametrize("name", ["icarl", "ewc", "derpp_task_end"])
def test_a_limited_pass_over_a_task_sees_as_many_samples_as_training_of_each_class(
    tmp_path: Path, name: str, limit: float, rows: int
) -> None:
    # A task has fourteen samples, seven batches of two.
    data = make_data(batch_size=2)
    passes = []
    inner = data.train_eval_loader

    def loader(indices):
        passes.append(indices)
        return inner(indices)

    data.train_eval_loader = loader
    agent = make(name, data)
    make_trainer(tmp_path, limit_train_batches=limit, limit_val_batches=0).fit(agent, datamodule=data)
    first = passes[0]
    assert len(first.unique()) == len(first) == rows
    labels = torch.bincount(data.train_targets[first], minlength=6)
    assert labels.tolist() == [rows // 2] * 2 + [0] * 4
    if name == "icarl":
        assert all(len(agent.exemplars[y]) == min(rows // 2, 2) for y in range(6))


def test_each_class_comes_where_a_limit_is_smaller_than_their_number(tmp_path: Path) -> None:
    data = make_data(batch_size=1, increment=3)
    agent = make("icarl", data)
    make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(agent, datamodule=data)
    assert {y: len(ids) for y, ids in agent.exemplars.items()} == dict.fromkeys(range(6), 1)
    assert bool(agent.has_mean.all())


def test_the_end_of_a_task_is_never_in_inference_mode(tmp_path: Path) -> None:
    """An early stop ends a task within Lightning's validation, which is."""
    modes = []

    class Looking(FineTuning):
        def on_task_end(self, task):
            modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    data = make_data(val_ratio=0.3)
    stop = EarlyStopping("val/acc", mode="max", patience=1, check_on_train_epoch_end=False)
    agent = Looking(MLP([8]), data.num_classes, data.input_spec, epochs_per_task=9, lr=1e-9)
    make_trainer(tmp_path, [stop], enable_checkpointing=False).fit(agent, datamodule=data)
    assert agent.clock.schedule.boundaries[-1] < 27, "it stopped early"
    assert modes == [(False, True)] * 3
