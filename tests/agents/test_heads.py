"""The head of cosines: its formula, and every method with it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP, CosineHead
from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.types import Batch
from tests.conformance.agents import NAMES, STREAMS, make
from tests.conformance.rehearsal_runs import same
from tests.conformance.small_stream import make_data, make_trainer

# One name for each method that does not bring a head of its own.
METHODS = [
    n
    for n in NAMES
    if "_v" not in n and n not in ("nil_global", "joint", "cumulative", "derpp_task_end")
    if "head" in getattr(short_names, n).__signature__.parameters
]


def head_of(seed: int = 0, scale: float = 4.0) -> CosineHead:
    torch.manual_seed(seed)
    return CosineHead(5, 3, scale)


def test_logits_are_scaled_cosines() -> None:
    head, features = head_of(), torch.randn(7, 5)
    f, w = features.numpy().astype(np.float64), head.weight.detach().numpy().astype(np.float64)
    cosines = (f @ w.T) / np.linalg.norm(f, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(head(features).detach(), 4 * cosines, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head(1e-3 * features), head(features))
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    torch.manual_seed(0)
    assert torch.equal(head.weight, nn.Linear(5, 3).weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_without_a_direction_and_very_long_ones_are_no_fault(dtype: torch.dtype) -> None:
    head = head_of().to(dtype)
    features = torch.stack([torch.zeros(5), torch.full((5,), 3e3)]).to(dtype).requires_grad_()
    logits = head(features)
    assert torch.equal(logits[0], torch.zeros(3, dtype=dtype))
    assert bool((logits.abs() <= 4.05).all())
    assert float(logits[1].abs().max()) > 0.1
    (1e-3 * logits.float().sum()).backward()
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_stays_near(dtype: torch.dtype) -> None:
    head, features = head_of(), torch.randn(64, 5)
    with torch.autocast("cpu", dtype):
        logits = head(features)
    torch.testing.assert_close(logits.float(), head(features), atol=0.06, rtol=0)


def test_a_step_is_that_of_a_hand_made_network(tmp_path: Path) -> None:
    data = make_data(scenario="none", batch_size=42)
    agent = make("base", data, epochs_per_task=4, head="cosine", head_scale=3.0)
    hand = copy.deepcopy(agent.backbone)
    weight = agent.head.weight.detach().clone().requires_grad_()
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    optimizer = torch.optim.SGD([*hand.parameters(), weight], 0.05, 0.9)
    for _ in range(4):
        optimizer.zero_grad()
        logits = 3 * torch.cosine_similarity(hand(data.train_inputs)[:, None], weight[None], dim=2)
        nn.functional.cross_entropy(logits, data.train_targets).backward()
        optimizer.step()
    torch.testing.assert_close(agent.head.weight, weight, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(agent.backbone.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_with_it_and_resumes(name: str, tmp_path: Path) -> None:
    def fit(folder: Path, ckpt: Path | None = None, callbacks: tuple[pl.Callback, ...] = (), seed: int = 0):
        data = make_data(**{"batch_size": 7} | STREAMS.get(name, {}))
        agent = make(name, data, seed, head="cosine")
        make_trainer(folder, callbacks, limit_val_batches=0).fit(agent, datamodule=data, ckpt_path=ckpt)
        return agent, data

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        agent, data = fit(tmp_path, callbacks=(saver,))
    assert not any("one by one" in str(w.message) for w in caught), "the gradients of single samples at once"
    assert agent.hparams["head_scale"] == 10
    logits = agent.head(agent.backbone(data.train_inputs))
    assert 0.5 < float(logits.abs().max()) <= 10.001
    resumed, _ = fit(tmp_path / "again", tmp_path / "step=5.ckpt", seed=1)
    assert same(resumed.state_dict(), agent.state_dict())
    loaded = type(agent).load_from_checkpoint(tmp_path / "step=5.ckpt", backbone=MLP([8]))
    assert loaded.head.scale == 10
    assert loaded.head.bias is None


def test_rows_of_classes_not_seen_yet_stay_as_they_are(tmp_path: Path) -> None:
    data = make_data(batch_size=7)
    agent = make("base", data, train_classes="seen", weight_decay=0.1, head="cosine")
    first, kept = agent.head.weight.detach().clone(), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            unseen = ~module.seen_classes
            kept.append(int(unseen.sum()))
            assert torch.equal(module.head.weight[unseen], first[unseen])
            assert not torch.equal(module.head.weight[~unseen], first[~unseen])

    make_trainer(tmp_path, [Watch()], enable_checkpointing=False, limit_val_batches=0).fit(agent, datamodule=data)
    assert set(kept) == {4, 2, 0}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"head": "per_task", "head_scale": 10.0}, r"head_scale=10\.0 scales cosines"),
        ({"head": "per_task", "task_aware": True}, r"model\.task_aware=True adds nothing to model\.head=per_task"),
        ({"head": "per_task", "train_classes": "seen"}, r"train_classes=seen adds nothing .* leave train_classes out"),
        ({"head_scale": 10.0}, r"model\.head_scale=10\.0 scales cosines: give model\.head=cosine, or leave head_scale"),
        ({"head": "cosine", "head_scale": 0.0}, r"model\.head_scale=0\.0: give a finite number, above 0"),
        ({"head": "cosines"}, r"model\.head='cosines': give linear, cosine, per_task; did you mean 'cosine'"),
    ],
)
def test_values_that_make_no_sense_are_refused(kwargs, words) -> None:
    with pytest.raises(ConfigurationError, match=words):
        short_names.er(MLP([4], 1, 4), 6, **kwargs)


def test_a_run_goes_on_with_its_own_head(tmp_path: Path) -> None:
    data = make_data()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, [saver], max_steps=2, limit_val_batches=0).fit(
        make("base", data, head="cosine"), datamodule=data
    )
    for given, words in (
        ({}, r"head\.bias among them, are in this network alone: .* model\.head"),
        ({"head": "cosine", "head_scale": 5.0}, r"model\.head_scale=5\.0: the checkpoint's run had 10\.0"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            make_trainer(tmp_path).fit(make("base", data, **given), datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(ConfigurationError, match=r"head\.bias"):
        make_trainer(tmp_path).test(make("base", data), datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    given = {"head": "cosine", "head_scale": 10.0}  # said in full
    make_trainer(tmp_path).fit(make("base", data, **given), datamodule=data, ckpt_path=tmp_path / "last.ckpt")


# -- a layer for each task ---------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """The network of an agent, as many pairs of layers do it: of each row those of its own task alone."""

    def __init__(self, agent: Any) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(agent.backbone)
        self.layers = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))
        for task, layer in enumerate(self.layers):
            layer.load_state_dict({n: p[2 * task : 2 * task + 2].clone() for n, p in agent.head.named_parameters()})

    def scores(self, inputs: torch.Tensor, task: int) -> torch.Tensor:
        return self.layers[task](self.backbone(inputs))

    def losses(self, inputs: torch.Tensor, targets: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        rows = [
            nn.functional.cross_entropy(self.scores(image[None], int(task)), (target - 2 * task)[None])
            for image, target, task in zip(inputs, targets, tasks, strict=True)
        ]
        return torch.stack(rows)

    def joined(self) -> list[torch.Tensor]:
        head = [torch.cat([getattr(layer, name).detach() for layer in self.layers]) for name in ("weight", "bias")]
        return [*self.backbone.parameters(), *head]


@pytest.mark.parametrize("name", ["base", "er", "nil"])
def test_each_row_trains_and_is_evaluated_by_its_tasks_layer(name: str, tmp_path: Path) -> None:
    data = make_data(batch_size=7, validate_on="test")
    agent = make(name, data, momentum=0.0, head="per_task")
    start, batches, inner = Layers(agent), [], agent.training_loss

    def training_loss(batch):
        batches.append(batch)
        return inner(batch)

    agent.training_loss = training_loss
    rows: list[list[float]] = []

    class Ends(pl.Callback):
        def on_task_end(self, trainer, module, task):
            net = Layers(module)
            rows.append([])
            for other in range(task.index + 1):
                ids = data.stream.test_indices(other)
                scores = net.scores(data.test_inputs[ids], other)
                right = scores.argmax(1) + 2 * other == data.stream.test_targets[ids]
                rows[-1].append(float(right.double().mean()))

    trainer = make_trainer(tmp_path, [Ends()], enable_checkpointing=False)
    trainer.fit(agent, datamodule=data)
    for batch in batches:
        start.zero_grad()
        losses = start.losses(batch.inputs, batch.targets, batch.task_ids)
        ((batch.weights * losses).sum() / batch.weights.sum()).backward()
        for parameter in start.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.05 * parameter.grad
    for ours, theirs in zip([*agent.backbone.parameters(), *agent.head.parameters()], start.joined(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    found = agent.results.matrix.values
    for task, row in enumerate(rows):
        assert found[task, : task + 1].tolist() == pytest.approx(row)
    assert "an output layer for each task" in (tmp_path / "report" / "summary.md").read_text()
    # The loss of validation is of the same layers.
    ids = [data.stream.test_indices(task) for task in range(3)]
    losses = [
        start.losses(data.test_inputs[i], data.stream.test_targets[i], torch.full((len(i),), task))
        for task, i in enumerate(ids)
    ]
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-3)


TASK_HEADS = [name for name in METHODS if "per_task" in getattr(short_names, name).heads]


@pytest.mark.parametrize("name", TASK_HEADS)
def test_methods_with_a_layer_for_each_task_resume_and_predict(name: str, tmp_path: Path) -> None:
    def fit(folder: Path, ckpt: Path | None = None, callbacks: tuple[pl.Callback, ...] = (), seed: int = 0):
        data = make_data(batch_size=7)
        agent = make(name, data, seed, head="per_task")
        make_trainer(folder, callbacks).fit(agent, datamodule=data, ckpt_path=ckpt)
        return agent, data

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    agent, data = fit(tmp_path, callbacks=(saver,))
    resumed, _ = fit(tmp_path / "again", tmp_path / "step=5.ckpt", seed=1)
    assert same(resumed.state_dict(), agent.state_dict())
    assert torch.equal(resumed.results.matrix.values.nan_to_num(-1), agent.results.matrix.values.nan_to_num(-1))
    loaded = type(agent).load_from_checkpoint(tmp_path / "step=10.ckpt", backbone=MLP([8]))
    for task, part in enumerate(make_trainer(tmp_path).predict(loaded, datamodule=data)):
        assert all(set(batch.class_ids.tolist()) <= {2 * task, 2 * task + 1} for batch in part)
    with pytest.raises(ConfigurationError, match="per_task needs the task of each sample"):
        make_trainer(tmp_path).predict(loaded, DataLoader(torch.zeros(2, 1, 4, 4), batch_size=2))


@pytest.mark.parametrize("name", sorted({*METHODS} - {*TASK_HEADS}))
def test_methods_for_which_it_makes_no_sense_refuse_it(name: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"model\.head=per_task: agent {name} learns with linear, cosine only"
    ):
        getattr(short_names, name)(MLP([4], 1, 4), 6, head="per_task")


class Smoothed(short_names.base):
    """Reads the scores of other tasks' classes, which ``cross_entropy`` does not."""

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self(batch.inputs)
        trained, targets = self.restrict_to_trained(logits, batch.targets)
        return nn.functional.cross_entropy(trained, targets, label_smoothing=0.1), logits


def test_a_loss_over_the_scores_of_other_tasks_is_refused_with_the_reason(tmp_path: Path) -> None:
    agent = Smoothed(MLP([4], 1, 4), 6, head="per_task")
    with pytest.raises(
        DataError, match=r"loss of step 1 .*with model\.head=per_task the scores of other tasks' classes"
    ):
        make_trainer(tmp_path).fit(agent, datamodule=make_data())


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ({"scenario": "domain", "num_tasks": 2}, r"scenario=domain a class comes in several"),
        ({"scenario": "blurry", "blurriness": 0.3}, r"scenario=blurry a class comes in several"),
        ({"boundaries": "hidden"}, r"model\.head=per_task goes by tasks.*model\.head=linear"),
    ],
)
def test_streams_whose_classes_have_no_task_are_refused(stream, words, tmp_path: Path) -> None:
    data = make_data(**stream)
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(tmp_path).fit(make("base", data, head="per_task"), datamodule=data)


class GrowingHead(nn.Module):
    """A linear layer that gets an output for each class of a task when the task starts, as Avalanche's does.

    Outputs of classes that are missing are -1000 for the loss. New ones begin as ``initial`` says, so that they begin
    as those of a layer that has all of them from the start.
    """

    def __init__(self, initial: nn.Linear) -> None:
        super().__init__()
        self.initial, self.classifier = copy.deepcopy(initial), nn.Linear(initial.in_features, 0)
        self.active = torch.zeros(initial.out_features, dtype=torch.bool)

    @torch.no_grad()
    def grow(self, classes: list[int]) -> None:
        old, outputs = self.classifier, max([len(self.classifier.bias), *(c + 1 for c in classes)])
        self.classifier = nn.Linear(old.in_features, outputs)
        self.classifier.weight.copy_(torch.cat([old.weight, self.initial.weight[len(old.bias) : outputs]]))
        self.classifier.bias.copy_(torch.cat([old.bias, self.initial.bias[len(old.bias) : outputs]]))
        self.active[classes] = True

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(inputs)
        return logits.masked_fill(~self.active[: logits.shape[1]], -1000.0)


@pytest.mark.parametrize("name", ["base", "er", "er_ace"])
def test_classes_seen_are_a_head_that_grows_by_tasks(name: str, tmp_path: Path) -> None:
    """For new and rehearsed rows alike, the loss is among the classes of all tasks that have started."""
    data = make_data(class_order=[3, 0, 5, 1, 4, 2], batch_size=4)
    agent = make(name, data, train_classes="seen", momentum=0.0, optimizer_reset=False)
    body, head = copy.deepcopy(agent.backbone), GrowingHead(agent.head)
    steps: list[Batch] = []
    inner = agent.training_loss

    def training_loss(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        steps.append(batch)
        return inner(batch)

    agent.training_loss = training_loss
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    task = -1
    for batch in steps:
        new, targets = batch.num_new, batch.targets
        if int(batch.task_ids[0]) != task:
            task += 1
            assert int(batch.task_ids[0]) == task
            head.grow([2 * task, 2 * task + 1])
        optimizer = torch.optim.SGD([*body.parameters(), *head.classifier.parameters()], 0.05)
        logits = head(body(batch.inputs))
        if name == "er_ace":
            present = targets[:new].unique()
            places = torch.searchsorted(present, targets[:new])
            loss = nn.functional.cross_entropy(logits[:new][:, present], places)
            if new < len(targets):
                loss = loss + nn.functional.cross_entropy(logits[new:], targets[new:])
        else:
            loss = nn.functional.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert task == 2
    torch.testing.assert_close(agent.head.weight, head.classifier.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(agent.head.bias, head.classifier.bias, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(agent.backbone.parameters(), body.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
