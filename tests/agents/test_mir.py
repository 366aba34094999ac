"""MIR rehearses what a virtual step would harm most, and that step leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcl_lightning import Rehearsal
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Batch
from tests.conformance.agents import make
from tests.conformance.small_stream import make_data, make_trainer, weights

LR, CHOSEN = 0.05, 3


class Watch(pl.Callback):
    """Each batch as it was drawn and as it was trained on, and the network and the task before it."""

    def __init__(self, agent: Any) -> None:
        self.steps: list[tuple[Batch, nn.Module, int]] = []
        self.trained: list[Batch] = []
        inner = agent.training_loss

        def training_loss(batch: Batch) -> tuple[Tensor, Tensor]:
            self.trained.append(batch)
            found: tuple[Tensor, Tensor] = inner(batch)
            return found

        agent.training_loss = training_loss

    def on_train_batch_start(self, trainer: pl.Trainer, agent: Any, batch: Batch, batch_idx: int) -> None:
        net = copy.deepcopy(nn.Sequential(agent.backbone, agent.head))
        self.steps.append((batch, net, agent.clock.task_at(trainer.current_epoch)))


def fit(tmp_path: Path, backbone: nn.Module | None = None, batch_size: int = 5, **kwargs: Any) -> tuple[Any, Watch]:
    data = make_data(batch_size=batch_size)
    trainer = {"accumulate_grad_batches": kwargs.pop("accumulated", 1)}
    options = {"num_rehearsed": CHOSEN, "momentum": 0.0, "lr": LR} | kwargs
    agent = make("mir", data, memory={"num_samples": 8}, **options)
    if backbone is not None:
        agent.backbone = backbone
    watch = Watch(agent)
    make_trainer(tmp_path, [watch], limit_val_batches=0, enable_checkpointing=False, **trainer).fit(
        agent, datamodule=data
    )
    return agent, watch


def chosen_by_hand(net: nn.Module, batch: Batch, columns: int) -> list[int]:
    """Return the places of the representatives whose loss a step on the new samples raises most, in their order."""
    new = batch.num_new

    def losses(network: nn.Module, rows: slice) -> Tensor:
        return F.cross_entropy(network(batch.inputs[rows])[:, :columns], batch.targets[rows], reduction="none")

    stepped = copy.deepcopy(net)
    losses(stepped, slice(new)).mean().backward()
    with torch.no_grad():
        for parameter in stepped.parameters():
            parameter -= LR * parameter.grad
        growth = losses(stepped, slice(new, None)) - losses(net, slice(new, None))
    return sorted(sorted(range(len(growth)), key=lambda i: -float(growth[i]))[:CHOSEN])


@pytest.mark.parametrize(("train_classes", "accumulated"), [("all", 1), ("seen", 1), ("all", 2)])
def test_a_step_rehearses_what_it_would_harm_most(train_classes: str, accumulated: int, tmp_path: Path) -> None:
    _, watch = fit(tmp_path, train_classes=train_classes, accumulated=accumulated)
    choices = 0
    for (drawn, net, task), trained in zip(watch.steps, watch.trained, strict=True):
        new, stored = drawn.num_new, len(drawn.targets) - drawn.num_new
        columns = 2 * task + 2 if train_classes == "seen" else 6
        places = chosen_by_hand(net, drawn, columns) if stored > CHOSEN else range(stored)
        kept = [*range(new), *(new + i for i in places)]
        for name in ("inputs", "targets", "task_ids", "sample_ids", "draw_ids"):
            assert torch.equal(getattr(trained, name), getattr(drawn, name)[kept]), name
        assert trained.num_new == new
        assert trained.normalizer == drawn.normalizer
        choices += places not in (range(stored), [*range(CHOSEN)])
    assert choices > 10


def test_its_loss_is_the_sum_of_both_means(tmp_path: Path) -> None:
    agent, watch = fit(tmp_path)
    ends = [*(net for _, net, _ in watch.steps[1:]), nn.Sequential(agent.backbone, agent.head)]
    for (_, net, _), batch, end in zip(watch.steps, watch.trained, ends, strict=True):
        new = batch.num_new
        loss = F.cross_entropy(net(batch.inputs[:new]), batch.targets[:new])
        if len(batch.targets) > new:
            loss = loss + F.cross_entropy(net(batch.inputs[new:]), batch.targets[new:])
        loss.backward()
        moved = weights(end) - weights(net)
        expected = torch.cat([-LR * p.grad.flatten() for p in net.parameters()])
        torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-3)


class Network(nn.Sequential):
    feature_dim = 8

    def __init__(self, *last: nn.Module) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), *last)


def test_the_virtual_step_leaves_no_trace(tmp_path: Path) -> None:
    agent, watch = fit(tmp_path, Network(nn.BatchNorm1d(8), nn.ReLU()), batch_size=7)
    drawn = watch.steps[-1][0]
    assert len(drawn.targets) - drawn.num_new > CHOSEN
    agent.train()
    for parameter in agent.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
        parameter.register_hook(lambda _: pytest.fail("a gradient of the network's own weights was computed"))
    state = copy.deepcopy(agent.state_dict())
    chosen = agent.retrieve(drawn)
    assert len(chosen.targets) == drawn.num_new + CHOSEN
    assert not any(column.requires_grad for column in chosen if isinstance(column, Tensor))
    assert state.keys() == agent.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in agent.state_dict().items())
    assert all(bool((parameter.grad == 2).all()) for parameter in agent.parameters())


def test_dropout_makes_no_difference_between_before_and_after(tmp_path: Path) -> None:
    agent, watch = fit(tmp_path, Network(nn.Dropout(0.5)))
    agent.trainer.optimizers[0].param_groups[0]["lr"] = 0.0
    agent.train()
    drawn = watch.steps[-1][0]
    assert not agent._interference(drawn).any(), "a step of no length harms nothing"
    inputs = drawn.inputs
    assert not torch.equal(agent(inputs), agent(inputs)), "the masks differ from pass to pass"


@pytest.mark.parametrize(
    ("memory", "chosen", "words"),
    [
        ({"num_samples": 4}, 4, r"num_rehearsed=4 is not below rehearsal\.num_samples=4, .* draw more"),
        ({}, 50, r"num_rehearsed=50 is not below rehearsal\.num_samples=50"),
        ({"num_samples": 4}, 0, r"model\.num_rehearsed=0: give a whole number of at least 1"),
        ({"loss": "mean"}, 2, r"rehearsal\.loss=mean: agent mir has loss=sum"),
    ],
)
def test_what_leaves_no_choice_is_refused(memory: dict[str, Any], chosen: int, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make("mir", make_data(), memory={"num_samples": None} | memory, num_rehearsed=chosen)


def test_a_rehearsal_among_the_callbacks_has_to_leave_a_choice_too(tmp_path: Path) -> None:
    data = make_data()
    agent = make("mir", data, memory={"num_samples": None, "buffer_size": None}, num_rehearsed=4)
    trainer = make_trainer(tmp_path, [Rehearsal({"buffer_size": 12, "num_samples": 4})])
    with pytest.raises(ConfigurationError, match=r"num_rehearsed=4 is not below rehearsal\.num_samples=4"):
        trainer.fit(agent, datamodule=data)
