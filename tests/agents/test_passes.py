"""``forward: separate``: new and rehearsed rows go through the network apart, against plain PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from dcl_lightning.agents import short_names
from dcl_lightning.types import Batch
from tests.conformance.agents import REHEARSING
from tests.conformance.rehearsal_runs import same
from tests.conformance.small_stream import make_data, make_trainer

HONOURING = [name for name in REHEARSING if name not in ("agem", "gem", "gdumb")]


class Normed(nn.Sequential):
    feature_dim = 8

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())


def fit(name: str, folder: Path, trainer: dict[str, Any] | None = None, callbacks=(), ckpt=None, seed=0, **kwargs: Any):
    """Return the agent, its network at the start, and the batches that it trained on."""
    data = make_data(batch_size=5)  # 14 samples a task: batches of 5, 5 and 4
    pl.seed_everything(seed)
    memory = {"buffer_size": 12, "num_samples": 4} | kwargs.pop("memory", {})
    options = {"epochs_per_task": 2, "lr": 0.05, "forward": "separate", "rehearsal": memory} | kwargs
    if name == "mir":
        options["num_rehearsed"] = 2
    agent = getattr(short_names, name)(Normed(), data.num_classes, **options)
    start, batches, inner = copy.deepcopy(nn.Sequential(agent.backbone, agent.head)), [], agent.training_loss

    def training_loss(batch: Batch):
        batches.append(batch)
        return inner(batch)

    agent.training_loss = training_loss
    make_trainer(folder, callbacks, **{"limit_val_batches": 0} | (trainer or {})).fit(
        agent, datamodule=data, ckpt_path=ckpt
    )
    return agent, start, batches


def loss_of(name: str, batch: Batch, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The loss by the method's paper, from the logits of both kinds of rows."""
    labels = batch.targets[: batch.num_new], batch.targets[batch.num_new :]
    if not len(old):
        return F.cross_entropy(new, labels[0])
    if name in ("er", "nil"):
        losses = F.cross_entropy(torch.cat([new, old]), batch.targets, reduction="none")
        return (batch.weights * losses).sum() / batch.weights.sum()
    distance = F.mse_loss(old, batch.rehearsed["logits"])
    return F.cross_entropy(new, labels[0]) + 0.5 * distance + 0.5 * F.cross_entropy(old, labels[1])


@pytest.mark.parametrize(
    ("name", "accumulated", "memory"),
    [
        ("er", 1, {}),
        ("er", 2, {}),
        ("nil", 1, {"execution": "blocking", "prefetch": "batch"}),
        ("derpp", 1, {"execution": "blocking", "prefetch": "device"}),
        ("er", 1, {"update": "task_end", "draw_from": "past"}),
    ],
)
@pytest.mark.parametrize("forward", ["separate", "joint"])
def test_steps_and_statistics_are_those_of_a_plain_loop(name, accumulated, memory, forward, tmp_path) -> None:
    agent, net, batches = fit(name, tmp_path, {"accumulate_grad_batches": accumulated}, memory=memory, forward=forward)
    passes = 0
    for k, batch in enumerate(batches):
        n, rehearses = batch.num_new, len(batch.targets) > batch.num_new
        if k % 3 % accumulated == 0:  # three batches an epoch, of which the last may have a step of its own
            net.zero_grad()
        if forward == "joint" or not rehearses:
            new, old = net(batch.inputs).split([n, len(batch.targets) - n])
        else:
            new, old = net(batch.inputs[:n]), net(batch.inputs[n:])
        passes += 1 + (forward == "separate" and rehearses)
        (loss_of(name, batch, new, old) / accumulated).backward()
        if k % 3 % accumulated == accumulated - 1 or k % 3 == 2:
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.05 * parameter.grad
    assert int(agent.backbone[2].num_batches_tracked) == passes
    assert passes > len(batches) or forward == "joint"
    for (key, ours), theirs in zip(
        nn.Sequential(agent.backbone, agent.head).state_dict().items(), net.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", HONOURING)
def test_every_method_honours_it(name: str, tmp_path: Path) -> None:
    agent, _, batches = fit(name, tmp_path)
    without = [batch for batch in batches if len(batch.targets) == batch.num_new]
    batch = batches[-1]
    sizes: list[int] = []
    agent.backbone.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    agent.training_loss(batch)
    views = 2 if name == "scr" else 1  # one after the other
    assert sizes == [batch.num_new, len(batch.targets) - batch.num_new] * views
    assert sizes[1] > 1
    for batch in without[:1]:
        sizes.clear()
        agent.training_loss(batch)
        assert sizes == [len(batch.targets)] * views


def test_resumed_equals_uninterrupted_and_blocking_equals_inline(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    agent, *_ = fit("derpp", tmp_path, callbacks=(saver,), momentum=0.9)
    resumed, *_ = fit("derpp", tmp_path, ckpt=tmp_path / "step=8.ckpt", seed=1, momentum=0.9)
    assert same(resumed.state_dict(), agent.state_dict())
    ahead, *_ = fit("derpp", tmp_path, momentum=0.9, memory={"execution": "blocking", "prefetch": "batch"})
    assert same(ahead.state_dict(), agent.state_dict())
