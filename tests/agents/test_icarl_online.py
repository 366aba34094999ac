"""Online iCaRL's steps, teacher and means against plain PyTorch, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from dcl_lightning.agents import OnlineICaRL
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Batch
from tests.conformance.agents import make
from tests.conformance.rehearsal_runs import memory_state, same
from tests.conformance.small_stream import make_data, make_trainer, weights

LR = 0.02


class Normed(nn.Sequential):
    feature_dim = 8

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())


def fit(folder: Path, callbacks: Any = (), ckpt: Path | None = None, **kwargs: Any) -> tuple[Any, list[Any]]:
    """Return the agent; and each step's batch, task, and network before it."""
    data = make_data(batch_size=7)
    agent = make("icarl_online", data, **{"momentum": 0.0, "lr": LR} | kwargs)
    agent.backbone, agent.teacher[0] = Normed(), Normed().requires_grad_(False).eval()
    steps, inner = [], agent.training_loss

    def training_loss(batch: Batch) -> tuple[Tensor, Tensor]:
        task = agent.clock.task_at(agent.current_epoch)
        steps.append((batch, task, copy.deepcopy(nn.Sequential(agent.backbone, agent.head))))
        found: tuple[Tensor, Tensor] = inner(batch)
        return found

    agent.training_loss = training_loss
    make_trainer(folder, callbacks, limit_val_batches=0).fit(agent, datamodule=data, ckpt_path=ckpt)
    return agent, steps


def cross_entropies(logits: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross entropies by their formula, added up over the outputs, the mean over the rows."""
    p = logits.double().sigmoid()
    return -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum(1).mean()


@pytest.mark.parametrize(("forward", "train_classes"), [("joint", "all"), ("separate", "all"), ("joint", "seen")])
def test_a_step_follows_labels_of_new_rows_and_the_teacher_of_old_ones(
    forward: str, train_classes: str, tmp_path: Path
) -> None:
    agent, steps = fit(tmp_path, forward=forward, train_classes=train_classes)
    ends = [*(net for *_, net in steps[1:]), nn.Sequential(agent.backbone, agent.head)]
    teacher, last, rehearsed = None, 0, 0
    for (batch, task, net), end in zip(steps, ends, strict=True):
        if task > last:
            teacher, last = copy.deepcopy(net).eval(), task
        n, old = batch.num_new, len(batch.targets) - batch.num_new
        before = weights(net)
        if forward == "separate" and old:
            logits = torch.cat([net(batch.inputs[:n]), net(batch.inputs[n:])])
        else:
            logits = net(batch.inputs)
        trained = 2 * task + 2 if train_classes == "seen" else 6
        loss = cross_entropies(logits[:n, :trained], torch.eye(6)[batch.targets[:n], :trained])
        if old:
            assert teacher is not None
            taught = teacher(batch.inputs[n:]).detach().double().sigmoid()
            loss = loss + cross_entropies(logits[n:, :trained], taught[:, :trained])
            assert int(batch.targets[n:].max()) < 2 * task, "of earlier tasks alone"
        assert bool(old) == bool(task), "from the first step of the second task on"
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
        torch.testing.assert_close(weights(end) - before, -LR * gradient, atol=1e-6, rtol=1e-3)
        rehearsed += old
    assert rehearsed >= 32


def test_the_nearest_mean_is_that_of_features_as_they_are(tmp_path: Path) -> None:
    agent, _ = fit(tmp_path)
    data, stored = agent.trainer.datamodule, agent.rehearsal.manager.memory_rows().sample_ids
    inputs, ids = torch.randn(5, 1, 4, 4), torch.arange(5)
    batch = Batch(inputs, ids, ids, ids, torch.ones(5), torch.tensor(5.0), ids, num_new=5)
    agent.eval()
    with torch.no_grad():
        scores, features, kept = (
            agent.evaluate(batch),
            agent.backbone(inputs),
            agent.backbone(data.train_inputs[stored]),
        )
    labels = data.train_targets[stored]
    for y in range(6):
        rows = kept[labels == y]
        expected = -(features - rows.mean(0)).norm(dim=1) if len(rows) else torch.full((5,), -float("inf"))
        torch.testing.assert_close(scores[:, y], expected, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_has_the_teacher_of_the_one_before(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    options = {"forward": "separate", "momentum": 0.9, "memory": {"execution": "blocking"}}
    agent, steps = fit(tmp_path, [saver], **options)
    for step in (3, 4, 5, 7):  # the last one of the first task is the fourth
        again, _ = fit(tmp_path / "again", ckpt=tmp_path / f"step={step}.ckpt", seed=3, **options)
        assert same(again.state_dict(), agent.state_dict()), step
        assert same(memory_state(again.rehearsal.manager), memory_state(agent.rehearsal.manager)), step
    assert len(steps) == 12


@pytest.mark.parametrize("key", ["draw_from", "loss", "weighting"])
def test_another_memory_would_be_another_method(key: str) -> None:
    value = {"draw_from": "seen", "loss": "mean", "weighting": "nil"}[key]
    with pytest.raises(ConfigurationError, match=rf"rehearsal\.{key}={value}: agent OnlineICaRL has {key}="):
        OnlineICaRL(MLP([8], 1, 4), 6, {key: value})


def test_classes_that_come_again_are_refused(tmp_path: Path) -> None:
    data = make_data(scenario="domain", num_tasks=2)
    with pytest.raises(ConfigurationError, match=r"draw_from=past.*data\.scenario=domain.*update=task_end"):
        make_trainer(tmp_path).fit(make("icarl_online", data), datamodule=data)
